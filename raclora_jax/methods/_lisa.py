"""LISA: Adam on a few layers drawn anew, and on what is of no layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks, paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.types import KeyLike, Leaves, LossFn, PyTree
from raclora_jax.methods._layers import (
    Layer,
    as_leaves,
    as_vector,
    in_layers,
    layer_of,
    size_of,
    wide_dtype,
)
from raclora_jax.methods._method import Method, nbytes, rate_at


class SampledState(NamedTuple):
    """State of LISA.

    Attributes:
      params: The weights.
      drawn: Adam's state for a vector of each drawn layer.
      rest: Adam's state for the leaves of no layer.
      count: int32 scalar, steps taken.
    """

    params: PyTree
    drawn: optax.OptState
    rest: optax.OptState
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def lisa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    steps: int,
    layers: int,
    layer: Layer = layer_of,
    key: KeyLike,
) -> Method:
    """LISA: Adam on ``layers`` layers drawn anew every ``steps`` steps, others at rest.

    What is of no layer, embedding and head, is trained all the time. Moments of drawn
    layers start again with each draw and there are as many as drawn layers; those of the
    rest go on. Which layers are live is known to the run alone, so the gradient of all
    layers is formed and most of it dropped: what is saved here is state, and neither the
    backward pass nor the gradients that the paper saves too (``badam`` saves both).
    Leaves that stack layers for a scan are one layer.

    Args:
      learning_rate: A float or a schedule of the steps.
      steps: How many a draw lives.
      layers: How many are trained at once; 2 in the paper's runs.
      layer: ``layer(path)``, the name of its layer or ``None``; by default the path
        through its first part that ends in a number.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. Its trained numbers are the most that one draw can have.

    Raises:
      ValueError: If a count is below 1; from ``init``, if there are fewer layers.

    Example:
      >>> import jax.numpy as jnp
      >>> method = lisa(1e-3, steps=50, layers=1, key=0)
      >>> method.trained({"layer_0": jnp.zeros((6, 4)), "layer_1": jnp.zeros((4, 3))})
      24

    References:
      Pan et al., `LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
      Model Fine-Tuning <https://arxiv.org/abs/2403.17919>`_, 2024.
    """
    checks.count("steps", steps)
    checks.count("layers", layers)
    data, adam = key_data(key), optax.scale_by_adam()

    def parts(leaves: Leaves) -> tuple[list[list[str]], list[str], int]:
        """The leaves of each layer, those of none, and the size of the largest layer."""
        named, rest = in_layers(leaves, layer)
        if layers > len(named):
            raise ValueError(
                f"layers={layers} is more than the {len(named)} layers that the weights "
                "have; see layer"
            )
        every = list(named.values())
        return every, rest, max(size_of(leaves, one) for one in every)

    def fresh(leaves: Leaves) -> optax.OptState:
        _, _, longest = parts(leaves)
        return adam.init(jnp.zeros((layers, longest), wide_dtype(leaves)))

    def init(params: PyTree) -> SampledState:
        params = jax.tree.map(jnp.asarray, params)
        leaves, _ = paths.flatten(params)
        rest = adam.init({path: leaves[path] for path in parts(leaves)[1]})
        return SampledState(params, fresh(leaves), rest, jnp.zeros((), jnp.int32))

    def step(
        state: SampledState, loss_fn: LossFn, *args: Any
    ) -> tuple[SampledState, Array]:
        leaves, treedef = paths.flatten(state.params)
        every, rest, longest = parts(leaves)
        value, grads = jax.value_and_grad(loss_fn)(state.params, *args)
        grads, _ = paths.flatten(grads)
        own = jax.random.fold_in(leaf_key(data, "layers", ""), state.count // steps)
        chosen = jax.random.permutation(own, len(every))[:layers]
        begins = state.count % steps == 0
        drawn = jax.tree.map(
            lambda new, old: jnp.where(begins, new, old), fresh(leaves), state.drawn
        )
        vectors = jnp.stack([as_vector(grads, one, longest) for one in every])
        moved, drawn = adam.update(vectors[chosen], drawn)
        moved = jnp.zeros_like(vectors).at[chosen].set(moved)
        directions, others = adam.update({path: grads[path] for path in rest}, state.rest)
        for vector, one in zip(moved, every, strict=True):
            directions |= as_leaves(vector, leaves, one)
        rate = rate_at(learning_rate, state.count)
        leaves = {
            path: leaf + (-rate * directions[path]).astype(leaf.dtype)
            for path, leaf in leaves.items()
        }
        count = optax.safe_increment(state.count)
        params = paths.unflatten(treedef, leaves)
        return SampledState(params, drawn, others, count), value

    def trained(params: PyTree) -> int:
        leaves, _ = paths.flatten(params)
        every, rest, _ = parts(leaves)
        sizes = sorted((size_of(leaves, one) for one in every), reverse=True)
        return size_of(leaves, rest) + sum(sizes[:layers])

    return Method(
        init,
        step,
        lambda state: state.params,
        trained,
        lambda params: nbytes(jax.eval_shape(init, params)[1:3]),
    )
