"""Adding a small delta to low-precision weights without losing it.

All arithmetic is done on float32 bit patterns: rounding there is explicit, while a cast
to bfloat16 and back may be optimised away by the compiler.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def is_low(dtype: Any) -> bool:
    """Whether a dtype is a real float below float32."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def nearest(exact: Array, dtype: Any) -> Array:
    """float32 values rounded to the grid of a dtype, still as float32."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(exact, int(info.nexp), int(info.nmant))


def stochastic(exact: Array, dtype: Any, key: Array) -> Array:
    """One of the two neighbours on the grid of a dtype, right on average.

    ``E[result] = exact`` for values in the normal range of ``dtype``. Adding random bits
    below the last kept one and cutting them off draws the upper neighbour with a
    probability equal to the distance from the lower.

    Args:
      exact: float32 array.
      dtype: A float dtype below float32.
      key: Key for the draw.

    Returns:
      float32 array of values on the grid of ``dtype``; not-finite values stay.
    """
    drop = _dropped_bits(dtype)
    noise = jax.random.bits(key, exact.shape, jnp.uint32) >> (32 - drop)
    bits = lax.bitcast_convert_type(exact, jnp.uint32)
    drawn = _toward_zero(lax.bitcast_convert_type(bits + noise, jnp.float32), dtype)
    return jnp.where(jnp.isfinite(exact), drawn, exact)


def settle(exact: Array, dtype: Any, rounding: str, key: Array) -> Array:
    """Wide values brought to the grid of a weight's dtype, as a spec says.

    Args:
      exact: Array in the wider dtype.
      dtype: Dtype of the weights; from float32 up nothing is rounded.
      rounding: ``"auto"`` or ``"stochastic"`` to draw a neighbour, ``"nearest"`` or
        ``"master"`` (where the exact value is kept elsewhere) to take the nearest.
      key: Key for the draw.

    Returns:
      Array in the dtype of ``exact``, to be cast by the caller.
    """
    if not is_low(dtype):
        return exact
    if rounding in ("auto", "stochastic"):
        return stochastic(exact, dtype, key)
    return nearest(exact, dtype)


def landing_update(weight: Array, target: Array, dtype: Any, key: Array) -> Array:
    """The update that ``optax.apply_updates`` turns into a given new weight.

    In float32 the difference lands exactly. In 16 bits it does wherever the weight stays
    within a factor of two; elsewhere one of the two updates around it is drawn so that
    the weight is right on average.

    Args:
      weight: Weights in a dtype below float32.
      target: The new weights: float32 values on the grid of ``weight.dtype``.
      dtype: Dtype the update must have.
      key: Key for the draw.

    Returns:
      Array of ``dtype``.
    """
    wide = weight.astype(jnp.float32)
    step = target - wide
    if not is_low(dtype):
        return step.astype(dtype)
    inner = _toward_zero(step, dtype)
    bits = lax.bitcast_convert_type(inner, jnp.uint32) + jnp.uint32(
        1 << _dropped_bits(dtype)
    )
    outer = jnp.where(inner == step, step, lax.bitcast_convert_type(bits, jnp.float32))
    at_inner = nearest(wide + inner, weight.dtype)
    at_outer = nearest(wide + outer, weight.dtype)
    reach = at_outer - at_inner
    share = jnp.where(reach == 0, 0.0, (target - at_inner) / reach)
    take_outer = jax.random.uniform(key, step.shape) < share
    update = jnp.where(take_outer, outer, inner)
    return jnp.where(jnp.isfinite(step), update, step).astype(dtype)


def _dropped_bits(dtype: Any) -> int:
    """How many of float32's mantissa bits a dtype lacks."""
    return int(jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant)


def _toward_zero(exact: Array, dtype: Any) -> Array:
    """float32 values cut to the mantissa of a dtype."""
    keep = jnp.uint32(0xFFFFFFFF << _dropped_bits(dtype) & 0xFFFFFFFF)
    bits = lax.bitcast_convert_type(exact, jnp.uint32)
    return lax.bitcast_convert_type(bits & keep, jnp.float32)
