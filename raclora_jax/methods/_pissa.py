"""PiSSA: a pair that starts at the leading part of the weight."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax.methods._algebra import check_full_rank
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces


def pissa(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
) -> Method:
    """PiSSA: LoRA whose factors start at ``U S^1/2`` and ``S^1/2 V^T`` of the weight.

    These are its ``rank`` leading singular triples, over the root of the scaling, so that
    the pair is their product at any ``alpha``. The frozen base is the rest of the weight,
    and nothing changes at first. Nothing is drawn. The base is rounded to the dtype of
    the leaf: a weight below float32 starts within a rounding of its own.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; its ``sketch`` is not used.
      inner: Preconditioner without learning rate; Adam by default.

    Returns:
      A ``Method``. Its ``init`` raises ``ValueError`` if a rank is above a side.

    Example:
      >>> import jax.numpy as jnp
      >>> pissa(1e-3, Spec(2)).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Meng, Wang and Zhang, `PiSSA: Principal Singular Values and Singular Vectors
      Adaptation of Large Language Models <https://arxiv.org/abs/2404.02948>`_, 2024.
    """
    pieces = Pieces(inner=inner, start=_leading, check=check_full_rank)
    return pair_method(learning_rate, spec, pieces, key=0)


def _leading(plan: LeafPlan, weight: Array) -> Pair:
    order = (*plan.batch, *plan.sketched_axes, *plan.kept_axes)
    matrix = jnp.transpose(weight, order).reshape(*plan.batch_shape, plan.dim, -1)
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[..., : plan.rank] / plan.scaling)
    drawn = root[..., None] * left[..., : plan.rank].mT
    zero = root[..., None] * right[..., : plan.rank, :]
    shape = (*plan.batch_shape, plan.rank, *(plan.shape[a] for a in plan.sketched_axes))
    return {"drawn": drawn.reshape(shape), "zero": zero.reshape(plan.factor_shape)}
