"""Weights plus what was learned of them, rounded once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._core.lowrank import add_lifted
from raclora_jax._core.picks import Picks, picked_axes
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.rounding import places_of, settle
from raclora_jax._core.select import runs_of
from raclora_jax._core.sharding import auto_axes, sharding_of
from raclora_jax._core.types import Drawn, FactorValue, Scalar


@auto_axes(lambda weight, factor, sketch, decay, plan, *_, **__: plan.sharding)
def merge_leaf(
    weight: Array,
    factor: FactorValue,
    sketch: Drawn,
    decay: Scalar,
    plan: LeafPlan,
    rounding: str,
    key: Array | None,
    start: Array | None = None,
) -> Array:
    """``W + (lift(F) - decay * W)`` on the grid of the weight's dtype.

    Where the sketch picks rows and nothing decays, those rows alone are read, rounded and
    written. That nothing decays must be known while the program is traced.

    Args:
      weight: Array of ``plan.shape``.
      factor: Array of ``plan.factor_shape``, or both factors.
      sketch: Array of ``plan.sketch_shape``, picks, or both sketches.
      decay: Scalar.
      plan: Plan of the leaf.
      rounding: As in ``Spec``.
      key: Key for rounding; ``None`` from float32 up.
      start: Where the weight begins in the leaf it is a slice of; uint32 scalar.

    Returns:
      Array of ``plan.shape`` in the dtype of the weight.
    """
    if isinstance(sketch, Picks) and _is_zero(decay):
        return _rows_merged(weight, factor, sketch, plan.kind, rounding, key, start)
    places = None if start is None else _places(weight.shape, start)
    exact = add_lifted(weight, factor, sketch, decay, plan)
    return _settled(exact, weight.dtype, rounding, key, places)


def moves_slices(plan: LeafPlan, decay: Scalar) -> bool:
    """Whether a step of a matrix is one of slices of it as it is stored."""
    chosen = plan.selection
    sliced = chosen is not None and chosen.sliced and len(plan.shape) == 2
    return sliced and not plan.batch and _is_zero(decay)


@auto_axes(lambda stack, *_: sharding_of(stack))
def merge_in_stack(
    stack: Array,
    factor: Array,
    sketch: Picks,
    plan: LeafPlan,
    rounding: str,
    key: Array | None,
    start: Array | None,
    index: Array,
) -> Array:
    """``merge_leaf`` of one matrix of a stack in place, where a step ``moves_slices``.

    Args:
      stack: Matrices along the first axis.
      factor: As in ``merge_leaf``, like what follows, for one matrix.
      sketch: Its picks.
      plan: Plan of one matrix.
      rounding: As in ``Spec``.
      key: Key for rounding.
      start: Where the matrix begins in the stack.
      index: Which matrix, int32.

    Returns:
      The stack.
    """
    (axis,), step = plan.sketched_axes, _as_rows(factor, plan)
    places = _places(plan.shape, start)
    # Each run is read where it is written, so that the stack changes in place.
    for starts, sizes, own in runs_of(sketch.index, sketch.chosen, axis, plan.shape):
        at = [index.astype(jnp.int32), *starts]
        rows = lax.dynamic_slice(stack, at, [1, *sizes])
        positions = lax.dynamic_slice(places, starts, sizes)
        change = lax.slice_in_dim(step, own.start or 0, own.stop, axis=axis)
        exact = rows[0].astype(plan.wide_dtype) + change
        new = _settled(exact, stack.dtype, rounding, key, positions)
        stack = lax.dynamic_update_slice(stack, new[None], at)
    return stack


def _is_zero(decay: Scalar) -> bool:
    """Whether it is known to be zero while a program is traced."""
    return not isinstance(decay, jax.core.Tracer) and float(decay) == 0


# Traced once for all leaves of one kind.
@functools.partial(jax.jit, static_argnames=("plan", "rounding"))
def _rows_merged(
    weight: Array,
    factor: Array,
    sketch: Picks,
    plan: LeafPlan,
    rounding: str,
    key: Array | None,
    start: Array | None,
) -> Array:
    """The weight with the step in its picked rows, the others as they were."""
    labels = range(weight.ndim), plan.sketched_axes, plan.batch
    rows = sketch.taken(weight, *labels)
    positions = None
    if key is not None:
        positions = sketch.taken(_places(weight.shape, start), *labels)
    exact = rows.astype(plan.wide_dtype) + _as_rows(factor, plan)
    new = _settled(exact, weight.dtype, rounding, key, positions)
    return sketch.replaced(weight, new, *labels)


def _settled(
    exact: Array,
    dtype: jnp.dtype,
    rounding: str,
    key: Array | None,
    places: Array | None,
) -> Array:
    if key is not None:
        exact = settle(exact, dtype, rounding, key, places)
    return exact.astype(dtype)


def _as_rows(factor: Array, plan: LeafPlan) -> Array:
    """A factor as what is added to the rows that a sketch picks."""
    names = picked_axes(range(len(plan.shape)), plan.sketched_axes)
    scaled = (plan.scaling * factor).astype(plan.wide_dtype)
    return lax.transpose(scaled, [plan.factor_axes.index(name) for name in names])


def _places(shape: tuple[int, ...], start: Array | None) -> Array:
    """Where each number of a leaf stands in it, or in the stack that it is a slice of."""
    places = places_of(shape)
    return places if start is None else start + places
