"""Small linear algebra and checks that methods share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec

# What keeps the Gram matrix of a factor that is still zero from being singular.
_RIDGE = 1e-8


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


def solve(symmetric: Array, right: Array) -> Array:
    """``(C + 1e-8 I)^-1 R`` of stacks of matrices."""
    eye = jnp.eye(symmetric.shape[-1], dtype=symmetric.dtype)
    return jnp.linalg.solve(symmetric + _RIDGE * eye, right)


def sylvester(left: Array, right: Array, known: Array) -> Array:
    """X of ``left X + X right = known`` for symmetric ``left`` and ``right``."""
    ours, left_basis = jnp.linalg.eigh(left)
    theirs, right_basis = jnp.linalg.eigh(right)
    inside = product(product(transposed(left_basis), known), right_basis)
    # Of Gram matrices: a sum is zero only where both factors have lost a direction.
    inside = inside / (ours[..., :, None] + theirs[..., None, :])
    return product(product(left_basis, inside), transposed(right_basis))


def check_full_rank(plan: LeafPlan) -> None:
    """Refuses a rank above the side that is not sketched: the factor has no inverse."""
    side = plan.size_of(plan.kept_axes)
    if plan.rank > side:
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape}: rank {plan.rank} is "
            f"above a side of {side}, where no factor has full rank; lower the rank, or "
            "train the leaf in full with Rule(..., mode='dense')"
        )


def refuse_alpha(spec: Spec, who: str) -> None:
    """Refuses a spec with a scaling, where a method has none."""
    for alpha in (spec.alpha, *(rule.alpha for rule in spec.rules)):
        if alpha is not None:
            raise ValueError(
                f"alpha={alpha}: {who} to a fixed scale and its steps have no scaling; "
                "leave alpha out"
            )
