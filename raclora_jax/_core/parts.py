"""A stack cut into the parts of many leaves, in a program that compiles fast."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def cut(stack: Array, sizes: Sequence[int], never: Array) -> list[Array]:
    """Consecutive parts of a stack along its first axis.

    A slice at a place of its own is a kernel of its own, and on a CPU kernels take longer
    to compile than all else. Slices that are told their place when they run are one
    kernel, so there the places come out of a branch, which the compiler does not see
    through.

    Args:
      stack: Array ``(sum of sizes, ...)``.
      sizes: How long each part is.
      never: Bool scalar that is false, known only when the program runs.

    Returns:
      The parts.
    """
    if len(sizes) == 1:
        return [stack]
    starts = list(itertools.accumulate(sizes[:-1], initial=0))

    def known() -> list[Array]:
        return [jnp.int32(start) for start in starts]

    def told() -> list[Array]:
        return lax.cond(never, lambda: [jnp.int32(0) for _ in starts], known)

    places = lax.platform_dependent(cpu=told, default=known)
    return [
        lax.dynamic_slice_in_dim(stack, place, size)
        for place, size in zip(places, sizes, strict=True)
    ]
