"""Names for the axes of a leaf and of what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from jax import Array

from raclora_jax._core.contraction import parted

# The name of a piece of one axis of the leaf: the axis, then which part of it each
# reshape that split it left. Axes that a broadcast added have negative names.
Atom: TypeAlias = tuple[int, ...]


class Part(NamedTuple):
    """A piece of an axis of the leaf, as an axis of a weight holds it."""

    atom: Atom
    size: int


# One axis of a weight: the parts it merges, none for an axis of size 1.
Axis: TypeAlias = tuple[Part, ...]

# The mesh axes that one axis of an array is sharded along.
MeshAxes: TypeAlias = str | tuple[str, ...] | None


def resized(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of a weight whose base has got another shape, part by part."""
    return tuple(
        (Part(axis[0].atom, size),) if len(axis) == 1 else axis
        for axis, size in zip(axes, shape, strict=True)
    )


def einsum_parts(array: Array, axes: Sequence[Axis]) -> tuple[Array, list[Atom]]:
    """An array with one axis per part, and the atoms of its axes."""
    return parted(array, axes), [part.atom for axis in axes for part in axis]
