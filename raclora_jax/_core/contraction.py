"""Contraction of two arrays whose axes have labels, laid out by one ``dot_general``."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from raclora_jax._core.sharding import auto_axes, product_sharding
from raclora_jax._core.types import Label


@auto_axes(
    lambda left, left_axes, right, right_axes, out_axes, **_: product_sharding(
        (left, right), (left_axes, right_axes), out_axes
    )
)
def contract(
    left: Array,
    left_axes: Sequence[Label],
    right: Array,
    right_axes: Sequence[Label],
    out_axes: Sequence[Label],
    *,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Sums the product of two arrays over every label that ``out_axes`` leaves out.

    The operands change places where that gives ``out_axes`` without a transpose: on a
    CPU a transposed copy costs more than the arithmetic of a thin matrix.

    Args:
      left: Array with one axis per label of ``left_axes``.
      left_axes: Distinct labels.
      right: Array with one axis per label of ``right_axes``.
      right_axes: Distinct labels.
      out_axes: Labels of the result, each of them in one of the operands.
      precision: Precision of the product.
      dtype: Dtype in which it is summed and returned; that of the operands by default.

    Returns:
      Array with one axis per label of ``out_axes``.

    Example:
      >>> import jax.numpy as jnp
      >>> contract(jnp.ones((5, 3)), "td", jnp.ones((2, 3)), "rd", "tr").shape
      (5, 2)
    """
    return product(
        left, left_axes, right, right_axes, out_axes, precision=precision, dtype=dtype
    )


def product(
    left: Array,
    left_axes: Sequence[Label],
    right: Array,
    right_axes: Sequence[Label],
    out_axes: Sequence[Label],
    *,
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """``contract`` where no type says a sharding, as in a function on auto axes."""
    left, left_axes = _summed(left, left_axes, {*right_axes, *out_axes})
    right, right_axes = _summed(right, right_axes, {*left_axes, *out_axes})
    stack = [a for a in out_axes if a in left_axes and a in right_axes]
    summed = [a for a in left_axes if a in right_axes and a not in out_axes]

    def made(first: Sequence[Label], second: Sequence[Label]) -> list[Label]:
        taken = {*stack, *summed}
        return [*stack, *(a for a in (*first, *second) if a not in taken)]

    if made(left_axes, right_axes) != [*out_axes] == made(right_axes, left_axes):
        left, left_axes, right, right_axes = right, right_axes, left, left_axes
    joint = _joint(left.dtype, right.dtype)
    product = dot(
        left.astype(joint),
        right.astype(joint),
        (
            (_places(summed, left_axes), _places(summed, right_axes)),
            (_places(stack, left_axes), _places(stack, right_axes)),
        ),
        precision,
        dtype,
    )
    got = made(left_axes, right_axes)
    if got == [*out_axes]:
        return product
    return lax.transpose(product, _places(out_axes, got))


def dot(
    left: Array,
    right: Array,
    dimensions: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike,
    dtype: DTypeLike | None,
) -> Array:
    """``lax.dot_general`` that sums in a wider dtype on every backend."""

    def product(left: Array, right: Array) -> Array:
        return lax.dot_general(
            left, right, dimensions, precision=precision, preferred_element_type=dtype
        )

    if dtype is None or left.dtype.itemsize >= 4:
        return product(left, right)
    # XLA's CPU backend lacks some 16-bit products into 32 bits.
    on_cpu = lambda left, right: product(left.astype(dtype), right.astype(dtype))  # noqa: E731
    out: Array = lax.platform_dependent(left, right, cpu=on_cpu, default=product)
    return out


def _joint(one: jnp.dtype, other: jnp.dtype) -> jnp.dtype:
    """The wider of two floating dtypes, under strict dtype promotion too.

    Of two 16-bit formats neither holds the other, so it is float32.
    """
    if one == other or one.itemsize > other.itemsize:
        return one
    return other if other.itemsize > one.itemsize else jnp.dtype(jnp.float32)


def parted(array: Array, axes: Sequence[Sequence[tuple[Label, int]]]) -> Array:
    """Gives each label of a merged axis an axis of its own.

    Args:
      array: Array with one axis per entry of ``axes``.
      axes: The labels and sizes that each axis merges; none for an axis of size 1.

    Returns:
      The array with one axis per label.
    """
    shape = tuple(size for axis in axes for _, size in axis)
    return array if shape == array.shape else array.reshape(shape)


def _summed(
    array: Array, axes: Sequence[Label], kept: set[Label]
) -> tuple[Array, Sequence[Label]]:
    """Sums the labels that neither the other operand nor the result has."""
    alone = [axis for axis, label in enumerate(axes) if label not in kept]
    if not alone:
        return array, axes
    return array.sum(alone), [a for axis, a in enumerate(axes) if axis not in alone]


def _places(labels: Sequence[Label], axes: Sequence[Label]) -> tuple[int, ...]:
    return tuple([*axes].index(label) for label in labels)
