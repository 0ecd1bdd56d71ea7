"""RAC-LoRA whose links begin at a drawn layer, for a shorter backward pass."""

from __future__ import annotations

import itertools

import jax
import optax
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._layers import Layer, in_layers, layer_of
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Cases, Pieces


def layered(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    layer: Layer = layer_of,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """RAC-LoRA that trains, in each link, the layers from a drawn one on.

    An experiment of this library. Each of L layers is as likely to be the first, so that
    layer l of 1 to L is trained with the chance ``p_l = l / L`` and has
    ``lambda_l = p_l r_l / d_l``: all are above zero, and the guarantee of RAC-LoRA holds
    with the smallest. A step is one branch of L, and the backward pass of each ends at
    its first layer: in the mean it goes through ``(L + 1) / 2`` of them, below the floor
    of a method that reaches every layer. Leaves of no layer are trained in every link:
    freeze an embedding, or no backward pass ends early. Under ``jax.vmap`` every branch
    runs, and leaves that stack layers for a scan are one layer. Trained numbers are said
    of a link from the first layer on.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks, scaling and length of a link.
      layer: ``layer(path)``, the name of its layer or ``None``; by default the path
        through its first part that ends in a number. Names are ordered by number, and
        the model is to apply them in this order.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. Its ``init`` raises ``ValueError`` if no leaf is of a layer.

    Example:
      >>> import jax.numpy as jnp
      >>> method = layered(1e-3, Spec(2), key=0)
      >>> method.trained({"layer_0": jnp.zeros((6, 4)), "layer_1": jnp.zeros((4, 3))})
      20
    """
    spec, data = as_spec(spec), key_data(key)

    def live(known: list[str]) -> list[set[str]]:
        layers, rest = in_layers(known, layer)
        if not layers:
            raise ValueError(
                f"no leaf of {', '.join(map(paths.show, known))} is of a layer; see layer"
            )
        every = [*layers.values()]
        return [{*rest, *itertools.chain(*every[k:])} for k in range(len(every))]

    def first(count: Array, layers: int) -> Array:
        own = leaf_key(data, "first layer", "")
        own = jax.random.fold_in(own, count // spec.resample_every)
        return jax.random.randint(own, (), 0, layers)

    cases = Cases(live, first)
    pieces = Pieces(inner=inner, train_drawn=False, chain=True, cases=cases)
    return pair_method(learning_rate, spec, pieces, key=key)
