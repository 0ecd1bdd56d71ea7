"""The numbers of a message in fewer bits, rounded before anyone applies them."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.rounding import integers, settle

Numbers = Literal["float32", "bfloat16", "int8"]
NUMBERS: tuple[str, ...] = get_args(Numbers)
_MOST = 127


class Packed(NamedTuple):
    """A factor as it is sent.

    Attributes:
      numbers: Its numbers, times the scaling of the leaf.
      scales: What one is worth in each row, ``(batch..., rank)``, where they have 8 bits.
      finite: Whether all numbers are.
      moves: Whether one is not zero.
    """

    numbers: Array
    scales: Array | None
    finite: Array
    moves: Array


@functools.partial(jax.jit, static_argnames=("plan", "numbers"))
def packed(value: Array, key: Array, plan: LeafPlan, numbers: str) -> Packed:
    """A factor as it is sent; what is rounded is right on average.

    Args:
      value: Array of ``plan.factor_shape``.
      key: Key for rounding.
      plan: Plan of one side.
      numbers: As in ``encode``.

    Returns:
      The numbers, and what is known of them.
    """
    exact = (plan.scaling * value).astype(jnp.float32)
    finite, moves = jnp.all(jnp.isfinite(exact)), jnp.any(exact != 0)
    if numbers == "float32":
        return Packed(exact, None, finite, moves)
    if numbers == "bfloat16":
        drawn = settle(exact, jnp.bfloat16, "stochastic", key)
        return Packed(drawn.astype(jnp.bfloat16), None, finite, moves)
    kept = range(-len(plan.kept_axes), 0)
    largest = jnp.max(jnp.abs(exact), axis=tuple(kept))
    # Up to the next bfloat16, so that 127 of them reach the largest number.
    bits = lax.bitcast_convert_type(largest / _MOST, jnp.uint32) + jnp.uint32(0xFFFF)
    scales = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    wide = lax.expand_dims(scales, kept)
    drawn = integers(jnp.where(wide > 0, exact / jnp.where(wide > 0, wide, 1), 0), key)
    codes = jnp.clip(drawn, -_MOST, _MOST).astype(jnp.int8)
    return Packed(codes, scales.astype(jnp.bfloat16), finite, moves)
