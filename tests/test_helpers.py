"""The helpers that could let a fault through by never failing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compiled_once
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

X = np.arange(8, dtype=np.float32)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:4],
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jax.device_put(x, NamedSharding(jax.make_mesh((8,), ("a",)), P("a"))),
    ],
    ids=["shape", "dtype", "sharding"],
)
def test_another_compilation_is_seen(other):
    double = compiled_once(jax.jit(lambda x: 2 * x))
    x = jnp.asarray(X)
    np.testing.assert_array_equal(double(x), 2 * X)
    np.testing.assert_array_equal(double(x + 1), 2 * X + 2)
    with pytest.raises(AssertionError, match="compiled again"):
        double(other(x))


def test_a_drift_of_weak_types_is_seen():
    double = compiled_once(jax.jit(lambda x: 2 * x))
    double(1.0)
    with pytest.raises(AssertionError, match="compiled again"):
        double(jnp.float32(1.0))


def test_what_was_compiled_before_is_no_first_call():
    double = jax.jit(lambda x: 2 * x)
    double(X)
    with pytest.raises(AssertionError, match="was it called before"):
        compiled_once(double)(X)
