"""A sketch that picks rows, among arrays whose axes have labels.

It stands where a sketch of another law is an array: the contraction of ``S`` with an
array is ``taken``, that of ``S`` with a factor is ``placed``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from raclora_jax._core import select
from raclora_jax._core.saved import tell_flax
from raclora_jax._core.select import Selection
from raclora_jax._core.sharding import auto_axes, product_sharding
from raclora_jax._core.types import RANK, Label


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Picks:
    """A sketch that picks rows, in the place of one that is an array.

    The laws ``"block"`` and ``"coordinate"`` draw them; every function of a run takes
    them where other laws have arrays.

    Args:
      index: int32, what ``Selection`` knows to read: ``(batch...)``, or with a last axis
        of the rank.
      chosen: What is static about it.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> spec = rl.Spec(2, side="left", sketch="block")
      >>> picks = rl.sample_sketch(jnp.zeros((6, 8)), spec, key=0)
      >>> isinstance(picks, rl.Picks), picks.rows.shape
      (True, (2,))
    """

    index: Array
    chosen: Selection = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, index: Any, chosen: Selection) -> Picks:
        """Picks of an array, or of what stands for one."""
        tell_flax(cls, "index")
        return cls(index, chosen)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``index``."""
        return self.index.shape

    @property
    def rows(self) -> Array:
        """The rows picked, int32 ``(batch..., rank)``."""
        return select.rows_of(self.index, self.chosen)

    def formed(self, sizes: Sequence[int], dtype: DTypeLike) -> Array:
        """The sketch as an array ``(batch..., rank, *sizes)``."""
        return select.form(self.index, self.chosen, sizes, dtype)

    def taken(
        self,
        array: Array,
        names: Sequence[Label],
        side: Sequence[Label],
        stack: Sequence[Label],
    ) -> Array:
        """``S`` times an array, with the axes ``picked_axes(names, side)``.

        Args:
          array: Array with one axis per label of ``names``.
          names: Distinct labels, those of ``side`` and ``stack`` among them.
          side: The labels of the sketched side, in order.
          stack: The labels of the axes that stack matrices, in the order of ``index``.

        Returns:
          The picked rows.
        """
        left = picked_axes(names, side)
        axis, batch = left.index(RANK), [left.index(name) for name in stack]

        @auto_axes(lambda array, _: product_sharding((array,), (names,), left))
        def rows(array: Array, index: Array) -> Array:
            array = _joined(array, names, side, axis)
            return select.take(array, index, self.chosen, axis, batch)

        return rows(array, self.index)

    def placed(
        self,
        rows: Array,
        names: Sequence[Label],
        side: Sequence[Label],
        stack: Sequence[Label],
        sizes: Sequence[int],
    ) -> tuple[Array, list[Label]]:
        """The transpose of ``taken``: the rank gives way to the labels of the side.

        Args:
          rows: Array with one axis per label of ``names``.
          names: Distinct labels, ``RANK`` and those of ``stack`` among them.
          side: The labels of the sketched side, in order.
          stack: The labels of the axes that stack matrices, in the order of ``index``.
          sizes: The sizes of ``side``.

        Returns:
          The array, zero where nothing was placed, and its labels.
        """
        axis = [*names].index(RANK)
        batch = [[*names].index(name) for name in stack]
        made = [*names[:axis], *side, *names[axis + 1 :]]

        @auto_axes(lambda rows, _: product_sharding((rows,), (names,), made))
        def whole(rows: Array, index: Array) -> Array:
            array = select.put(rows, index, self.chosen, axis, batch)
            return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])

        return whole(rows, self.index), made

    def replaced(
        self,
        array: Array,
        rows: Array,
        names: Sequence[Label],
        side: Sequence[Label],
        stack: Sequence[Label],
    ) -> Array:
        """An array with other rows where ``taken`` takes them, the rest untouched.

        Args:
          array: As for ``taken``, like the labels.
          rows: Array with the axes ``picked_axes(names, side)``.
          names: Distinct labels.
          side: The labels of the sketched side, in order.
          stack: The labels of the axes that stack matrices.

        Returns:
          The array, changed in place where it is donated.
        """
        left, order = picked_axes(names, side), beside(names, side)
        axis, batch = left.index(RANK), [left.index(name) for name in stack]
        base = _joined(array, names, side, axis)
        new = select.place(base, rows, self.index, self.chosen, axis, batch)
        shape = [array.shape[names.index(name)] for name in order]
        return lax.transpose(new.reshape(shape), [order.index(name) for name in names])

    def taken_by_group(self, x: Array, groups: Array) -> Array:
        """Of every row of ``x`` the columns that its group's sketch picks.

        Args:
          x: Array ``(tokens, dim)``.
          groups: Tokens of each group.

        Returns:
          Array ``(tokens, rank)``.
        """
        return jnp.take_along_axis(x, self._by_group(x.shape[0], groups), axis=1)

    def placed_by_group(self, narrow: Array, groups: Array) -> Array:
        """The transpose of ``taken_by_group``."""
        tokens = narrow.shape[0]
        columns, rows = self._by_group(tokens, groups), jnp.arange(tokens)[:, None]
        zeros = jnp.zeros((tokens, self.chosen.dim), narrow.dtype)
        return zeros.at[rows, columns].set(narrow, unique_indices=True)

    def _by_group(self, tokens: int, groups: Array) -> Array:
        """The rows picked for each token; of those behind the last group any do."""
        ends = jnp.cumsum(groups)
        owner = jnp.searchsorted(ends, jnp.arange(tokens), side="right")
        return self.rows[jnp.minimum(owner, groups.shape[0] - 1)]

    def positions(self) -> Array:
        """Where each row of one matrix stands among the picked, the rank if nowhere."""
        nowhere = jnp.full(self.chosen.dim, self.chosen.rank, jnp.int32)
        order = jnp.arange(self.chosen.rank, dtype=jnp.int32)
        return nowhere.at[self.rows].set(order)

    def within(self, size: int) -> Picks | None:
        """The same picks along the last axis of the side, if all before it is picked.

        Args:
          size: Size of the last axis.
        """
        law, rank, dim, runs = self.chosen
        leading = dim // size
        if leading == 1:
            return self
        if runs != leading or not self.chosen.sliced:
            return None
        return Picks(self.index, Selection(law, rank // runs, size, 1))


def picked_axes(names: Sequence[Label], side: Sequence[Label]) -> list[Label]:
    """The labels of picked rows: the rank where the side, or its first axis, stood."""
    rest = [name for name in names if name not in side[1:]]
    return [RANK if name == side[0] else name for name in rest]


def beside(names: Sequence[Label], side: Sequence[Label]) -> list[Label]:
    """The labels with those of a side one after the other, where its first stands."""
    first = [*names].index(side[0])
    before = [name for name in names[:first] if name not in side]
    after = [name for name in names[first:] if name not in side]
    return [*before, *side, *after]


def _joined(
    array: Array, names: Sequence[Label], side: Sequence[Label], axis: int
) -> Array:
    """An array with the axes of a side as one, at ``axis``: mostly a view of it."""
    order = beside(names, side)
    array = lax.transpose(array, [names.index(name) for name in order])
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + len(side) :])
