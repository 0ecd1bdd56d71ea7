"""A number that tells an array's bits, the same on every mesh."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from raclora_jax._core.types import Leaf, Leaves

# Odd, so that multiplying by them loses no bit: the finaliser of MurmurHash3.
_MIX = (0x85EBCA6B, 0xC2B2AE35)


def digests(leaves: Leaves) -> dict[str, int]:
    """``sum_i mix(mix(i) + bits_i) mod 2^32`` of each leaf, ``i`` its row-major index.

    A sum of integers that wraps does not depend on its order, so neither does a digest on
    devices, mesh or process count. It finds accidents, not forgeries: another array has
    the same one with probability ``2^-32``.

    Args:
      leaves: ``{path: array}``; typed keys are read as their data.

    Returns:
      ``{path: digest}``, on the host of every process.

    Example:
      >>> found = digests({"a": jnp.arange(3), "b": jnp.arange(3)[::-1]})
      >>> found["a"] == found["b"]
      False
    """
    sums = {path: _sum(leaf) for path, leaf in leaves.items()}
    return {path: int(value) for path, value in jax.device_get(sums).items()}


def _sum(leaf: Leaf) -> Array:
    if not hasattr(leaf, "dtype"):
        leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        # Times an odd number: a plain sum would be the same with both parts traded.
        return _sum(leaf.real) + jnp.uint32(_MIX[0]) * _sum(leaf.imag)
    if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize == 8:
        # In words as on a device, since a device may have no 64 bits.
        leaf = np.ascontiguousarray(leaf)[..., None].view(np.uint32)
    return _digest(jnp.asarray(leaf))


@jax.jit
def _digest(leaf: Array) -> Array:
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    width = min(jax.dtypes.itemsize_bits(leaf.dtype), 32)
    # Eight bytes become two words along a last axis of their own.
    words = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
    words = words.astype(jnp.uint32)
    mixed = _mix(_mix(_positions(words)) + words)
    return jnp.sum(mixed, dtype=jnp.uint32)


def _positions(words: Array) -> Array:
    """The row-major index of every word, made where the word lives."""
    index = jnp.zeros((), jnp.uint32)
    # One iota for each axis, so that a shard makes its own places; a long arange that is
    # reshaped may be made whole first.
    for axis, size in enumerate(words.shape):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        along = lax.iota(jnp.uint32, size) * jnp.uint32(stride)
        others = [other for other in range(words.ndim) if other != axis]
        index = index + lax.expand_dims(along, others)
    return index


def _mix(words: Array) -> Array:
    for factor, shift in zip(_MIX, (13, 16), strict=True):
        words = words * jnp.uint32(factor)
        words = words ^ (words >> np.uint32(shift))
    return words
