"""APOLLO and APOLLO-Mini: the gradient, at a scale that a small Adam finds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import optax
from jax import Array

from raclora_jax._core.keys import key_data
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, Leaves
from raclora_jax.methods._algebra import refuse_alpha
from raclora_jax.methods._method import Method
from raclora_jax.methods._projected import (
    Plans,
    of_one_side,
    projected_method,
    ratio,
    unit_projections,
)

# Plan, coordinates and direction to what the gradient is multiplied by.
Scale = Callable[[LeafPlan, Array, Array], Array]


def apollo(
    learning_rate: optax.ScalarOrSchedule, spec: Spec | int, *, key: KeyLike
) -> Method:
    """APOLLO: ``W <- W - lr G diag(s)`` with ``s_j = |N_j| / |R_j|``.

    ``R = P G`` and N is Adam's direction of it. P is ``rank x dim`` with entries N(0, 1 /
    rank), drawn anew every ``spec.resample_every`` steps and never stored; the moments
    live on through it. A channel j is a number of the larger side. The norm of a matrix'
    step grows by 1.01 at most. The step is the gradient's own, of full rank: what the
    rank buys is a better s. Published: a quarter of the width for the rank, a P for 200
    steps. The gradient is formed in full.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, ranks, and the steps a projection lives; its ``sketch`` is not
        used, and it has no ``alpha``. The default side is the smaller one.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. It trains every number of its leaves.

    Raises:
      ValueError: If the side is drawn, ``alpha`` is given, or a rank exceeds a side.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = apollo(1e-2, Spec(2), key=0), {"kernel": jnp.zeros((6, 4))}
      >>> method.trained(params), method.optimizer_bytes(params)
      (24, 104)

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024.
    """
    return _apollo(learning_rate, of_one_side(spec), _of_channels, key)


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule, spec: Spec | int, *, key: KeyLike
) -> Method:
    """APOLLO-Mini: ``W <- W - lr sqrt(dim) |N| / |R| G``, ``apollo`` of rank 1.

    One scale a matrix. In one direction Adam's norm is less than in all by the root of
    ``dim``, the size of the projected side, which is put back here; the paper's code has
    ``sqrt(128)`` at every width.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, and the steps a projection lives; its ranks are replaced by 1,
        its ``sketch`` is not used, and it has no ``alpha``.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. It trains every number of its leaves.

    Raises:
      ValueError: If the side is drawn, or ``alpha`` is given.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = apollo_mini(1e-2, 1, key=0), {"kernel": jnp.zeros((6, 4))}
      >>> method.trained(params), method.optimizer_bytes(params)
      (24, 56)

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024.
    """
    spec = of_one_side(spec)
    rules = tuple(
        dataclasses.replace(rule, rank=None) if rule.mode == "lowrank" else rule
        for rule in spec.rules
    )
    spec = dataclasses.replace(spec, rank=1, rules=rules)
    return _apollo(learning_rate, spec, _of_matrices, key)


def _of_channels(plan: LeafPlan, coordinates: Array, direction: Array) -> Array:
    return ratio(plan, direction, coordinates)


def _of_matrices(plan: LeafPlan, coordinates: Array, direction: Array) -> Array:
    return math.sqrt(plan.dim) * ratio(plan, direction, coordinates, plan.kept_axes)


def _apollo(
    learning_rate: optax.ScalarOrSchedule, spec: Spec, scale: Scale, key: KeyLike
) -> Method:
    data = key_data(key)
    refuse_alpha(spec, "APOLLO draws P")

    def choose(grads: Leaves, plans: Plans, count: Array) -> dict[str, Array]:
        link = count // spec.resample_every
        return unit_projections(data, link, plans)

    def scaled(
        plan: LeafPlan, dense: Array, coordinates: Array, direction: Array, basis: Array
    ) -> Array:
        return scale(plan, coordinates, direction) * dense

    return projected_method(
        learning_rate,
        spec,
        inner=None,
        choose=choose,
        stored=False,
        lifts=False,
        beyond=scaled,
    )
