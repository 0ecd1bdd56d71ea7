"""How a leaf lies in a checkpoint, and how it comes back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from raclora_jax._core import paths
from raclora_jax._core.planning import shape_and_dtype
from raclora_jax._core.types import Leaf


def described(path: str, leaf: Leaf) -> tuple[tuple[int, ...], str]:
    """Shape and dtype; numpy's 64 bits are what they are, whatever JAX holds."""
    own = getattr(leaf, "dtype", None)
    try:
        if own == jax.dtypes.float0 or isinstance(leaf, np.ma.MaskedArray):
            raise TypeError("some of its numbers are none")
        shape, dtype = shape_and_dtype(path, leaf)
    except TypeError as error:
        got = type(leaf).__name__ if own is None else f"{own} in {type(leaf).__name__}"
        raise TypeError(
            f"leaf {paths.show(path)} must be an array of numbers, got {got}; take it "
            "out of the state, and give positions in the data as data="
        ) from error
    return shape, dtype if own is None else str(own)


def stored(path: str, leaf: Leaf) -> Array | np.ndarray:
    """A leaf as orbax is to write it: an array, of a dtype that files have.

    Raises:
      ValueError: If a number of Python's does not fit the dtype that JAX gives it.
    """
    if not isinstance(leaf, jax.Array):
        leaf = _in_numpy(path, leaf)
    # A copy: JAX may read numpy's memory later than the run writes to it.
    return _bits(jnp.array(leaf)) if _is_small(leaf.dtype) else leaf


def target(leaf: Leaf) -> Any:
    """What orbax reads a leaf into: an abstract array, or numpy where nothing says."""
    dtype, home = jnp.result_type(leaf), getattr(leaf, "sharding", None)
    if _is_wide(leaf):
        return np.zeros(leaf.shape, leaf.dtype)
    if home is None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        home = jnp.zeros(()).sharding
    dtype = jnp.dtype(jnp.uint8) if _is_small(dtype) else dtype
    if home is None:
        return np.zeros(jnp.shape(leaf), dtype)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=home)


def loaded(read: Array | np.ndarray, like: Leaf) -> Array | np.ndarray:
    """What was read into ``target``, as the leaf it was; numpy where JAX has no such."""
    if _is_wide(like):
        return np.asarray(read)
    dtype = jnp.result_type(like)
    return _numbers(jnp.asarray(read), dtype) if _is_small(dtype) else jnp.asarray(read)


def zeros(like: Leaf) -> Array | np.ndarray:
    """Zeros of a leaf's shape and dtype, where it sits."""
    if _is_wide(like):
        return np.zeros(like.shape, like.dtype)
    return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))


def is_empty(leaf: Leaf) -> bool:
    """Whether a leaf has no number in it, which orbax would refuse to save."""
    return math.prod(jnp.shape(leaf)) == 0


def _in_numpy(path: str, leaf: Leaf) -> np.ndarray:
    _, dtype = described(path, leaf)
    if hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    try:
        with np.errstate(over="ignore"):
            number = np.array(leaf, dtype)
        fits = np.isclose(number, np.asarray(leaf), rtol=1e-6, atol=0, equal_nan=True)
    except OverflowError:
        fits = False
    if not fits:
        raise ValueError(
            f"leaf {paths.show(path)}: {leaf!r} does not fit {dtype}, which JAX makes of "
            "it; hand over a numpy array of 64 bits, which comes back as it is"
        )
    return number


def _is_wide(leaf: Leaf) -> bool:
    """Whether a leaf has 64 bits that JAX, as it is set, would cut."""
    dtype = getattr(leaf, "dtype", None)
    return isinstance(dtype, np.dtype) and jax.dtypes.canonicalize_dtype(dtype) != dtype


def _is_small(dtype: Any) -> bool:
    """Whether a dtype is one of those of at most 8 bits that not all files have."""
    plain = (jnp.bool_, jnp.int8, jnp.uint8)
    return (
        not jnp.issubdtype(dtype, jax.dtypes.extended)
        and jax.dtypes.itemsize_bits(dtype) <= 8
        and dtype not in plain
    )


def _bits(leaf: Array) -> Array:
    return lax.bitcast_convert_type(leaf, _word(leaf.dtype)).astype(jnp.uint8)


def _numbers(bits: Array, dtype: Any) -> Array:
    return lax.bitcast_convert_type(bits.astype(_word(dtype)), dtype)


def _word(dtype: Any) -> str:
    return f"uint{jax.dtypes.itemsize_bits(dtype)}"
