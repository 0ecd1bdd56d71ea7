"""Adding a small delta to low-precision weights without losing it.

All arithmetic is done on float32 bit patterns: rounding there is explicit, while a cast
to bfloat16 and back may be optimised away by the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from raclora_jax._core.bits import hashed
from raclora_jax._core.types import is_number


def is_low(dtype: DTypeLike) -> bool:
    """Whether a dtype is a real float below float32."""
    if isinstance(dtype, str) and not is_number(dtype):
        return False
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def nearest(exact: Array, dtype: DTypeLike) -> Array:
    """float32 values rounded to the grid of a dtype, still as float32."""
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(exact, int(info.nexp), int(info.nmant))
    # reduce_precision takes subnormal numbers to zero; float32 has room for float16's.
    return _where_subnormal(exact, dtype, jnp.round, rounded)


# Traced once for all weights of one shape.
@functools.partial(jax.jit, static_argnames="dtype")
def stochastic(
    exact: Array, dtype: DTypeLike, key: Array, positions: Array | None = None
) -> Array:
    """One of the two neighbours on the grid of a dtype, right on average.

    ``E[result] = exact``: the neighbour away from zero is drawn with a probability equal
    to the distance from the other one, in units of the gap.

    Args:
      exact: float32 array.
      dtype: A float dtype below float32.
      key: Key for the draw.
      positions: uint32 like ``exact``, which draw each number takes; its own place in
        the array if not given.

    Returns:
      float32 array of values on the grid of ``dtype``; not-finite values stay.
    """
    noise = _hash(key, places_of(exact.shape) if positions is None else positions)
    low = jnp.uint32(_ulp(dtype) - 1)
    bits = lax.bitcast_convert_type(exact, jnp.uint32)
    # Adding noise below the last kept place carries into it as often as it should.
    drawn = lax.bitcast_convert_type((bits + (noise & low)) & ~low, jnp.float32)
    share = _fraction(noise)
    drawn = _where_subnormal(
        exact, dtype, lambda x: jnp.sign(x) * jnp.floor(jnp.abs(x) + share), drawn
    )
    # Beyond the largest number there is no second neighbour to draw.
    inside = jnp.abs(exact) <= float(jnp.finfo(dtype).max)
    return jnp.where(inside, drawn, nearest(exact, dtype))


def integers(exact: Array, key: Array) -> Array:
    """One of the two integers around float32 values, right on average."""
    return jnp.floor(exact + _fraction(_hash(key, places_of(exact.shape))))


def settle(
    exact: Array,
    dtype: DTypeLike,
    rounding: str,
    key: Array,
    positions: Array | None = None,
) -> Array:
    """Wide values brought to the grid of a weight's dtype, as a spec says.

    Args:
      exact: Array in the wider dtype.
      dtype: Dtype of the weights; from float32 up nothing is rounded.
      rounding: ``"auto"`` or ``"stochastic"`` to draw a neighbour, ``"nearest"`` or
        ``"master"`` (where the exact value is kept elsewhere) to take the nearest.
      key: Key for the draw.
      positions: As in ``stochastic``.

    Returns:
      Array in the dtype of ``exact``, to be cast by the caller.
    """
    if not is_low(dtype):
        return exact
    if rounding in ("auto", "stochastic"):
        return stochastic(exact, jnp.dtype(dtype), key, positions)
    return nearest(exact, dtype)


def landing_update(weight: Array, target: Array, dtype: DTypeLike, key: Array) -> Array:
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
    inner, outer = _neighbours(step, dtype)
    at_inner = nearest(wide + inner, weight.dtype)
    at_outer = nearest(wide + outer, weight.dtype)
    update = _draw(target, (at_inner, at_outer), (inner, outer), key)
    return jnp.where(jnp.isfinite(step), update, step).astype(dtype)


def _draw(
    target: Array,
    landings: tuple[Array, Array],
    choices: tuple[Array, Array],
    key: Array,
) -> Array:
    """The choice that lands on one of two points around a target, right on average."""
    near, far = landings
    reach = far - near
    on_grid = reach == 0
    share = jnp.where(on_grid, 0.0, (target - near) / jnp.where(on_grid, 1.0, reach))
    takes_far = _fraction(_hash(key, places_of(target.shape))) < share
    return jnp.where(takes_far, choices[1], choices[0])


def places_of(shape: tuple[int, ...]) -> Array:
    """The place of every number of an array, in order."""
    count = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        count = count * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return count


def _hash(key: Array, places: Array) -> Array:
    """32 bits per weight for rounding, of its place and a key."""
    words = jax.random.key_data(key)
    return hashed((words[0], words[-1]), places)


def _fraction(bits: Array) -> Array:
    """Random bits as a number in [0, 1)."""
    # 24 bits are what a float32 holds: 32 of them could round up to 1.
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _neighbours(exact: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """The points of a dtype's grid next to float32 values, towards and away from zero.

    Equal where the value is on the grid. Cutting mantissa bits goes towards zero, and
    adding one in the last kept place goes to the next number.
    """
    ulp = _ulp(dtype)
    bits = lax.bitcast_convert_type(exact, jnp.uint32)
    cut = bits & jnp.uint32(0xFFFFFFFF ^ (ulp - 1))
    inner = lax.bitcast_convert_type(cut, jnp.float32)
    outer = lax.bitcast_convert_type(cut + jnp.uint32(ulp), jnp.float32)
    inner = _where_subnormal(exact, dtype, jnp.trunc, inner)
    outer = _where_subnormal(exact, dtype, _away, outer)
    return inner, jnp.where(inner == exact, exact, outer)


def _ulp(dtype: DTypeLike) -> int:
    """The last kept place of a dtype's mantissa, as a float32's bits count it."""
    return 1 << int(jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant)


def _away(values: Array) -> Array:
    return jnp.trunc(values) + jnp.sign(values)


def _where_subnormal(
    exact: Array, dtype: DTypeLike, integer: Callable[[Array], Array], otherwise: Array
) -> Array:
    """Puts values too small for a dtype's exponent on its even grid of subnormals."""
    info = jnp.finfo(dtype)
    if info.nexp == jnp.finfo(jnp.float32).nexp:
        return otherwise  # bfloat16 and float32 are subnormal alike
    spacing = float(info.smallest_subnormal)
    small = jnp.abs(exact) < float(info.smallest_normal)
    return jnp.where(small, integer(exact / spacing) * spacing, otherwise)
