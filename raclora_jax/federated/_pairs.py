"""Algebra of stacked pairs of factors: their mean product, and what a mean misses."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.plan import LeafPlan


def residual(factors: Array, sketches: Array, weights: Array, plan: LeafPlan) -> Any:
    """``sum_j w_j lift(F_j, S_j)`` in the smaller of two forms.

    Args:
      factors: ``(clients, *factor_shape)``.
      sketches: ``(clients, *sketch_shape)``.
      weights: ``(clients,)``.
      plan: Plan of the leaf.

    Returns:
      ``(weighted factors, sketches)``, or the sum as an array of the leaf's shape where
      that is smaller.
    """
    shape = (-1,) + (1,) * (factors.ndim - 1)
    pair = (factors * weights.astype(factors.dtype).reshape(shape), sketches)
    if factors.size + sketches.size < math.prod(plan.shape):
        return pair
    return spread(pair, plan)


def spread(delta: Any, plan: LeafPlan) -> Array:
    """What ``residual`` gave, as an array of the leaf's shape."""
    if not isinstance(delta, tuple):
        return delta
    return jax.vmap(lambda f, s: lift_leaf(f, s, plan))(*delta).sum(axis=0)


def truncated(
    factors: Array, sketches: Array, weights: Array, plan: LeafPlan
) -> tuple[Array, Array]:
    """The pair of rank ``plan.rank`` nearest to ``sum_j w_j lift(F_j, S_j)``.

    By Eckart and Young the error is the root of the sum of the squares of the singular
    values left out. QR of both stacks of factors leaves an SVD of a core whose sides are
    at most ``clients * rank``.

    Args:
      factors: ``(clients, *factor_shape)``.
      sketches: ``(clients, *sketch_shape)``.
      weights: ``(clients,)``.
      plan: Plan of the leaf.

    Returns:
      ``(factor, sketch)``, the singular values split evenly between them.
    """
    # With K clients: trained (..., n, K rank) and drawn (..., m, K rank), clients
    # outermost in the last axis, as in scale. A product (..., m, n) is never formed. Old
    # and new pair are lifted with the same scaling, which is left out.
    trained, drawn = _columns(factors, plan), _columns(sketches, plan)
    scale = jnp.repeat(weights.astype(trained.dtype), plan.rank)
    q_drawn, r_drawn = jnp.linalg.qr(drawn * scale)
    q_trained, r_trained = jnp.linalg.qr(trained)
    u, values, vt = jnp.linalg.svd(_product(r_drawn, r_trained.mT), full_matrices=False)
    root = jnp.sqrt(values)[..., None, :]
    pair = (_product(q_trained, vt.mT) * root, _product(q_drawn, u) * root)
    missing = max(plan.rank - values.shape[-1], 0)

    def rows(columns: Array, shape: tuple[int, ...]) -> Array:
        kept = columns.mT[..., : plan.rank, :]
        padding = [(0, 0)] * (kept.ndim - 2) + [(0, missing), (0, 0)]
        return jnp.pad(kept, padding).reshape(shape)

    return rows(pair[0], plan.factor_shape), rows(pair[1], plan.sketch_shape)


def _columns(stack: Array, plan: LeafPlan) -> Array:
    """``(batch..., side, clients * rank)``."""
    shape = (stack.shape[0], *plan.batch_shape, plan.rank, -1)
    flat = jnp.moveaxis(stack.reshape(shape), 0, -3)
    return flat.reshape(*plan.batch_shape, -1, flat.shape[-1]).mT


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
