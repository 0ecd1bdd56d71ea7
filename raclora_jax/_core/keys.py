"""Keys: (key data, domain, path, words) in, threefry keys out."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core.bits import cipher, mixed
from raclora_jax._core.checks import kind

# Named, since the default is a flag of the process and the others draw other bits.
_IMPL = "threefry2x32"


def key_data(key: Any) -> Array:
    """The two words a chain's randomness starts from.

    Args:
      key: A typed threefry key, raw threefry key data of shape (2,), or an int seed.

    Returns:
      uint32 array of shape (2,).

    Raises:
      TypeError: If there is no key, or the value is no key.
      ValueError: If the key is not a single threefry key.

    Example:
      >>> key_data(7).tolist()
      [0, 7]
    """
    is_array, is_int = hasattr(key, "dtype"), hasattr(key, "__index__")
    if isinstance(key, bool) or not (is_array or is_int):
        raise TypeError(
            f"key must be a jax key or an int seed, got {kind(key)}; pass "
            "key=jax.random.key(0)"
        )
    if not is_array:
        return _seed(operator.index(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(key))
        if impl != _IMPL or key.shape != ():
            raise ValueError(
                f"key must be one {_IMPL} key, got impl {impl} of shape {key.shape}; "
                f"pass jax.random.key(0, impl={_IMPL!r})"
            )
        return jax.random.key_data(key)
    if key.dtype == jnp.uint32 and key.shape == (2,):
        return jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ():
        return _seed(key)
    raise ValueError(
        f"key must be one {_IMPL} key: a typed key, uint32 data of shape (2,), or an "
        f"int seed; got {key.dtype} of shape {key.shape}; pass key=jax.random.key(0)"
    )


def _seed(seed: Any) -> Array:
    """What ``jax.random.key`` makes of a seed of 32 bits, whether x64 is on or off."""
    if not isinstance(seed, jax.core.Tracer) and not 0 <= int(seed) < 2**32:
        raise ValueError(
            f"an int as key must be between 0 and 2**32 - 1, got {seed}: JAX reads "
            "other seeds differently when x64 is on; pass key=jax.random.key(seed)"
        )
    return jnp.stack([jnp.uint32(0), jnp.asarray(seed, jnp.uint32)])


def leaf_key(data: Array, domain: str, path: str) -> Array:
    """The key of one leaf for one purpose, whatever else the tree holds.

    Args:
      data: Key data of the chain, uint32 of shape (2,).
      domain: What the key is for, such as ``"sketch"``.
      path: Canonical path of the leaf.

    Returns:
      A typed key.
    """
    return folded(data, jnp.array(path_words(domain, path), jnp.uint32)[:, None])[0]


def step_keys(
    data: Array, domain: str, names: Iterable[str], count: Array | int
) -> dict[str, Array]:
    """Keys of some leaves for one purpose in one step.

    A cipher for the step, and of a leaf no more than a hash of its name.

    Args:
      data: Key data of the chain, uint32 of shape (2,).
      domain: What the keys are for.
      names: Canonical paths.
      count: Count of the step, an integer scalar.

    Returns:
      ``{path: typed key}``.
    """
    words = {path: path_words(domain, path) for path in names}
    if not words:
        return {}
    high, low = jax.random.key_data(_step_key(data, count, path_words(domain, "")))
    return {
        path: _typed((mixed(high ^ jnp.uint32(one)), mixed(low ^ jnp.uint32(other))))
        for path, (one, other) in words.items()
    }


# Traced and lowered once, however many places of a program ask for it.
@functools.partial(jax.jit, static_argnums=2)
def _step_key(data: Array, count: Array | int, words: tuple[int, int]) -> Array:
    key = cipher((data[0], data[1]), *map(jnp.uint32, words))
    return _typed(cipher(key, jnp.uint32(0), jnp.asarray(count).astype(jnp.uint32)))


@jax.jit
def folded(data: Array, words: Array) -> Array:
    """The keys that start from ``data`` and take in the words of a column in turn."""
    key = data[0], data[1]
    for row in words:
        key = cipher(key, jnp.zeros_like(row), row)
    return _typed(key)


def _typed(words: tuple[Array, Array]) -> Array:
    return jax.random.wrap_key_data(jnp.stack(words, axis=-1), impl=_IMPL)


@functools.lru_cache(maxsize=4096)
def path_words(domain: str, path: str) -> tuple[int, int]:
    # Not hash(), which differs from process to process. Two words, since a key takes in
    # 32 bits at a time, and of many paths two may meet in 32.
    digest = hashlib.blake2b(f"{domain}\0{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
