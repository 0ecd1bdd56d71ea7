"""The one matrix factorisation there is, at rank x rank, by plain array operations.

No LAPACK: on CPU a batched call waits on the thread pool it runs on, and as many of them
as there are threads wait for ever; on accelerators a small one is a slow library call.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

# Up to this size elimination beats splitting into blocks.
_BLOCK = 16


def inverse_cholesky(gram: Array) -> Array:
    """L^-1 with L L^T = gram.

    Args:
      gram: Positive definite array ``(..., rank, rank)``.

    Returns:
      Lower triangular array of the same shape; where a Gram matrix is singular its
      diagonal is huge, infinite or NaN.

    Example:
      >>> inverse_cholesky(jnp.array([[4.0, 2.0], [2.0, 2.0]])).tolist()
      [[0.5, 0.0], [-0.5, 1.0]]
    """
    rank = gram.shape[-1]
    if rank <= _BLOCK:
        return _eliminate(gram)
    # Of [[A, .], [B, C]]: X = A^-1/2 and Y of what A leaves of C are on the diagonal.
    half = -(-rank // 2)
    X = inverse_cholesky(gram[..., :half, :half])
    T = _matmul(gram[..., half:, :half], X.mT)
    Y = inverse_cholesky(gram[..., half:, half:] - _matmul(T, T.mT))
    lower = -_matmul(Y, _matmul(T, X))
    upper = jnp.zeros_like(lower.mT)
    return jnp.concatenate(
        [jnp.concatenate([X, upper], -1), jnp.concatenate([lower, Y], -1)], -2
    )


def _eliminate(gram: Array) -> Array:
    """Gaussian elimination of [gram, I] without pivots, in place.

    Before step k the columns up to k hold those of L^-1, where it has zeros the ones of
    L^T; the others what is left of the Gram matrix.
    """
    rank = gram.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, gram.shape, gram.ndim - 2)
    col = lax.broadcasted_iota(jnp.int32, gram.shape, gram.ndim - 1)

    def step(k: Array, left: Array) -> Array:
        pivot_row = lax.dynamic_index_in_dim(left, k, -2)
        pivot_col = lax.dynamic_index_in_dim(left, k, -1)
        pivot = lax.dynamic_index_in_dim(pivot_row, k, -1)
        scale = 1 / jnp.sqrt(pivot)
        # A step of Newton's: on some processors XLA's own is good to 14 bits only.
        scale = scale + scale * (1 - pivot * scale * scale) / 2
        pivot_row = jnp.where(col[..., :1, :] == k, scale, scale * pivot_row)
        pivot_col = jnp.where(row[..., :1] > k, scale * pivot_col, 0)
        # In place: column k of the Gram matrix is done, and the inverse's begins.
        kept = jnp.where((col == k) & (row > k), 0, left)
        return jnp.where(row == k, pivot_row, kept - pivot_col * pivot_row)

    return jnp.tril(lax.fori_loop(0, rank, step, gram))


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
