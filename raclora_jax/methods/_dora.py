"""DoRA: direction by a pair, magnitude by a number for each output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces


def dora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    detach_norm: bool = True,
    key: KeyLike,
) -> Method:
    """DoRA: ``magnitude * V / |V|`` with ``V = W + scaling * left * right``.

    The norm of each output runs over the contracted axes of the leaf (the input axis of a
    kernel (in, out)); the magnitudes start at those of ``W``, so that nothing changes at
    first. Here the weight is formed and differentiated in every step, which costs the
    gradient of a weight: the forward pass beside the weight has no place for a scale of
    each output. An output whose weights are all zero keeps the norm 1.

    Args:
      learning_rate: A float or a schedule of the steps; a little below LoRA's.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      inner: Preconditioner without learning rate; Adam by default.
      detach_norm: Whether the norm is a constant in the backward pass, as in the code of
        the paper; the gradient is then not orthogonal to ``V``.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> dora(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      24

    References:
      Liu et al., `DoRA: Weight-Decomposed Low-Rank Adaptation
      <https://arxiv.org/abs/2402.09353>`_, 2024.
    """

    def weight(plan: LeafPlan, weight: Array, pair: Pair) -> Array:
        direction = weight + lift_leaf(pair["zero"], pair["drawn"], plan)
        norm = _norm(plan, direction)
        norm = jax.lax.stop_gradient(norm) if detach_norm else norm
        return direction * jnp.expand_dims(pair["magnitude"] / norm, plan.rows)

    def magnitude(plan: LeafPlan, weight: Array, key: Array) -> Pair:
        del key
        wide = weight.astype(plan.wide_dtype)
        alive = jnp.any(wide != 0, axis=plan.rows)
        return {"magnitude": jnp.where(alive, _norm(plan, wide), 0)}

    pieces = Pieces(inner=inner, extra=magnitude, weight=weight)
    return pair_method(learning_rate, spec, pieces, key=key)


def _norm(plan: LeafPlan, weight: Array) -> Array:
    """The norm of each output's weights, 1 where they are all zero."""
    squares = jnp.sum(weight**2, axis=plan.rows)
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))
