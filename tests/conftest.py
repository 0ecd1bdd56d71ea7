"""Eight fake CPU devices for every test, so that sharded runs can be compared."""

import gc
import os

import chex
import jax

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
