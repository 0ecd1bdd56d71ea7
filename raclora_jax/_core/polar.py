"""Odd polynomials of a matrix by its Gram matrix, in full precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def polynomial(coefficients: Iterable[Any], gram: Array, square: Array) -> Array:
    """``p(x) / x`` of ``p = a x + b x^3 + c x^5`` as a function of ``x^2``.

    Args:
      coefficients: Three numbers.
      gram: Array ``(..., rank, rank)``, in the place of ``x^2``.
      square: Its square.

    Returns:
      Array of the same shape.
    """
    a, b, c = coefficients
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)[(None,) * (gram.ndim - 2)]
    return a * eye + b * gram + c * square


def matmul(left: Array, right: Array) -> Array:
    """A product in full precision."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
