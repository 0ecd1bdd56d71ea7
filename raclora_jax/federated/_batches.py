"""Which examples a local step sees: random reshuffling."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def reshuffled(
    key: Array, rows: int, count: Array | int, steps: int, batch_size: int
) -> Array:
    """Which rows each local step takes, int32 ``(steps, batch_size)``.

    Each pass takes the first ``count`` rows in an order of its own; those that fill no
    batch wait for the next.
    """
    static = not isinstance(count, jax.core.Tracer)
    # At least one: a client with fewer examples than a batch takes some of them twice.
    per_pass = jnp.maximum(jnp.asarray(count) // batch_size, 1)
    # How many passes a traced count needs is not known; one batch a pass at the worst.
    most = steps
    if static:
        most = math.ceil(steps / max(int(count) // batch_size, 1))
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(most))
    # The process-wide flag changes the bits of every draw, and a run is to repeat.
    with jax.threefry_partitionable(True):
        bits = jax.vmap(lambda key: jax.random.bits(key, (rows,), jnp.uint32))(keys)
    # Rows are sorted by 31 random bits. Padding has the largest word of 32: it is last,
    # and no row ties with it.
    padding = jnp.arange(rows) >= count
    orders = jnp.argsort(jnp.where(padding, jnp.uint32(2**32 - 1), bits >> 1), axis=1)
    step = jnp.arange(steps)[:, None]
    place = (step % per_pass) * batch_size + jnp.arange(batch_size)
    return orders[step // per_pass, place % jnp.maximum(count, 1)].astype(jnp.int32)
