"""Clips: by the norm of the whole gradient, as a sketch sees it, and matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._chain.inner import known_plans
from raclora_jax._chain.separable import PerMatrix, per_matrix
from raclora_jax._core import checks, paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import PyTree, Scalar

# Groups of leaves, each ``{name: array}``.
Groups = Mapping[str, Mapping[str, Array]]


def clipped(groups: Groups, plans: Mapping[str, LeafPlan], max_norm: Scalar) -> Any:
    """Gradients scaled so that the norm they tell of is at most ``max_norm``.

    ``|G|^2`` is ``|g|^2`` of the leaves trained in full and, of an adapted one, ``|F|^2``
    over the share of it that the law of its sketch sees in the mean: an estimate without
    bias, and the same number from dense gradients as from factors.

    Args:
      groups: Factors and dense gradients by name.
      plans: The plans by the same names.
      max_norm: Scalar, positive.

    Returns:
      The groups, dtypes kept.
    """
    squares = [
        jnp.sum(jnp.real(array * jnp.conj(array))) / _seen(plans[name])
        for group in groups.values()
        for name, array in group.items()
        if array.size
    ]
    if not squares:
        return groups
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    share = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda array: array * share.astype(array.dtype), groups)


def _seen(plan: LeafPlan) -> float:
    """The mean of ``|F|^2 / |G|^2``; one for a leaf trained in full."""
    if not plan.adapted:
        return 1.0
    share = plan.rank if plan.law == "gaussian_raw" else plan.lam
    return plan.scaling**2 * share


def clip_by_matrix_norm(max_norm: float) -> PerMatrix:
    """Clips each factor's gradient to a norm: an inner rule that acts on each matrix.

    ``F min(1, max_norm / |F|)``, with the Frobenius norm of each matrix of a stack. A
    leaf that is trained in full is clipped as one. A fused step takes it where a clip by
    the global norm would need all gradients at once.

    Args:
      max_norm: The largest norm, positive.

    Returns:
      An optax transformation without a state, to be passed as ``inner`` or, in a chain
      that ``per_matrix`` vouches for, as a part of it.

    Raises:
      TypeError: If ``max_norm`` is no number.
      ValueError: If it is not positive and finite.

    Example:
      >>> import jax.numpy as jnp, optax, raclora_jax as rl
      >>> rule = optax.chain(clip_by_matrix_norm(1.0), optax.scale_by_adam())
      >>> tx = rl.raclora(0.1, 2, inner=rl.per_matrix(rule), key=0)
      >>> tx.init(jnp.zeros((6, 4))).skipped.item()
      0
    """
    checks.number("max_norm", max_norm, checks.POSITIVE)

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree = None,
        *,
        plans: dict[str, LeafPlan] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del params, extra
        known = known_plans() if plans is None else plans
        leaves, treedef = paths.flatten(updates)

        def one(path: str, leaf: Array) -> Array:
            plan = (known or {}).get(path)
            first = len(plan.batch) if plan is not None and plan.adapted else 0
            own = tuple(range(first, leaf.ndim))
            squares = jnp.sum(jnp.real(leaf * jnp.conj(leaf)), axis=own, keepdims=True)
            norm = jnp.sqrt(squares)
            share = jnp.where(norm < max_norm, 1.0, max_norm / norm)
            return leaf * share.astype(leaf.dtype)

        return paths.unflatten(treedef, {p: one(p, x) for p, x in leaves.items()}), state

    rule = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    return per_matrix(rule)
