"""The output of an operation that uses a leaf up, as rules make and meet it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._autodiff.attach import Map
from raclora_jax._autodiff.axes import Atom, Axis, Part
from raclora_jax._core.contraction import contract
from raclora_jax._core.types import Label, widened

Names: TypeAlias = Sequence[Label]


class Output(NamedTuple):
    """An operation's output, and how it is summed.

    Attributes:
      shape: Its shape as the model sees it.
      names: The parts that its axes merge.
      sizes: Their sizes.
      precision: That of the products that make it, or meet its cotangent.
      wide: The dtype in which gradients are summed, float32 at least where the factor
        is not below it.
    """

    shape: tuple[int, ...]
    names: Names
    sizes: list[int]
    precision: lax.PrecisionLike
    wide: jnp.dtype

    @classmethod
    def of(
        cls,
        y: Array,
        axes: Sequence[Axis],
        precision: lax.PrecisionLike,
        factor: Array | None,
    ) -> Output:
        """The output ``y``, whose cotangent gives the gradient of a factor, if any."""
        parts = [part for axis in axes for part in axis]
        if precision is None and y.dtype.itemsize >= 4:
            precision = lax.Precision.HIGHEST
        names, sizes = [part.atom for part in parts], [part.size for part in parts]
        low = factor is not None and factor.dtype.itemsize < 4
        wide = y.dtype if low else widened(y.dtype)
        return cls(y.shape, names, sizes, precision, wide)

    def made(
        self, left: Array, left_names: Names, right: Array, right_names: Names
    ) -> Array:
        """The output as a product of two arrays, in the dtype of the first."""
        right = right.astype(left.dtype)
        product = contract(
            left, left_names, right, right_names, self.names, precision=self.precision
        )
        return product.reshape(self.shape)

    def met(
        self, cotangent: Array, other: Array, other_names: Names, names: Names, wide: bool
    ) -> Array:
        """The cotangent times another array."""
        cotangent = cotangent.reshape(self.sizes)
        other = other.astype(cotangent.dtype)
        dtype = self.wide if wide else None
        return contract(
            other,
            other_names,
            cotangent,
            self.names,
            names,
            dtype=dtype,
            precision=self.precision,
        )

    def by_factor(self, names: Names, factor_names: Names) -> tuple[Map, Map]:
        """``push`` and ``pull`` where the output is ``known`` times the factor."""

        def push(known: Array, factor: Array) -> Array:
            return self.made(known, names, factor, factor_names)

        def pull(known: Array, cotangent: Array) -> Array:
            return self.met(cotangent, known, names, factor_names, wide=True)

        return push, pull


def own(axis: int, size: int) -> Axis:
    """An axis that the leaf has not; no name of its parts has a negative end."""
    return (Part((axis, -1), size),)


def atoms_of(axes: Iterable[Axis]) -> list[Atom]:
    """The names of the parts that axes merge."""
    return [part.atom for axis in axes for part in axis]
