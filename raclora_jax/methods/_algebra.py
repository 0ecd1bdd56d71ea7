"""Small linear algebra and checks that methods of pairs share."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan


def matrix(factor: Array, plan: LeafPlan) -> Array:
    """A factor as a stack of matrices ``(batch..., rank, size of its side)``."""
    stack = len(plan.batch)
    return factor.reshape(*factor.shape[: stack + 1], -1)


def product(left: Array, right: Array) -> Array:
    """A product of stacks of matrices in full precision."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def transposed(stack: Array) -> Array:
    """Each matrix of a stack transposed."""
    return jnp.swapaxes(stack, -1, -2)


def gram(factor: Array) -> Array:
    """``F F^T`` of a stack of matrices."""
    return product(factor, transposed(factor))


def check_invertible(plan: LeafPlan) -> None:
    """Refuses a rank that is above the other side, where the factor has no inverse."""
    other = math.prod(plan.shape[axis] for axis in plan.trained)
    if plan.rank > other:
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape}: rank {plan.rank} is "
            f"above the side of {other}, so no factor of it has full rank; lower the "
            "rank, or train the leaf in full with Rule(..., mode='dense')"
        )


def check_number(name: str, value: Any, *, least: float, strict: bool = False) -> None:
    """Refuses an argument that is no number from ``least`` on."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        not real
        or not math.isfinite(value)
        or value < least
        or (strict and value <= least)
    ):
        bound = "above" if strict else "at least"
        raise ValueError(f"{name} must be a number {bound} {least}, got {value!r}")
