"""The low-rank algebra: project a leaf on its sketch, lift a factor back."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from raclora_jax._core.cholesky import inverse_cholesky
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.select import form, put, rows_of, take
from raclora_jax._core.sharding import auto_axes, constrained, inherited
from raclora_jax._core.sides import BothFactors, factor_shardings, in_use
from raclora_jax._core.types import Drawn, FactorValue, Scalar

# Up to this rank a lift is a sum of outer products, which the compiler fuses with the
# addition to the weights; well above it a matmul is faster, with a dense delta
# in memory (benchmarks/inner_loop.py).
_UNROLLED = 16


@auto_axes(lambda dense, sketch, plan: factor_shardings(plan))
def project_leaf(dense: Array, sketch: Drawn, plan: LeafPlan) -> FactorValue:
    """``scaling *`` the contraction of S with G over the sketched axes.

    Axis groups are contracted as they stand, never reshaped: flattening a sharded axis
    would move it. A low-precision G meets S in its own dtype and sums in float32.

    Args:
      dense: Array of ``plan.shape``.
      sketch: Array of ``plan.sketch_shape``, or both sketches.
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
    if plan.selection is not None:
        laid = Laid.of(plan)
        rows = take(laid.gather(dense), sketch, plan.selection, laid.axis, laid.batch)
        factor = laid.factor(rows)
        return (plan.scaling * factor.astype(plan.wide_dtype)).astype(plan.wide_dtype)
    stack = len(plan.batch)
    sketch_axes = tuple(range(stack + 1, len(plan.sketch_shape)))
    factor = lax.dot_general(
        sketch.astype(dense.dtype),
        dense,
        ((sketch_axes, plan.sketched), (tuple(range(stack)), plan.batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=max(
            dense.dtype, plan.wide_dtype, key=lambda dtype: dtype.itemsize
        ),
    )
    return (plan.scaling * factor).astype(plan.wide_dtype)


@auto_axes(lambda factor, sketch, plan: plan.sharding)
def lift_leaf(factor: FactorValue, sketch: Drawn, plan: LeafPlan) -> Array:
    """``scaling * S F`` laid out as the leaf: the transpose of ``project_leaf``.

    Args:
      factor: Array of ``plan.factor_shape``, or both factors.
      sketch: Array of ``plan.sketch_shape``, or both sketches.
      plan: Plan of the leaf.

    Returns:
      Array of ``plan.shape`` in ``plan.wide_dtype``.
    """
    if plan.sides:
        left, right = plan.sides
        used = in_use(factor, sketch.is_left)
        change = lift_leaf(used.left, sketch.left, left)
        return change + lift_leaf(used.right, sketch.right, right)
    if plan.selection is not None:
        laid = Laid.of(plan)
        rows = laid.rows((plan.scaling * factor).astype(plan.wide_dtype))
        return laid.scatter(put(rows, sketch, plan.selection, laid.axis, laid.batch))
    return _lift(*_together(factor, sketch, plan), _View.of(plan))


def formed(sketch: Array, plan: LeafPlan) -> Array:
    """The sketch as an array ``(batch..., rank, *axes of the sketched side)``."""
    if plan.selection is None:
        return sketch
    sizes = [plan.shape[axis] for axis in plan.sketched]
    return form(sketch, plan.selection, sizes, plan.wide_dtype)


@auto_axes(lambda weight, factor, sketch, decay, plan: plan.sharding)
def add_lifted(
    weight: Array, factor: FactorValue, sketch: Drawn, decay: Scalar, plan: LeafPlan
) -> Array:
    """``W + (lift(F) - decay * W)``, in one pass over the weight at small rank.

    Args:
      weight: Array of ``plan.shape``.
      factor: Array of ``plan.factor_shape``, or both factors.
      sketch: Array of ``plan.sketch_shape``, or both sketches.
      decay: Scalar.
      plan: Plan of the leaf.

    Returns:
      Array of ``plan.shape`` in ``plan.wide_dtype``.
    """
    if plan.sides or plan.selection is not None:
        wide = weight.astype(plan.wide_dtype)
        delta = lift_leaf(factor, sketch, plan)
        return wide + (delta - jnp.asarray(decay, wide.dtype) * wide)
    pair = _together(factor, sketch, plan)
    return _add_lifted(weight, *pair, decay, _View.of(plan))


class Laid(NamedTuple):
    """A leaf with the axes of its sketched side as one, which is mostly a view of it.

    Attributes:
      order: The axes of the leaf, those of the sketched side side by side.
      first: Where these start, and where the one axis stands.
      plan: Plan of the leaf.
    """

    order: tuple[int, ...]
    axis: int
    plan: LeafPlan

    @classmethod
    def of(cls, plan: LeafPlan) -> Laid:
        first = plan.sketched[0]
        others = [axis for axis in range(len(plan.shape)) if axis not in plan.sketched]
        before = [axis for axis in others if axis < first]
        order = (*before, *plan.sketched, *others[len(before) :])
        return cls(order, len(before), plan)

    @property
    def left(self) -> list[int]:
        """The axes of the leaf that remain, in order, -1 for the sketched side."""
        side = self.plan.sketched
        return [
            -1 if axis == side[0] else axis for axis in self.order if axis not in side[1:]
        ]

    @property
    def batch(self) -> list[int]:
        """Where the axes that stack matrices stand."""
        return [self.left.index(axis) for axis in self.plan.batch]

    def gather(self, leaf: Array) -> Array:
        """The leaf with one axis for its sketched side."""
        shape = [self.plan.dim if a == -1 else self.plan.shape[a] for a in self.left]
        return lax.transpose(leaf, self.order).reshape(shape)

    def scatter(self, array: Array) -> Array:
        """What ``gather`` took apart."""
        shape = [self.plan.shape[axis] for axis in self.order]
        back = [self.order.index(axis) for axis in range(len(shape))]
        return lax.transpose(array.reshape(shape), back)

    def factor(self, rows: Array) -> Array:
        """Picked rows as a factor."""
        axes = [*self.plan.batch, -1, *self.plan.trained]
        return lax.transpose(rows, [self.left.index(axis) for axis in axes])

    def rows(self, factor: Array) -> Array:
        """A factor as rows of the leaf."""
        axes = [*self.plan.batch, -1, *self.plan.trained]
        return lax.transpose(factor, [axes.index(axis) for axis in self.left])


def _together(factor: Array, sketch: Array, plan: LeafPlan) -> tuple[Array, Array]:
    """Factor and sketch where the leaf is: one gather each, before they are lifted."""
    if plan.sharding is None:
        return factor, sketch

    def at_leaf(array: Array, axes: tuple[int | None, ...]) -> Array:
        assert plan.sharding is not None
        place = inherited(plan.sharding, array.shape, axes, spread=False)
        return constrained(array, place.sharding)

    return at_leaf(factor, plan.factor_axes), at_leaf(sketch, plan.sketch_axes)


class _View(NamedTuple):
    """What of a plan a lift needs: static, hashable, the same for leaves of one kind."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    sketched: tuple[int, ...]
    trained: tuple[int, ...]
    scaling: float
    dtype: str

    @classmethod
    def of(cls, plan: LeafPlan) -> _View:
        axes = (plan.batch, plan.sketched, plan.trained)
        return cls(plan.shape, *axes, plan.scaling, str(plan.wide_dtype))


# These two are traced once for all leaves of one kind.
@functools.partial(jax.jit, static_argnames="view")
def _add_lifted(
    weight: Array, factor: Array, sketch: Array, decay: Array, view: _View
) -> Array:
    wide = weight.astype(view.dtype)
    return wide + (_lift(factor, sketch, view) - jnp.asarray(decay, wide.dtype) * wide)


@functools.partial(jax.jit, static_argnames="view")
def _lift(factor: Array, sketch: Array, view: _View) -> Array:
    sides = [
        (sketch.astype(view.dtype), view.sketched),
        ((view.scaling * factor).astype(view.dtype), view.trained),
    ]
    # The side whose axes come first in the leaf goes first: then the product is laid
    # out as the leaf.
    (first, outer), (second, inner) = sorted(sides, key=lambda side: side[1])
    axis = len(view.batch)
    if sketch.shape[axis] <= _UNROLLED:
        columns = _spread(first, (*view.batch, *outer), view)
        rows = _spread(second, (*view.batch, *inner), view)
        return functools.reduce(operator.add, map(operator.mul, columns, rows))
    stack = tuple(range(axis))
    dims = (((axis,), (axis,)), (stack, stack))
    product = lax.dot_general(first, second, dims, precision=lax.Precision.HIGHEST)
    order = (*view.batch, *outer, *inner)
    return jnp.transpose(product, [order.index(a) for a in range(len(order))])


def _spread(side: Array, axes: tuple[int, ...], view: _View) -> list[Array]:
    """One array of the leaf's shape per rank, constant along the other side."""
    rank_axis, order = len(view.batch), sorted(axes)
    spread = []
    for index in range(side.shape[rank_axis]):
        one = lax.index_in_dim(side, index, rank_axis, keepdims=False)
        one = jnp.transpose(one, [axes.index(axis) for axis in order])
        spread.append(lax.broadcast_in_dim(one, view.shape, order))
    return spread


@auto_axes(lambda new, old, plan: _basis_sharding(plan))
def change_of_basis(new: Array, old: Array, plan: LeafPlan) -> Array:
    """The map from coordinates in an old sketch to the nearest ones in a new.

    ``(S'^T S')^-1 S'^T S``: with it, ``lift`` of the new coordinates is the projection
    of ``lift`` of the old ones onto the new span.

    Args:
      new: Array of ``plan.sketch_shape``.
      old: Array of ``plan.sketch_shape``.
      plan: Plan of the leaf.

    Returns:
      Array ``(batch..., rank, rank)``.
    """
    stack = tuple(range(len(plan.batch)))
    if plan.selection is not None:
        rows = [rows_of(sketch, plan.selection) for sketch in (new, old)]
        same = rows[0][..., :, None] == rows[1][..., None, :]
        return same.astype(plan.wide_dtype)
    axes = tuple(range(len(stack) + 1, len(plan.sketch_shape)))

    def cross(left: Array, right: Array) -> Array:
        dims = ((axes, axes), (stack, stack))
        return lax.dot_general(left, right, dims, precision=lax.Precision.HIGHEST)

    if plan.sketch != "gaussian_raw":
        return cross(new, old)
    inverse = inverse_cholesky(cross(new, new))
    # (L L^T)^-1 = L^-T L^-1.
    whitened = jnp.matmul(inverse, cross(new, old), precision=lax.Precision.HIGHEST)
    return jnp.matmul(inverse.mT, whitened, precision=lax.Precision.HIGHEST)


def _basis_sharding(plan: LeafPlan) -> NamedSharding | None:
    if plan.sharding is None:
        return None
    shape = (*plan.batch_shape, plan.rank, plan.rank)
    return inherited(plan.sharding, shape, (*plan.batch, None, None)).sharding


@auto_axes(lambda basis, factor, plan: plan.factor_sharding)
def in_basis(basis: Array, factor: Array, plan: LeafPlan) -> Array:
    """Applies ``change_of_basis`` to a factor-shaped array, dtype kept."""
    stack = tuple(range(len(plan.batch)))
    product = lax.dot_general(
        basis,
        factor.astype(basis.dtype),
        (((len(stack) + 1,), (len(stack),)), (stack, stack)),
        precision=lax.Precision.HIGHEST,
    )
    return product.astype(factor.dtype)
