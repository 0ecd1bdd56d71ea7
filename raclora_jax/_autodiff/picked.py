"""The rules of ``consume`` for sketches that pick rows: slices in place of products.

``x . S`` is some columns of ``x``, all that is kept for the backward pass; where the
sketch meets the output, the cotangent gives some of its columns, and ``x`` is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._autodiff.axes import Atom, Axis
from raclora_jax._autodiff.output import Names, Output, atoms_of
from raclora_jax._autodiff.stage import Eqn
from raclora_jax._autodiff.weight import Weight
from raclora_jax._core import select
from raclora_jax._core.contraction import contract
from raclora_jax._core.picks import Picks, picked_axes
from raclora_jax._core.types import RANK, Label


def product(
    weight: Weight,
    picks: Picks,
    y: Array,
    out: Output,
    x: Array,
    x_names: Names,
    by_x: bool,
    whole: bool,
) -> Array:
    """A product whose sketch picks rows: of ``x``, or of the cotangent.

    Args:
      weight: The leaf.
      picks: Its sketch.
      y: The output.
      out: What it is made of.
      x: The other operand, one axis per part.
      x_names: The labels of its axes.
      by_x: Whether ``x`` has the sketched side; if not, ``y`` has it.
      whole: Whether ``y`` has the factor's part in it already.
    """
    f_names, side, stack = weight.factor_axes, weight.side, weight.stack
    sizes = weight.side_sizes

    # x (b, m), W (m, n) sketched along m: r columns (b, r) of x are kept.
    if by_x:

        def kept(inputs: tuple[Array, Picks]) -> Array:
            x, picks = inputs
            return picks.taken(x, x_names, side, stack)

        maps = out.by_factor(picked_axes(x_names, side), f_names)
        return weight.attached(y, (x, picks), *maps, keep=kept, whole=whole)
    # x (b, m), W (m, n) sketched along n: x F^T is (b, r), r of the n columns of y.
    between = picked_axes(out.names, side)

    def push(known: tuple[Array, Picks], factor: Array) -> Array:
        x, picks = known
        factor = factor.astype(x.dtype)
        rows = contract(x, x_names, factor, f_names, between, precision=out.precision)
        placed, names = picks.placed(rows, between, side, stack, sizes)
        return lax.transpose(placed, [names.index(n) for n in out.names]).reshape(y.shape)

    def pull(known: tuple[Array, Picks], cotangent: Array) -> Array:
        x, picks = known
        cotangent = cotangent.reshape(out.sizes)
        rows = picks.taken(cotangent, out.names, side, stack)
        return contract(
            x, x_names, rows, between, f_names, dtype=out.wide, precision=out.precision
        )

    return weight.attached(y, (x, picks), push, pull, whole=whole)


def convolution(
    eqn: Eqn,
    x: Array,
    weight: Weight,
    picks: Picks,
    y: Array,
    features: int,
    place: int,
) -> Array | None:
    """A convolution whose sketch picks features, or the same channels of every tap.

    Args:
      eqn: The equation.
      x: The image.
      weight: The kernel.
      picks: Its sketch.
      y: The output.
      features: The axis of the kernel that holds its features.
      place: The axis of the output that does.

    Returns:
      The output with its dependence on the leaf, or ``None`` for other picks.
    """
    f_names, side = weight.factor_axes, weight.side
    numbers = eqn.params["dimension_numbers"]
    channels = numbers.rhs_spec[1]
    shape = list(weight.shape)

    def convolved(x: Array, kernel: Array, names: Names, changed: int) -> Array:
        """With a kernel that has a part of its features, or of its channels."""
        own = [
            [RANK] if axis == changed else atoms_of([weight.axes[axis]])
            for axis in range(len(shape))
        ]
        order = [names.index(name) for axis in own for name in axis]
        kernel = lax.transpose(kernel.astype(x.dtype), order)
        sizes = [-1 if axis == changed else size for axis, size in enumerate(shape)]
        thin: Array = eqn.primitive.bind(x, kernel.reshape(sizes), **eqn.params)
        return thin

    if {*side} == {*atoms_of([weight.axes[features]])}:

        def push(known: tuple[Array, Picks], factor: Array) -> Array:
            x, picks = known
            thin = convolved(x, factor, f_names, features)
            return select.put(thin, picks.index, picks.chosen, place).reshape(y.shape)

        return weight.attached(y, (x, picks), push)
    last = weight.axes[channels]
    within = picks.within(weight.shape[channels])
    if within is None or len(last) != 1 or side[-1] != last[0].atom:
        return None
    taps = side[:-1]
    lead = weight.side_sizes[:-1]

    def kept(inputs: tuple[Array, Picks]) -> Array:
        x, within = inputs
        return select.take(x, within.index, within.chosen, numbers.lhs_spec[1])

    def by_channels(x: Array, factor: Array) -> Array:
        rank = f_names.index(RANK)
        parts = (*lead, factor.shape[rank] // math.prod(lead))
        factor = factor.reshape(*factor.shape[:rank], *parts, *factor.shape[rank + 1 :])
        names = [*f_names[:rank], *taps, RANK, *f_names[rank + 1 :]]
        return convolved(x, factor, names, channels)

    return weight.attached(y, (x, within), by_channels, keep=kept)


def lookup(
    weight: Weight,
    picks: Picks,
    y: Array,
    out: Output,
    along: Atom,
    lead: Sequence[Axis],
    pick: Callable[..., tuple[Array, list[Label]]],
) -> Array | None:
    """A lookup in a table some of whose rows, or columns, are picked.

    Args:
      weight: The table.
      picks: Its sketch.
      y: The output.
      out: What it is made of.
      along: The axis of the table along which rows are looked up.
      lead: The axes of the indices.
      pick: ``pick(array, names, fill)``, the same lookup in another array.

    Returns:
      The output with its dependence on the leaf, or ``None`` for other picks.
    """
    side, f_names, factor = weight.side, weight.factor_axes, weight.factor
    assert factor is not None
    if side == [along]:
        # A table (words, d), r of its words picked: positions (words,) say which of the r
        # a word is. Others have r, which is out of range and so filled with zeros.
        positions, _ = pick(picks.positions(), [along], picks.chosen.rank)
        rank = f_names.index(RANK)
        made: list[Label] = [*f_names[:rank], *atoms_of(lead), *f_names[rank + 1 :]]

        def of_rows(positions: Array, factor: Array) -> Array:
            factor = factor.astype(y.dtype)
            rows = jnp.take(factor, positions, rank, mode="fill", fill_value=0)
            rows = lax.transpose(rows, [made.index(name) for name in out.names])
            return rows.reshape(y.shape)

        return weight.attached(y, positions, of_rows)
    if along not in f_names:
        return None
    looked_up, names = pick(factor, f_names)

    def placed(picks: Picks, factor: Array) -> Array:
        factor, sizes = factor.astype(y.dtype), weight.side_sizes
        array, got = picks.placed(factor, names, side, [], sizes)
        return lax.transpose(array, [got.index(n) for n in out.names]).reshape(y.shape)

    def taken(picks: Picks, cotangent: Array) -> Array:
        rows = picks.taken(cotangent.reshape(out.sizes), out.names, side, [])
        got = picked_axes(out.names, side)
        return lax.transpose(rows, [got.index(name) for name in names])

    return weight.attached(y, picks, placed, taken, factor=looked_up)
