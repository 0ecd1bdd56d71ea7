"""Eight fake CPU devices for every test, so that sharded runs can be compared."""

import gc
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Nearly all the time of a test is that of the compiler, which need not try hard.
FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Compiled in parallel, a program has not the same bits each time.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later compilers end on a flag that they lack
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
chex.set_n_cpu_devices(8)

# Tracing makes objects by the hundred thousand, and Python would look for those that are
# not needed after every 700: a sixth of the time of a test.
gc.set_threshold(100_000, 10, 10)


@pytest.fixture(scope="module")
def quick_draws():
    """Sketches by a formula, since compiling threefry costs more than all the rest.

    Oracle and library see the same ones. What was compiled with them is forgotten after.
    """

    def fold_in(key, data):
        words = jax.random.key_data(key) * jnp.uint32(747796405)
        return jax.random.wrap_key_data(words + jnp.asarray(data).astype(jnp.uint32))

    def normal(key, shape, dtype=jnp.float32):
        start = jnp.sum(jax.random.key_data(key), dtype=jnp.uint32)
        bits = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.uint32) + start
        bits = (bits * jnp.uint32(2654435761)) ^ (bits >> 5)
        return ((bits >> 8).astype(dtype) / 2**23 - 1).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "fold_in", fold_in)
        patch.setattr(jax.random, "normal", normal)
        jax.clear_caches()
        yield
    jax.clear_caches()
