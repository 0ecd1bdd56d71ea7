"""Polar factors of matrices, also by what was seen of them before, without an SVD."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._core.parts import cut
from raclora_jax._core.polar import matmul, polynomial
from raclora_jax._core.sharding import auto_axes, sharding_of, stack_sharding, zeros

# Odd polynomials a x + b x^3 + c x^5 that together take [0.05, 1] to [0.993, 1.007], the
# best of their degree for that interval, one after the other. Four that reach down to
# 0.01, six to 0.001 and the exact factor train no better: the language study of
# benchmarks.pretrained.polynomials.
# Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932, 2025.
POLYNOMIALS = (
    (6.752377658562778, -18.35097701582252, 13.263270201686687),
    (2.537864289097895, -1.874676947609866, 0.44128041789978734),
    (1.9269788381671442, -1.3066169275548185, 0.38070546999552385),
)


def polar_factor(matrix: Array, axis: int) -> Array:
    """``U V^T`` of ``matrix = U diag(s) V^T``, without a singular value decomposition.

    Args:
      matrix: Array ``(batch..., rank, *axes)``.
      axis: Where the rank stands: axes before it stack matrices, those behind it are the
        other side.

    Returns:
      Array of the same shape; zero where the matrix is.
    """
    return polar_factors({"": matrix}, {"": axis})[""]


@auto_axes(
    lambda matrices, axes, block_size=None: {
        path: sharding_of(array) for path, array in matrices.items()
    }
)
def polar_factors(
    matrices: dict[str, Array], axes: dict[str, int], block_size: int | None = None
) -> dict[str, Array]:
    """``polar_factor`` of several matrices: those of one rank are worked on as a stack.

    Polynomials of the Gram matrix on the short side. A matrix is divided by its largest
    entry before it is squared, so that one of any finite size has a finite answer.

    Args:
      matrices: ``{path: array (batch..., rank, *axes)}``.
      axes: ``{path: where the rank stands}``.
      block_size: How many rows are a matrix of their own at most; all by default.

    Returns:
      ``{path: array}``.
    """
    whole, axes_of_whole = matrices, axes
    matrices, axes = _in_blocks(matrices, axes, block_size)
    units = {path: _largest(matrix, axes[path]) for path, matrix in matrices.items()}
    lying = _in_units(matrices, axes, units)
    turned = _turned(matrices, axes, lying, _grams(lying, axes))
    return _joined(turned, whole, axes_of_whole)


@auto_axes(
    lambda matrices, axes, grams, units, seen, memory, block_size=None: (
        {path: sharding_of(array) for path, array in matrices.items()},
        {path: sharding_of(array) for path, array in grams.items()},
        {path: sharding_of(array) for path, array in units.items()},
    )
)
def whitened(
    matrices: dict[str, Array],
    axes: dict[str, int],
    grams: dict[str, Array],
    units: dict[str, Array],
    seen: Array,
    memory: float,
    block_size: int | None = None,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """``polar_factors`` by Gram matrices that are in part a mean over earlier matrices.

    Args:
      matrices: ``{path: array (batch..., rank, *axes)}``.
      axes: ``{path: where the rank stands}``.
      grams: ``{path: array (batch..., short, short)}``, the mean of the Gram matrices
        before, in squares of the units.
      units: ``{path: array (batch...,)}``, the largest entry of any matrix before.
      seen: int32 scalar, how many matrices there were, this one among them.
      memory: Weight of the mean.
      block_size: How many rows are a matrix of their own at most; all by default. Where
        there are more, ``grams`` and ``units`` have an axis of blocks behind the batch.

    Returns:
      ``{path: array}`` like ``matrices``, and the new ``grams`` and ``units``.
    """
    whole, axes_of_whole = matrices, axes
    matrices, axes = _in_blocks(matrices, axes, block_size)
    new_units, means, mixed = {}, {}, {}
    for path, matrix in matrices.items():
        largest = _largest(matrix, axes[path]).reshape(units[path].shape)
        new_units[path] = jnp.maximum(units[path], largest)
    spread = {
        path: unit.reshape(unit.shape + (1,) * (matrices[path].ndim - axes[path]))
        for path, unit in new_units.items()
    }
    lying = _in_units(matrices, axes, spread)
    for path, gram in _grams(lying, axes).items():
        # A larger entry than any before makes the unit larger.
        shrunk = units[path] / jnp.where(new_units[path] == 0, 1, new_units[path])
        before = grams[path] * (shrunk**2)[..., None, None]
        means[path] = before + (gram - before) / seen.astype(gram.dtype)
        mixed[path] = (1 - memory) * gram + memory * means[path]
    turned = _turned(matrices, axes, lying, mixed)
    return _joined(turned, whole, axes_of_whole), means, new_units


def nothing_seen(
    factor: Array, axis: int, block_size: int | None = None
) -> tuple[Array, Array]:
    """The mean of no Gram matrix, and the largest entry of no matrix.

    Args:
      factor: Array ``(batch..., rank, *axes)`` like those to come.
      axis: Where the rank stands.
      block_size: How many rows are a matrix of their own at most; all by default.

    Returns:
      What ``whitened`` takes for ``grams`` and ``units`` of the first matrix: zeros.
    """
    count, size = _blocks(factor, axis, block_size)
    short = min(size, _sizes(factor, axis)[1])
    stack = (*factor.shape[:axis], *((count,) if count > 1 else ()))
    sharding = stack_sharding(factor, axis)
    gram = zeros((*stack, short, short), factor.dtype, sharding)
    return gram, zeros(stack, factor.dtype, sharding)


def long_side(matrix: Array, axis: int, block_size: int | None = None) -> int:
    """The longer side of a block, at whose root its polar factor has mean square 1."""
    return max(_blocks(matrix, axis, block_size)[1], _sizes(matrix, axis)[1])


def _blocks(matrix: Array, axis: int, block_size: int | None) -> tuple[int, int]:
    """Into how many blocks of how many rows a matrix is cut; the last may have fewer."""
    rank = matrix.shape[axis]
    count = 1 if block_size is None else -(-rank // block_size)
    return count, -(-rank // count)


def _in_blocks(
    matrices: dict[str, Array], axes: dict[str, int], block_size: int | None
) -> tuple[dict[str, Array], dict[str, int]]:
    """Stacks of blocks of rows, filled up with zeros, and where their rows stand."""
    cut_up, within = dict(matrices), dict(axes)
    for path, matrix in matrices.items():
        axis = axes[path]
        count, size = _blocks(matrix, axis, block_size)
        if count > 1:
            filled = [(0, 0)] * matrix.ndim
            filled[axis] = (0, count * size - matrix.shape[axis])
            shape = (*matrix.shape[:axis], count, size, *matrix.shape[axis + 1 :])
            cut_up[path] = jnp.pad(matrix, filled).reshape(shape)
            within[path] = axis + 1
    return cut_up, within


def _joined(
    blocks: dict[str, Array], matrices: dict[str, Array], axes: dict[str, int]
) -> dict[str, Array]:
    """The inverse of ``_in_blocks`` for matrices that were cut."""
    found = {}
    for path, matrix in matrices.items():
        axis, rank = axes[path], matrix.shape[axes[path]]
        shape = (*matrix.shape[:axis], -1, *matrix.shape[axis + 1 :])
        found[path] = lax.slice_in_dim(blocks[path].reshape(shape), 0, rank, axis=axis)
    return found


def _in_units(
    matrices: dict[str, Array], axes: dict[str, int], units: dict[str, Array]
) -> dict[str, Array]:
    """The matrices, lying, divided by units with as many axes as they have."""
    return {
        path: _lying(matrix / jnp.where(units[path] == 0, 1, units[path]), axes[path])
        for path, matrix in matrices.items()
    }


def _grams(lying: dict[str, Array], axes: dict[str, int]) -> dict[str, Array]:
    """``F F^T`` of each matrix."""
    found = {}
    for path, matrix in lying.items():
        axis = axes[path]
        stack, behind = tuple(range(axis)), tuple(range(axis + 1, matrix.ndim))
        found[path] = _product(matrix, matrix, ((behind, behind), (stack, stack)))
    return found


def _turned(
    matrices: dict[str, Array],
    axes: dict[str, int],
    lying: dict[str, Array],
    grams: dict[str, Array],
) -> dict[str, Array]:
    """``G^(-1/2) F`` of each matrix, in its own shape."""
    kinds: dict[tuple[int, jnp.dtype], dict[str, Array]] = {}
    for path, gram in grams.items():
        kinds.setdefault((gram.shape[-1], gram.dtype), {})[path] = gram
    turned = {}
    for (short, _), members in kinds.items():
        flat = [gram.reshape(-1, short, short) for gram in members.values()]
        whole = jnp.concatenate(flat)
        # A diagonal of a Gram matrix, so never below zero; NaN compares false.
        never = whole[0, 0, 0] < 0
        sizes = [gram.shape[0] for gram in flat]
        roots = cut(_inverse_root(whole), sizes, never)
        for (path, gram), root in zip(members.items(), roots, strict=True):
            root, axis = root.reshape(gram.shape), axes[path]
            stack = tuple(range(axis))
            one = _product(root, lying[path], (((axis + 1,), (axis,)), (stack, stack)))
            turned[path] = _standing(one, matrices[path].shape, axis)
    return {path: turned[path] for path in matrices}


def _inverse_root(gram: Array) -> Array:
    """``G^(-1/2)`` of a stack of Gram matrices, zero where one is."""
    gram, scale = _divided(gram, jnp.trace(gram, axis1=1, axis2=2))
    # The first product says more of the largest eigenvalue than the trace does.
    square = matmul(gram, gram)
    gram, nearer = _divided(gram, jnp.sum(square**2, axis=(1, 2)) ** 0.25)
    first, *others = POLYNOMIALS
    root = step = polynomial(first, gram, square / nearer**2)
    for coefficients in others:
        # Everything here is a polynomial of one symmetric matrix, so all of it commutes.
        gram = matmul(matmul(step, gram), step)
        step = polynomial(coefficients, gram, matmul(gram, gram))
        root = matmul(step, root)
    return root / jnp.sqrt(scale * nearer)


def _divided(matrix: Array, size: Array) -> tuple[Array, Array]:
    """Matrices divided by their sizes, or by one where a size is zero."""
    size = jnp.where(size > 0, size, 1)[:, None, None]
    return matrix / size, size


def _largest(matrix: Array, axis: int) -> Array:
    """The largest entry of each matrix, its axes kept with size 1."""
    return jnp.max(jnp.abs(matrix), axis=tuple(range(axis, matrix.ndim)), keepdims=True)


def _lying(matrix: Array, axis: int) -> Array:
    """The matrix, turned if it has more rows than columns."""
    rows, columns = _sizes(matrix, axis)
    if columns >= rows:
        return matrix
    return matrix.reshape(*matrix.shape[: axis + 1], columns).mT


def _standing(matrix: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of ``_lying`` for a matrix that had a shape."""
    rows, columns = shape[axis], math.prod(shape[axis + 1 :])
    return matrix if columns >= rows else matrix.mT.reshape(shape)


def _sizes(matrix: Array, axis: int) -> tuple[int, int]:
    return matrix.shape[axis], math.prod(matrix.shape[axis + 1 :])


def _product(left: Array, right: Array, dims: Any) -> Array:
    return lax.dot_general(left, right, dims, precision=lax.Precision.HIGHEST)
