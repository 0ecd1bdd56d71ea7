"""Weights moved by arithmetic that gives the same bits in any program.

A compiler may contract a product and a sum into one operation that rounds once, or leave
them two that round twice, and it decides by shape, sharding and device. Here no product
rounds: every number is split into two of 12 bits, of which any two multiply without loss
in float32, so that both ways give the same bits. What is left are sums, in an order that
is written down, and each of them rounds as IEEE 754 says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from raclora_jax._core.lowrank import lift_picks
from raclora_jax._core.merge import merge_leaf
from raclora_jax._core.picks import Picks, picked_axes
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.rounding import nearest, settle
from raclora_jax._core.sharding import auto_axes, constrained
from raclora_jax._core.types import RANK, Drawn, Label, Leaf

# Below it a part is zero: products of parts then stay above the subnormal numbers, which
# some devices round to zero.
_LEAST = 2.0**-62
_HALF = 0xFFFFF000
# How many ranks are written out; a loop goes over groups of so many.
_UNROLLED = 16

Halves = tuple[Array, Array]


def halves(array: Array) -> Halves:
    """float32 numbers as sums of two that have 12 bits each."""
    bits = lax.bitcast_convert_type(array, jnp.uint32) & jnp.uint32(_HALF)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return _kept(high), _kept(array - high)


def _kept(part: Array) -> Array:
    return jnp.where(jnp.abs(part) < _LEAST, 0.0, part)


def numbers_of(numbers: Leaf, scales: Leaf | None) -> Array:
    """The numbers of a message in float32; those of 8 bits times what one is worth."""
    if scales is None:
        return jnp.asarray(numbers, jnp.float32)
    # 7 bits times the 8 of a bfloat16: no product rounds here either.
    kept = range(scales.ndim - numbers.ndim, 0)
    wide = lax.expand_dims(scales.astype(jnp.float32), kept)
    return numbers.astype(jnp.float32) * wide


@functools.partial(jax.jit, static_argnames="plan")
def moved_by_factor(
    weight: Array,
    numbers: Array,
    scales: Array | None,
    sketch: Drawn,
    decay: Array | None,
    key: Array | None,
    plan: LeafPlan,
) -> Array:
    """``W + (S F - decay * W)``, rounded as the plan says, with ``F`` scaled already.

    Args:
      weight: Array of ``plan.shape``, of at most 32 bits.
      numbers: ``F``, ``plan.factor_shape``.
      scales: ``(batch..., rank)`` of numbers of 8 bits.
      sketch: Array of ``plan.sketch_shape`` or picks.
      decay: float32 scalar; ``None`` where nothing decays.
      key: Two words of a key; ``None`` where nothing is rounded.
      plan: Plan of one side, with the sharding of the weight.

    Returns:
      Array of ``plan.shape`` in the dtype of the weight.
    """

    @auto_axes(lambda *_: plan.sharding)
    def moved(
        weight: Array,
        factor: Array,
        sketch: Drawn,
        decay: Array | None,
        key: Array | None,
    ) -> Array:
        if key is not None:
            key = jax.random.wrap_key_data(key, impl="threefry2x32")
        if isinstance(sketch, Picks) and decay is None:
            # Scaled by one, which rounds nothing: rows and numbers are added.
            own = dataclasses.replace(plan, scaling=1.0, sharding=None)
            nothing = np.zeros(())
            return merge_leaf(weight, factor, sketch, nothing, own, plan.rounding, key)
        wide = weight.astype(jnp.float32)
        delta = _lifted(factor, sketch, plan)
        if decay is not None:
            delta = delta - _product(halves(decay), halves(wide))
        exact = wide + delta
        if key is not None:
            exact = settle(exact, weight.dtype, plan.rounding, key)
        return exact.astype(weight.dtype)

    factor = numbers_of(numbers, scales)
    new: Array = moved(weight, factor, sketch, decay, key)
    return new if plan.sharding is None else constrained(new, plan.sharding)


@functools.partial(jax.jit, static_argnames="plan")
def with_rows(weight: Array, rows: Array, picks: Picks, plan: LeafPlan) -> Array:
    """The weight with other values in the rows that its sketch picks."""

    @auto_axes(lambda *_: plan.sharding)
    def changed(weight: Array, rows: Array, picks: Picks) -> Array:
        return picks.replaced(weight, rows, *_row_labels(plan))

    new: Array = changed(weight, rows, picks)
    return new if plan.sharding is None else constrained(new, plan.sharding)


@functools.partial(jax.jit, static_argnames="plan")
def rows_in(weight: Array, picks: Picks, plan: LeafPlan) -> Array:
    """The rows of a weight that its sketch picks, as ``with_rows`` takes them."""

    @auto_axes(lambda *_: None)
    def taken(weight: Array, picks: Picks) -> Array:
        return picks.taken(weight, *_row_labels(plan))

    rows: Array = taken(weight, picks)
    return rows


def rows_shape(plan: LeafPlan) -> tuple[int, ...]:
    """The shape of what ``rows_in`` gives."""
    names = picked_axes(range(len(plan.shape)), plan.sketched_axes)
    return tuple(plan.rank if n == RANK else plan.shape[int(str(n))] for n in names)


@jax.jit
def added(weight: Array, update: Array) -> Array:
    """``optax.apply_updates`` of one leaf, with a rounding that no program leaves out."""
    if weight.dtype.itemsize >= 4:
        return (weight + update.astype(weight.dtype)).astype(weight.dtype)
    exact = weight.astype(jnp.float32) + update.astype(jnp.float32)
    return nearest(exact, weight.dtype).astype(weight.dtype)


def _row_labels(
    plan: LeafPlan,
) -> tuple[Sequence[Label], Sequence[Label], Sequence[Label]]:
    return range(len(plan.shape)), plan.sketched_axes, plan.batch


def _product(one: Halves, other: Halves) -> Array:
    """The product of two numbers, of which each has been split."""
    (a, b), (c, d) = one, other
    return a * c + (a * d + (b * c + b * d))


def _lifted(factor: Array, sketch: Drawn, plan: LeafPlan) -> Array:
    """``S F`` in the leaf's shape."""
    axes = range(len(plan.shape))
    if isinstance(sketch, Picks):
        side, stack = plan.sketched_axes, plan.batch
        return lift_picks(sketch, side, stack, factor, plan.factor_axes, axes, plan.shape)
    columns = _rank_first(sketch.astype(jnp.float32), plan.sketch_axes)
    rows = _rank_first(factor, plan.factor_axes)

    def spread(array: Array, names: Sequence[Label]) -> Halves:
        places = sorted(int(str(name)) for name in names if name != RANK)
        high, low = halves(array)
        return (
            lax.broadcast_in_dim(high, plan.shape, places),
            lax.broadcast_in_dim(low, plan.shape, places),
        )

    def with_rank(sums: Halves, column: Array, row: Array) -> Halves:
        (a, b), (c, d) = spread(column, plan.sketch_axes), spread(row, plan.factor_axes)
        high, low = sums
        return high + a * c, ((low + a * d) + b * c) + b * d

    zero = jnp.zeros(plan.shape, jnp.float32)
    sums = zero, zero
    whole = plan.rank - plan.rank % _UNROLLED if plan.rank > _UNROLLED else 0
    if whole:

        def group(index: Array, sums: Halves) -> Halves:
            for one in range(_UNROLLED):
                at = index * _UNROLLED + one
                column = lax.dynamic_index_in_dim(columns, at, keepdims=False)
                row = lax.dynamic_index_in_dim(rows, at, keepdims=False)
                sums = with_rank(sums, column, row)
            return sums

        sums = lax.fori_loop(0, whole // _UNROLLED, group, sums)
    for rank in range(whole, plan.rank):
        sums = with_rank(sums, columns[rank], rows[rank])
    high, low = sums
    return high + low


def _rank_first(array: Array, names: Sequence[Label]) -> Array:
    """The array with the rank first and its other axes in the leaf's order."""
    others = [name for name in names if name != RANK]
    order = sorted(others, key=lambda name: int(str(name)))
    return lax.transpose(array, [[*names].index(name) for name in (RANK, *order)])
