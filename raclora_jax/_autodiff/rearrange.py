"""Rules for the operations that rearrange a leaf and leave it one.

Every rule takes the equation and its operands, and returns a ``Weight``, a list of them,
or ``None`` where the leaf must be formed in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._autodiff.attach import varying_axes
from raclora_jax._autodiff.axes import Atom, Axis, MeshAxes, Part, resized
from raclora_jax._autodiff.stage import Eqn
from raclora_jax._autodiff.weight import Operand, Weight, array_of
from raclora_jax._core.picks import Picks
from raclora_jax._core.sharding import is_explicit


def transpose(eqn: Eqn, weight: Weight) -> Weight:
    """Only the base moves: the factors are found by the names of their axes."""
    order = eqn.params["permutation"]
    axes = tuple(weight.axes[axis] for axis in order)
    return weight.replace(base=lax.transpose(weight.array, order), axes=axes)


def reshape(eqn: Eqn, weight: Weight) -> Weight | None:
    """Splits and merges parts; a part that is split is split in the factors too."""
    shape = eqn.params["new_sizes"]
    if eqn.params["dimensions"] is not None:
        return None
    # Parts are taken in order, each new axis as many as its size needs. With the axes
    # a:6 | b:4 and the shape (2, 12): 2 does not hold a:6, which is split into a0:2 and
    # a1:3; the next axis takes a1:3 and b:4. The shape (4, 6) has none: 4 would take a0:2
    # and two thirds of a1, so the leaf is formed.
    parts = [part for axis in weight.axes for part in axis]
    axes: list[Axis] = []
    for size in shape:
        axis: list[Part] = []
        while size > 1:
            part = parts.pop(0)
            if size % part.size:
                if part.size % size:
                    return None
                weight, (part, rest) = _split_part(weight, part, size)
                parts.insert(0, rest)
            axis.append(part)
            size //= part.size
        axes.append(tuple(axis))
    base = lax.reshape(weight.array, shape)
    weight = weight.replace(base=base, axes=tuple(axes))
    for part in parts:  # of size 1, like those that an axis of size 1 gave up
        weight = _dropped(weight, part.atom)
    return weight


def squeeze(eqn: Eqn, weight: Weight) -> Weight:
    return _squeezed(weight, eqn.params["dimensions"])


def _squeezed(weight: Weight, dimensions: Sequence[int]) -> Weight:
    gone = [axis % len(weight.axes) for axis in dimensions]
    base = lax.squeeze(weight.array, gone)
    kept = tuple(axis for i, axis in enumerate(weight.axes) if i not in gone)
    for part in (part for i in gone for part in weight.axes[i]):
        weight = _dropped(weight, part.atom)
    return weight.replace(base=base, axes=kept)


def broadcast_in_dim(eqn: Eqn, weight: Weight, *shape: Array) -> Weight | None:
    sizes, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if shape:
        return None
    base = lax.broadcast_in_dim(weight.array, sizes, places)
    new = min([0, *(part.atom[0] for axis in weight.axes for part in axis)])
    axes: list[Axis] = []
    for place, size in enumerate(sizes):
        axis: Axis = ()
        if place in places:
            axis = weight.axes[places.index(place)]
            if base.shape[place] != weight.shape[places.index(place)]:
                for part in axis:
                    weight = _dropped(weight, part.atom)
                axis = ()
        if not axis and size > 1:
            new -= 1
            axis = (Part((new,), size),)
        axes.append(axis)
    return weight.replace(base=base, axes=tuple(axes))


def slice_(eqn: Eqn, weight: Weight) -> Weight | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)

    def cut(array: Array, axis: int, of: int) -> Array:
        return lax.slice_in_dim(array, starts[of], limits[of], strides[of], axis)

    return _cut(weight, lax.slice(weight.array, starts, limits, strides), cut)


def dynamic_slice(eqn: Eqn, weight: Weight, *starts: Array) -> Weight | None:
    sizes = eqn.params["slice_sizes"]

    def cut(array: Array, axis: int, of: int) -> Array:
        return lax.dynamic_slice_in_dim(array, starts[of], sizes[of], axis)

    return _cut(weight, lax.dynamic_slice(weight.array, starts, sizes), cut)


def split(eqn: Eqn, weight: Weight) -> list[Weight] | None:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    pieces: list[Weight] = []
    start = 0
    for base in lax.split(weight.array, sizes, axis):

        def cut(array: Array, place: int, of: int, start: int = start) -> Array:
            return lax.slice_in_dim(array, start, start + sizes[len(pieces)], axis=place)

        piece = _cut(weight, base, cut)
        if piece is None:
            return None
        pieces.append(piece)
        start += sizes[len(pieces) - 1]
    return pieces


def unstack(eqn: Eqn, weight: Weight) -> list[Weight] | None:
    axis, pieces = eqn.params["axis"], []
    for index in range(weight.shape[axis]):

        def cut(array: Array, place: int, of: int, index: int = index) -> Array:
            return lax.slice_in_dim(array, index, index + 1, axis=place)

        piece = _cut(weight, cut(weight.array, axis, axis), cut)
        if piece is None:
            return None
        pieces.append(_squeezed(piece, (axis,)))
    return pieces


def rev(eqn: Eqn, weight: Weight) -> Weight:
    """What is turned round is so in the factors too, part by part of a merged axis."""
    dimensions = eqn.params["dimensions"]
    turned = weight
    for part in (part for axis in dimensions for part in weight.axes[axis]):
        both = turned.on_atom(part.atom, lambda array, place: lax.rev(array, (place,)))
        turned = turned.replace(**both)
    return turned.replace(base=lax.rev(weight.array, dimensions))


def convert_element_type(eqn: Eqn, weight: Weight) -> Weight | None:
    """The factors keep their own dtype."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return weight.replace(base=lax.convert_element_type(weight.array, dtype))


def same(eqn: Eqn, weight: Weight) -> Weight:
    """An operation that leaves the values alone."""
    return weight.replace(base=eqn.primitive.bind(weight.array, **eqn.params))


def reshard(eqn: Eqn, weight: Weight) -> Weight | None:
    """To another place; not into a stretch where the compiler decides."""
    return same(eqn, weight) if is_explicit(eqn.params.get("dst_sharding")) else None


def each_as_it_is(eqn: Eqn, *operands: Operand) -> list[Operand]:
    """What gives its operands back: a barrier, or a move to another memory."""
    arrays = [array_of(operand) for operand in operands]
    out: list[Array] = eqn.primitive.bind(*arrays, **eqn.params)
    return [
        old.replace(base=new) if isinstance(old, Weight) else new
        for old, new in zip(operands, out, strict=True)
    ]


def pvary(eqn: Eqn, *operands: Operand) -> Operand | list[Operand]:
    """Inside ``shard_map``: every array of the value varies over the axes named."""

    def one(array: Array) -> Array:
        missing = tuple(set(_names(eqn.params["axes"])) - varying_axes(array))
        return lax.pcast(array, missing, to="varying") if missing else array

    def each(operand: Operand) -> Operand:
        if not isinstance(operand, Weight):
            return one(operand)
        parts = {
            name: jax.tree.map(one, getattr(operand, name))
            for name in ("sketch", "factor")
        }
        return operand.replace(base=one(operand.array), **parts)

    out = [each(operand) for operand in operands]
    return out if eqn.primitive.multiple_results else out[0]


def all_gather(eqn: Eqn, weight: Weight) -> Weight | list[Weight] | None:
    """Inside ``shard_map``: the axis is gathered in whichever array has it."""
    params, axis = eqn.params, eqn.params["all_gather_dimension"]
    if not params["tiled"] or len(weight.axes[axis]) != 1:
        return None

    def gathered(array: Array, place: int) -> Array:
        names, groups = params["axis_name"], params["axis_index_groups"]
        out: Array = lax.all_gather(
            array, names, axis=place, tiled=True, axis_index_groups=groups
        )
        return out

    base = gathered(weight.array, axis)
    (part,) = weight.axes[axis]
    changes = weight.on_atom(part.atom, gathered)
    weight = weight.replace(base=base, **changes, axes=resized(weight.axes, base.shape))
    return [weight] if eqn.primitive.multiple_results else weight


def _split_part(weight: Weight, part: Part, last: int) -> tuple[Weight, list[Part]]:
    """Splits a part in two, the second of which takes the rest of its size."""
    first, rest = (*part.atom, 0), (*part.atom, 1)
    sizes = last, part.size // last

    def parted(array: Array, axis: int) -> Array:
        return array.reshape((*array.shape[:axis], *sizes, *array.shape[axis + 1 :]))

    def renamed(axes: tuple[Atom, ...]) -> tuple[Atom, ...]:
        two = ((first, rest) if atom == part.atom else (atom,) for atom in axes)
        return tuple(atom for pair in two for atom in pair)

    picked = isinstance(weight.sketch, Picks) and part.atom in weight.side
    changes = {} if picked else weight.on_atom(part.atom, parted)
    weight = weight.replace(
        **changes,
        sketch_axes=renamed(weight.sketch_axes),
        factor_axes=renamed(weight.factor_axes),
    )
    return weight, [Part(first, sizes[0]), Part(rest, sizes[1])]


def _dropped(weight: Weight, atom: Atom) -> Weight:
    """A part of size 1 that no axis holds any more leaves the factors too."""
    picked = isinstance(weight.sketch, Picks) and atom in weight.side
    squeezed = lambda array, axis: lax.squeeze(array, [axis])  # noqa: E731
    done = {} if picked else weight.on_atom(atom, squeezed)
    return weight.replace(
        **done,
        sketch_axes=tuple(a for a in weight.sketch_axes if a != atom),
        factor_axes=tuple(a for a in weight.factor_axes if a != atom),
    )


def _cut(
    weight: Weight, base: Array, cut: Callable[[Array, int, int], Array]
) -> Weight | None:
    """A weight whose axes were cut: ``cut(array, axis, axis of the base)``."""
    stack: list[Atom] = []
    changed = weight
    for of, (axis, size) in enumerate(zip(weight.axes, base.shape, strict=True)):
        if size == weight.shape[of]:
            continue
        if len(axis) != 1:
            return None
        (part,) = axis
        if size == 1:
            stack.append(part.atom)

        def one(array: Array, place: int, of: int = of) -> Array:
            return cut(array, place, of)

        changed = changed.replace(**changed.on_atom(part.atom, one))
    if stack:
        weight.saw((), stack)
    return changed.replace(base=base, axes=resized(weight.axes, base.shape))


def _names(axes: MeshAxes | list[str]) -> tuple[MeshAxes, ...]:
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)


RULES: dict[str, Callable[..., Any]] = {
    "all_gather": all_gather,
    "broadcast_in_dim": broadcast_in_dim,
    "convert_element_type": convert_element_type,
    "copy": same,
    "copy_p": same,
    "device_put": each_as_it_is,
    "dynamic_slice": dynamic_slice,
    "name": same,
    "optimization_barrier": each_as_it_is,
    "pvary": pvary,
    "reshape": reshape,
    "reshard": reshard,
    "rev": rev,
    "sharding_constraint": same,
    "slice": slice_,
    "split": split,
    "squeeze": squeeze,
    "transpose": transpose,
    "unstack": unstack,
}
