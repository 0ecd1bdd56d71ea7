"""Fira: GaLore, with the rest of the gradient at the scale of its moments."""

from __future__ import annotations

import dataclasses

import optax
from jax import Array

from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax.methods._method import Method
from raclora_jax.methods._projected import (
    of_one_side,
    projected_method,
    ratio,
    top_directions,
)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
) -> Method:
    """Fira: ``W <- W - lr * scaling * (P N + phi (G - P R))``.

    ``R = P^T G`` and N is Adam's direction of it. ``phi`` is ``|N_j| / |R_j|`` for
    each column j of R: the rest of the gradient is scaled as its part in the basis was.
    The norm of the second term grows by 1.01 a step at most. P is ``galore``'s. The step
    has full rank, its state is GaLore's and one number a matrix, and the gradient is
    formed in full.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, ranks, scaling, and the steps a basis lives; its ``sketch`` is
        not used. The default side is GaLore's.
      inner: Preconditioner without learning rate; Adam by default.

    Returns:
      A ``Method``. It trains every number of its leaves; the basis counts as optimizer
      memory.

    Raises:
      ValueError: If the side is drawn, a rank exceeds a side, or ``inner`` needs params.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = fira(1e-3, Spec(2)), {"kernel": jnp.zeros((6, 4))}
      >>> method.trained(params), method.optimizer_bytes(params)
      (24, 136)

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024.
    """
    return projected_method(
        learning_rate,
        of_one_side(spec),
        inner=inner,
        choose=lambda grads, plans, count: top_directions(grads, plans),
        beyond=_rest,
    )


def _rest(
    plan: LeafPlan, dense: Array, coordinates: Array, direction: Array, basis: Array
) -> Array:
    """What the basis misses of the gradient, at the scale of what it holds."""
    plain = dataclasses.replace(plan, scaling=1.0)
    missed = dense - lift_leaf(coordinates, basis, plain)
    return plan.scaling * ratio(plan, direction, coordinates) * missed
