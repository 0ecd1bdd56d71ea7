"""The one matrix factorisation there is, at rank x rank, safe on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


# On CPU one matrix at a time: a batched LAPACK call waits on the thread pool it runs on,
# and as many of them as there are threads, one per stacked leaf, wait for ever.
@jax.jit
def inverse_cholesky(gram: Array) -> Array:
    """L^-1 with L L^T = gram; batch with ``jax.vmap``.

    Args:
      gram: Positive definite array ``(rank, rank)``.

    Returns:
      Lower triangular array ``(rank, rank)``; NaN where the Gram matrix is singular.
    """
    one_by_one = jax.custom_batching.sequential_vmap(_inverse)
    return lax.platform_dependent(gram, cpu=one_by_one, default=_inverse)


def _inverse(gram: Array) -> Array:
    lower = jnp.linalg.cholesky(gram)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
