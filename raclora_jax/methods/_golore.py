"""GoLore: GaLore whose later bases are random."""

from __future__ import annotations

import optax
from jax import Array, lax

from raclora_jax._core import checks
from raclora_jax._core.keys import key_data
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, Leaves
from raclora_jax.methods._method import Method
from raclora_jax.methods._projected import (
    Plans,
    drawn_directions,
    of_one_side,
    projected_method,
    top_directions,
)


def golore(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    random_from: int,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """GoLore: ``galore`` until step ``random_from``, then a random orthonormal basis.

    Near a minimum the noise outweighs the gradient, its leading directions are those of
    the noise, and GaLore stalls; a uniform frame keeps ``rank / dim`` of the gradient in
    the mean. First moments are re-expressed in every new basis, second ones are kept, as
    the linear-layer variant of the released code has it.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, ranks, scaling, and the steps a basis lives; its ``sketch`` is
        not used.
      random_from: First step whose new basis is random; 0 for all of them.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. Its trained numbers are the coordinates it steps in, and the basis
      counts as optimizer memory.

    Raises:
      ValueError: If ``random_from`` is negative, the side is drawn, a rank exceeds a
        side, or ``inner`` needs params.

    Example:
      >>> import jax.numpy as jnp
      >>> method = golore(1e-3, Spec(2), random_from=500, key=0)
      >>> method.trained({"kernel": jnp.zeros((6, 4))})
      12

    References:
      He et al., `Subspace Optimization for Large Language Models with Convergence
      Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024.
    """
    spec, data = of_one_side(spec), key_data(key)
    checks.count("random_from", random_from, least=0)

    def choose(grads: Leaves, plans: Plans, count: Array) -> dict[str, Array]:
        link = count // spec.resample_every
        return lax.cond(
            count < random_from,
            lambda: top_directions(grads, plans),
            lambda: drawn_directions(data, link, plans, "orthonormal"),
        )

    return projected_method(
        learning_rate, spec, inner=inner, choose=choose, transport=True
    )
