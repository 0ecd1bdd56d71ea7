"""Random bits by place: a cipher for keys and sketches, a hash for rounding.

Both are plain arithmetic on words, computed where they are used: what a place gets does
not depend on how many places there are, where they are computed or what else is.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Rounds of a shuffle. By their reference some 6 log2 of the size let no test tell an
# order from a uniform one that has all of it; here a handful of its places is seen.
_ROUNDS = 40


def cipher(key: tuple[Array, Array], high: Array, low: Array) -> tuple[Array, Array]:
    """Threefry-2x32 of 20 rounds: two words of key and two of place in, two words out.

    What ``jax.random`` draws from, written as one expression: on a CPU it compiles faster
    than JAX's loop, and it is fused with what makes numbers of its bits.

    Args:
      key: Two uint32 arrays.
      high: uint32 array.
      low: uint32 array, all four of shapes that broadcast.

    Returns:
      Two uint32 arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> words = jnp.zeros((2, 2), jnp.uint32)
      >>> [hex(int(word)) for word in cipher(tuple(words[0]), *words[1])]
      ['0x6b200159', '0x99ba4efe']

    References:
      Salmon et al., `Parallel random numbers: as easy as 1, 2, 3
      <https://doi.org/10.1145/2063384.2063405>`_, 2011.
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    high, low = high + words[0], low + words[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            high = high + low
            low = high ^ ((low << turn) | (low >> (32 - turn)))
        high = high + words[(group + 1) % 3]
        low = low + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return high, low


def bits(key: tuple[Array, Array], high: Array, low: Array) -> Array:
    """One word a place: both of ``cipher`` in one."""
    one, other = cipher(key, high, low)
    return one ^ other


def normal(bits: Array) -> Array:
    """Standard normal float32 numbers of uint32 bits, by the inverse of their law."""
    # 23 bits between -1 and 1, in the middle of their intervals: neither end is one.
    unit = (bits >> 9).astype(jnp.float32) * jnp.float32(2**-22) + (2**-23 - 1)
    return jnp.float32(2**0.5) * lax.erf_inv(unit)


def hashed(key: tuple[Array, Array], places: Array) -> Array:
    """32 bits per place: a hash of it and of a key that a cipher made.

    A cipher per weight would take longer than the step itself.
    """
    return mixed(mixed(places ^ key[0]) + key[1])


def mixed(bits: Array) -> Array:
    """A bijection of 32 bits in which every bit depends on every bit.

    Wellons, `Hash function prospector <https://github.com/skeeto/hash-prospector>`_.
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def shuffled(key: tuple[Array, Array], places: Array, sizes: Array) -> Array:
    """Where a random order of ``0 ... size - 1`` puts a place; no sort, no table.

    A round pairs all places by a drawn reflection and swaps each pair or not. What is
    left of their old order after 40 rounds is turned by a drawn number, so that every
    place is exactly as likely as any other.

    Args:
      key: Two uint32 arrays, one key per order.
      places: uint32 array, below ``sizes``.
      sizes: uint32 array, all of shapes that broadcast.

    Returns:
      uint32 array; of one key and size, distinct for distinct places.

    References:
      Hoang et al., `An enciphering scheme based on a card shuffle
      <https://arxiv.org/abs/1208.1176>`_, 2012.
    """

    def turn(at: Array, round: Array) -> tuple[Array, None]:
        mirror, salt = hashed(key, 2 * round), hashed(key, 2 * round + 1)
        partner = (mirror % sizes + sizes - at) % sizes
        swap = mixed(jnp.maximum(at, partner) ^ salt) >> 31 == 1
        return jnp.where(swap, partner, at), None

    rounds = jnp.arange(_ROUNDS, dtype=jnp.uint32)
    shape = jnp.broadcast_shapes(*(jnp.shape(one) for one in (*key, places, sizes)))
    at, _ = lax.scan(turn, jnp.broadcast_to(places, shape), rounds)
    return (at + hashed(key, jnp.uint32(2 * _ROUNDS)) % sizes) % sizes
