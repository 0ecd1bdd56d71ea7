"""The low-rank algebra: project a leaf on its sketch, lift a factor back.

The axes of leaf, sketch and factor have labels, and every function here is a contraction
over some of them. With a leaf of shape (8, 12) whose rows are sketched at rank 2 ::

    W (8, 12)   axes 0, 1
    S (2, 8)    axes RANK, 0        project:  F = S W,  summed over 0
    F (2, 12)   axes RANK, 1        lift:     S^T F,    summed over RANK

Axis groups are contracted as they stand, never reshaped: flattening a sharded axis would
move it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from raclora_jax._core.cholesky import inverse_cholesky
from raclora_jax._core.contraction import product
from raclora_jax._core.picks import Picks, picked_axes
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sharding import auto_axes, constrained, inherited
from raclora_jax._core.sides import BothFactors, factor_shardings, in_use
from raclora_jax._core.types import RANK, Drawn, FactorValue, Label, Scalar

# Up to this rank a lift is a sum of outer products, which the compiler fuses with the
# addition to the weights; well above it a matmul is faster, with a dense delta
# in memory (benchmarks/speed/inner_loop.py).
_UNROLLED = 16
_HIGHEST = lax.Precision.HIGHEST


@auto_axes(lambda dense, sketch, plan: factor_shardings(plan))
def project_leaf(dense: Array, sketch: Drawn, plan: LeafPlan) -> FactorValue:
    """``scaling *`` the contraction of S with G over the sketched axes.

    A low-precision G meets S in its own dtype and sums in float32.

    Args:
      dense: Array of ``plan.shape``.
      sketch: Array of ``plan.sketch_shape``, picks, or both sketches.
      plan: Plan of the leaf.

    Returns:
      Array of ``plan.factor_shape`` in ``plan.wide_dtype``; both factors for both
      sketches, with zero for the one not in use.
    """
    if plan.sides:
        left, right = plan.sides
        both = BothFactors(
            project_leaf(dense, sketch.left, left),
            project_leaf(dense, sketch.right, right),
        )
        return in_use(both, sketch.is_left)
    axes, wide = range(dense.ndim), plan.wide_dtype
    if isinstance(sketch, Picks):
        rows = sketch.taken(dense, axes, plan.sketched_axes, plan.batch)
        names = picked_axes(axes, plan.sketched_axes)
        factor = lax.transpose(rows, [names.index(name) for name in plan.factor_axes])
        return (plan.scaling * factor.astype(wide)).astype(wide)
    factor = product(
        sketch.astype(dense.dtype), plan.sketch_axes, dense, axes, plan.factor_axes,
        precision=_HIGHEST, dtype=max(dense.dtype, wide, key=lambda one: one.itemsize),
    )  # fmt: skip
    return (plan.scaling * factor).astype(wide)


@auto_axes(lambda factor, sketch, plan: plan.sharding)
def lift_leaf(factor: FactorValue, sketch: Drawn, plan: LeafPlan) -> Array:
    """``scaling * S F`` laid out as the leaf: the transpose of ``project_leaf``.

    Args:
      factor: Array of ``plan.factor_shape``, or both factors.
      sketch: Array of ``plan.sketch_shape``, picks, or both sketches.
      plan: Plan of the leaf.

    Returns:
      Array of ``plan.shape`` in ``plan.wide_dtype``.
    """
    if plan.sides:
        left, right = plan.sides
        used = in_use(factor, sketch.is_left)
        change = lift_leaf(used.left, sketch.left, left)
        return change + lift_leaf(used.right, sketch.right, right)
    scaled = (plan.scaling * factor).astype(plan.wide_dtype)
    if isinstance(sketch, Picks):
        side, stack = plan.sketched_axes, plan.batch
        axes = range(len(plan.shape))
        return lift_picks(sketch, side, stack, scaled, plan.factor_axes, axes, plan.shape)
    return _lifted(*_at_leaf(scaled, sketch, plan), *_labels(plan))


def lift_picks(
    picks: Picks,
    side: Sequence[Label],
    stack: Sequence[Label],
    factor: Array,
    factor_axes: Sequence[Label],
    axes: Sequence[Label],
    sizes: Sequence[int],
) -> Array:
    """``S F`` by labels where the sketch picks rows.

    Args:
      picks: The sketch.
      side: The labels of the sketched side, in order.
      stack: The labels of the axes that stack matrices, in the order of the picks.
      factor: Array with one axis per label of ``factor_axes``.
      factor_axes: Distinct labels, ``RANK`` among them.
      axes: The labels of the result.
      sizes: Their sizes.

    Returns:
      Array of shape ``sizes``.
    """
    # The factor is turned, not the leaf: it is the smaller one.
    names = picked_axes(axes, side)
    rows = lax.transpose(factor, [[*factor_axes].index(name) for name in names])
    of_side = [sizes[[*axes].index(name)] for name in side]
    whole, made = picks.placed(rows, names, side, stack, of_side)
    return lax.transpose(whole, [made.index(name) for name in axes])


def formed(sketch: Array | Picks, plan: LeafPlan) -> Array:
    """The sketch as an array ``(batch..., rank, *axes of the sketched side)``."""
    if not isinstance(sketch, Picks):
        return sketch
    return sketch.formed(
        [plan.shape[axis] for axis in plan.sketched_axes], plan.wide_dtype
    )


@auto_axes(lambda weight, factor, sketch, decay, plan: plan.sharding)
def add_lifted(
    weight: Array, factor: FactorValue, sketch: Drawn, decay: Scalar, plan: LeafPlan
) -> Array:
    """``W + (lift(F) - decay * W)``, in one pass over the weight at small rank.

    Args:
      weight: Array of ``plan.shape``.
      factor: Array of ``plan.factor_shape``, or both factors.
      sketch: Array of ``plan.sketch_shape``, picks, or both sketches.
      decay: Scalar.
      plan: Plan of the leaf.

    Returns:
      Array of ``plan.shape`` in ``plan.wide_dtype``.
    """
    if plan.sides or isinstance(sketch, Picks):
        wide = weight.astype(plan.wide_dtype)
        delta = lift_leaf(factor, sketch, plan)
        return wide + (delta - jnp.asarray(decay, wide.dtype) * wide)
    scaled = (plan.scaling * factor).astype(plan.wide_dtype)
    return _added(weight, decay, *_at_leaf(scaled, sketch, plan), *_labels(plan))


def _at_leaf(factor: Array, sketch: Array, plan: LeafPlan) -> tuple[Array, Array]:
    """Factor and sketch where the leaf is: one gather each, before they are lifted."""
    sketch = sketch.astype(plan.wide_dtype)
    if plan.sharding is None:
        return factor, sketch

    def at_leaf(array: Array, axes: Sequence[Label]) -> Array:
        assert plan.sharding is not None
        place = inherited(plan.sharding, array.shape, axes, spread=False)
        return constrained(array, place.sharding)

    return at_leaf(factor, plan.factor_axes), at_leaf(sketch, plan.sketch_axes)


# What a lift must know of a plan: the labels of sketch and factor, the leaf's shape.
_Labels = tuple[tuple[Label, ...], tuple[Label, ...], tuple[int, ...]]


def _labels(plan: LeafPlan) -> _Labels:
    return plan.sketch_axes, plan.factor_axes, plan.shape


# These two are traced once for all leaves of one kind.
@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _added(
    weight: Array, decay: Scalar, factor: Array, sketch: Array, *labels: Any
) -> Array:
    wide = weight.astype(factor.dtype)
    lifted = _lifted(factor, sketch, *labels)
    return wide + (lifted - jnp.asarray(decay, wide.dtype) * wide)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _lifted(
    factor: Array,
    sketch: Array,
    sketch_axes: tuple[Label, ...],
    factor_axes: tuple[Label, ...],
    shape: tuple[int, ...],
) -> Array:
    rank = sketch.shape[sketch_axes.index(RANK)]
    if rank > _UNROLLED:
        axes = range(len(shape))
        return product(sketch, sketch_axes, factor, factor_axes, axes, precision=_HIGHEST)
    columns = _spread(sketch, sketch_axes, shape)
    rows = _spread(factor, factor_axes, shape)
    return functools.reduce(operator.add, map(operator.mul, columns, rows))


def _spread(
    array: Array, names: tuple[Label, ...], shape: tuple[int, ...]
) -> list[Array]:
    """One array of the leaf's shape per rank, constant along the axes it lacks."""
    axis = names.index(RANK)
    own = [name for name in names if name != RANK]
    order = [name for name in range(len(shape)) if name in own]
    spread = []
    for index in range(array.shape[axis]):
        one = lax.index_in_dim(array, index, axis, keepdims=False)
        one = jnp.transpose(one, [own.index(name) for name in order])
        spread.append(lax.broadcast_in_dim(one, shape, order))
    return spread


def _basis_sharding(plan: LeafPlan) -> NamedSharding | None:
    if plan.sharding is None:
        return None
    shape = (*plan.batch_shape, plan.rank, plan.rank)
    return inherited(plan.sharding, shape, (*plan.batch, RANK, RANK)).sharding


@auto_axes(lambda new, old, plan: _basis_sharding(plan))
def change_of_basis(new: Array | Picks, old: Array | Picks, plan: LeafPlan) -> Array:
    """The map from coordinates in an old sketch to the nearest ones in a new.

    ``(S'^T S')^-1 S'^T S``: with it, ``lift`` of the new coordinates is the projection
    of ``lift`` of the old ones onto the new span.

    Args:
      new: Array of ``plan.sketch_shape``, or picks.
      old: Likewise.
      plan: Plan of the leaf.

    Returns:
      Array ``(batch..., rank, rank)``.
    """
    if isinstance(new, Picks) or isinstance(old, Picks):
        assert isinstance(new, Picks)
        assert isinstance(old, Picks)
        same = new.rows[..., :, None] == old.rows[..., None, :]
        return same.astype(plan.wide_dtype)
    if plan.law != "gaussian_raw":
        return _cross(new, old, plan)
    inverse = inverse_cholesky(_cross(new, new, plan))
    # (L L^T)^-1 = L^-T L^-1.
    whitened = jnp.matmul(inverse, _cross(new, old, plan), precision=_HIGHEST)
    return jnp.matmul(inverse.mT, whitened, precision=_HIGHEST)


def _cross(new: Array, old: Array, plan: LeafPlan) -> Array:
    """``S' S^T`` of each matrix."""

    def axes(rank: str) -> tuple[Label, ...]:
        return (*plan.batch, rank, *plan.sketched_axes)

    out = (*plan.batch, "new", "old")
    return product(new, axes("new"), old, axes("old"), out, precision=_HIGHEST)


@auto_axes(lambda basis, factor, plan: plan.factor_sharding)
def in_basis(basis: Array, factor: Array, plan: LeafPlan) -> Array:
    """Applies ``change_of_basis`` to a factor-shaped array, dtype kept."""
    moved = product(
        basis, (*plan.batch, "new", RANK), factor.astype(basis.dtype), plan.factor_axes,
        (*plan.batch, "new", *plan.kept_axes), precision=_HIGHEST,
    )  # fmt: skip
    return moved.astype(factor.dtype)
