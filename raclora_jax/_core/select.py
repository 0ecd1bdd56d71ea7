"""Sketches that pick rows: slices and gathers where other laws need products.

A sketch of the laws ``"block"`` and ``"coordinate"`` has one 1 in each row, so it is
never formed: ``S G`` picks rows of G, and ``W + S^T F`` adds to rows of W in place. It is
kept as int32, for ``"block"`` one number per matrix, for ``"coordinate"`` one per row.

A block is ``runs`` runs of equal length, one at the same place in each of ``runs`` equal
parts of the sketched side: a mesh that shards the side in so many parts keeps its rows
where they are. Where the rank does not divide the side there is one run, and it may wrap
around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from raclora_jax._core.sharding import auto_axes, without_axis

PICKING_LAWS = ("block", "coordinate")
# More runs keep a block local on more shards, and cost a slice each. A run below the
# eight rows of a tile of a TPU's registers is not worth its place.
_SHORTEST, _MOST = 8, 8


class Selection(NamedTuple):
    """What is static about the picked rows of one leaf.

    Attributes:
      law: ``"block"`` or ``"coordinate"``.
      rank: Rows picked.
      dim: Rows there are.
      runs: Runs of a block.
    """

    law: str
    rank: int
    dim: int
    runs: int

    @property
    def sliced(self) -> bool:
        """Whether every block is a slice: none wraps around."""
        return self.law == "block" and self.dim % self.rank == 0

    @property
    def whole(self) -> bool:
        """Whether a block is all rows, in their order."""
        return self.law == "block" and self.dim == self.rank

    @property
    def blocks(self) -> int:
        """Blocks in a cycle: links until every row has had its turn."""
        return self.dim // self.rank

    def stacked(self, picks: Array) -> int:
        """How many axes of picks stack matrices."""
        return picks.ndim - (self.law == "coordinate")

    def rows(self, picks: Array) -> Array:
        """The rows that one matrix's sketch picks, int32 of shape (rank,)."""
        if self.law == "coordinate":
            return picks
        part, run = self.dim // self.runs, self.rank // self.runs
        within = (picks + jnp.arange(run, dtype=jnp.int32)) % part
        starts = part * jnp.arange(self.runs, dtype=jnp.int32)
        return (starts[:, None] + within[None]).reshape(self.rank)


def selection_of(law: str, rank: int, sizes: Sequence[int]) -> Selection:
    """The selection of a law on a side with axes of these sizes."""
    dim = math.prod(sizes)
    if law != "block" or dim % rank:
        return Selection(law, rank, dim, 1)
    leading = dim // sizes[-1]
    if rank % leading == 0 and leading > 1:
        # A run in every place of the axes before the last: heads, taps of a kernel.
        return Selection(law, rank, dim, leading)
    runs = 1
    while (
        2 * runs <= _MOST and rank % (2 * runs) == 0 and rank // (2 * runs) >= _SHORTEST
    ):
        runs *= 2
    return Selection(law, rank, dim, runs)


@auto_axes(lambda array, picks, chosen, axis, batch=(): without_axis(array, axis))
def take(
    array: Array, picks: Array, chosen: Selection, axis: int, batch: Sequence[int] = ()
) -> Array:
    """The picked rows.

    Args:
      array: Array whose ``axis`` has ``dim`` rows.
      picks: int32 ``(batch...)`` or ``(batch..., rank)``.
      chosen: What is static about them.
      axis: The axis of the rows.
      batch: The axes along which matrices are stacked, in the order of ``picks``.

    Returns:
      The array with ``rank`` rows.
    """

    def one(array: Array, picks: Array, axis: int) -> Array:
        if chosen.whole:
            return array
        if not chosen.sliced:
            return jnp.take(array, chosen.rows(picks), axis, mode="clip")
        run = chosen.rank // chosen.runs
        parts = _parted(array, axis, chosen)
        return _whole(lax.dynamic_slice_in_dim(parts, picks, run, axis + 1), axis)

    return _stacked(one, array, picks, axis=axis, batch=batch)


@auto_axes(lambda rows, picks, chosen, axis, batch=(): without_axis(rows, axis))
def put(
    rows: Array, picks: Array, chosen: Selection, axis: int, batch: Sequence[int] = ()
) -> Array:
    """Zeros with ``rows`` in the picked places: the transpose of ``take``."""

    def one(rows: Array, picks: Array, axis: int) -> Array:
        shape = (*rows.shape[:axis], chosen.dim, *rows.shape[axis + 1 :])
        zeros = jnp.zeros(shape, rows.dtype)
        return _placed(zeros, rows, picks, chosen, axis)

    return _stacked(one, rows, picks, axis=axis, batch=batch)


def place(
    array: Array,
    rows: Array,
    picks: Array,
    chosen: Selection,
    axis: int,
    batch: Sequence[int] = (),
) -> Array:
    """The array with other rows in the picked places, in place where it is donated."""

    def one(both: tuple[Array, Array], picks: Array, axis: int) -> Array:
        return _placed(*both, picks, chosen, axis)

    return _stacked(one, (array, rows), picks, axis=axis, batch=batch)


def runs_of(
    picks: Array, chosen: Selection, axis: int, shape: Sequence[int]
) -> list[tuple[list[Array], list[int], slice]]:
    """Where the runs of a block are in a matrix, for blocks that are slices.

    Args:
      picks: int32 scalar.
      chosen: What is static about it.
      axis: The axis of the rows.
      shape: Of the matrix.

    Returns:
      For each run where it starts, its sizes, and which of the picked rows it is.
    """
    if chosen.whole:
        return [([jnp.zeros((), jnp.int32)] * len(shape), [*shape], slice(chosen.dim))]
    part, run = chosen.dim // chosen.runs, chosen.rank // chosen.runs
    found = []
    for one in range(chosen.runs):
        starts, sizes = [jnp.zeros((), jnp.int32)] * len(shape), [*shape]
        starts[axis], sizes[axis] = one * part + picks, run
        found.append((starts, sizes, slice(one * run, (one + 1) * run)))
    return found


@auto_axes(lambda picks, chosen, *_: without_axis(picks, chosen.stacked(picks)))
def form(
    picks: Array, chosen: Selection, sizes: Sequence[int], dtype: DTypeLike
) -> Array:
    """The sketches as arrays, for what cannot do without.

    Args:
      picks: int32 ``(batch...)`` or ``(batch..., rank)``.
      chosen: What is static about them.
      sizes: Sizes of the axes of the sketched side.
      dtype: Dtype of the arrays.

    Returns:
      Array ``(batch..., rank, *sizes)``.
    """
    hot = jax.nn.one_hot(rows_of(picks, chosen), chosen.dim, dtype=dtype)
    return hot.reshape(*hot.shape[:-1], *sizes)


def rows_of(picks: Array, chosen: Selection) -> Array:
    """The rows that every sketch of a stack picks, int32 ``(batch..., rank)``."""
    rows = chosen.rows
    for _ in range(chosen.stacked(picks)):
        rows = jax.vmap(rows)
    return rows(picks)


def _placed(
    array: Array, rows: Array, picks: Array, chosen: Selection, axis: int
) -> Array:
    if chosen.whole:
        return rows
    if not chosen.sliced:
        place = (slice(None),) * axis
        return array.at[(*place, chosen.rows(picks))].set(rows, unique_indices=True)
    parts = _parted(array, axis, chosen)
    run = rows.reshape(
        *rows.shape[:axis],
        chosen.runs,
        chosen.rank // chosen.runs,
        *rows.shape[axis + 1 :],
    )
    return _whole(lax.dynamic_update_slice_in_dim(parts, run, picks, axis + 1), axis)


def _parted(array: Array, axis: int, chosen: Selection) -> Array:
    """The rows as parts, along two axes."""
    part = chosen.dim // chosen.runs
    return array.reshape(*array.shape[:axis], chosen.runs, part, *array.shape[axis + 1 :])


def _whole(array: Array, axis: int) -> Array:
    """Two axes as one."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _stacked(
    one: Callable[[Any, Array, int], Array],
    array: Any,
    picks: Array,
    *,
    axis: int,
    batch: Sequence[int],
) -> Array:
    """``one`` for every matrix of a stack."""
    if not batch:
        return one(array, picks, axis)
    first, *rest = batch
    rest = [b - (b > first) for b in rest]

    def inside(array: Any, picks: Array) -> Array:
        return _stacked(one, array, picks, axis=axis - (axis > first), batch=rest)

    return jax.vmap(inside, (first, 0), first)(array, picks)
