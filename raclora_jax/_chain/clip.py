"""A clip by the norm of the whole gradient, as a sketch sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Scalar

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
    share = plan.rank if plan.sketch == "gaussian_raw" else plan.lam
    return plan.scaling**2 * share
