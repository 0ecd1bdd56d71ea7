"""Leaves of every kind come back as they were, or are refused by name."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits

import raclora_jax as rl
from raclora_jax._core.digest import digests
from raclora_jax.checkpoint import Checkpointer

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def there_and_back(state, folder, like=None):
    with Checkpointer(folder, 2) as checkpointer:
        checkpointer.save(1, state)
        return checkpointer.restore(state if like is None else like).state


WIDE = {
    "count": np.array(5_000_000_000),
    "below": np.array([-(2**63), 2**40 + 1]),
    "bits": np.full((2, 3), 2**64 - 1, np.uint64),
    "large": np.array([[1e300, 0.1]]),
    "both": np.array([0.1 + 1e-300j]),
    "scalar": np.int64(2**33),
    "none": np.zeros((0, 2)),
}


def test_64_bits_of_numpy_come_back(tmp_path):
    """With x64 off, where JAX would cut them."""
    assert not jax.config.jax_enable_x64
    state = WIDE | {"w": jnp.ones(2)}
    found = there_and_back(state, tmp_path)
    for name, want in WIDE.items():
        got = found[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        assert got.tobytes() == want.tobytes(), name
    assert isinstance(found["w"], jax.Array)


def test_a_leaf_of_64_bits_is_no_leaf_of_32(tmp_path):
    with pytest.raises(
        ValueError, match=r"leaf 'n': .*holds int64 of shape \(\), this run int32"
    ):
        there_and_back({"n": np.array(3)}, tmp_path, {"n": jnp.array(3)})


def test_64_bits_have_the_digest_that_a_device_gives_them():
    with jax.enable_x64(True):
        there = digests({name: jnp.asarray(leaf) for name, leaf in WIDE.items()})
    here = digests({name: np.asarray(leaf) for name, leaf in WIDE.items()})
    assert there == here
    assert len(set(here.values())) == len(here)


SMALL = [
    np.dtype(getattr(ml_dtypes, name))
    for name in ("int4", "uint4", "int2", "uint2", "float8_e4m3", "float8_e5m2")
]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_few_bits_come_back(dtype, tmp_path):
    """Of JAX and of numpy; from shapes alone; a changed number has another digest."""
    numbers = np.arange(-3, 3).reshape(2, 3) % (2 if "2" in str(dtype)[-2:] else 8)
    leaf = numbers.astype(np.float32).astype(dtype)
    shape = jax.ShapeDtypeStruct(leaf.shape, dtype)
    state = {"jax": jnp.asarray(leaf), "numpy": leaf}
    found = there_and_back(state, tmp_path, {"jax": shape, "numpy": shape})
    for got in found.values():
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.float32(got), np.float32(leaf))
    assert digests(found) == digests(state)
    assert digests({"jax": state["jax"][::-1]})["jax"] != digests(state)["jax"]


@pytest.mark.parametrize("qtype", ["int8", "int4", "nf4"])
def test_a_quantised_chain_goes_on_with_the_same_bits(qtype, tmp_path):
    pytest.importorskip("qwix")
    from raclora_jax import quantized

    params = {"up": jax.random.normal(jax.random.key(0), (6, 8)), "bias": jnp.zeros(8)}
    base, error = quantized.quantize(params, 2, qtype, block=3)
    factors, chain = rl.init_adapter(base, 2, key=0)
    factors = jax.tree.map(lambda f: f + 0.01, factors)
    state = quantized.next_link(base, error, factors, chain, 2)
    found = there_and_back(state, tmp_path, jax.eval_shape(lambda: state))
    for tree in (found, state):
        assert tree[0]["up"].qtype == qtype
    ahead = [
        quantized.next_link(run[0], run[1], factors, run[3], 2) for run in (found, state)
    ]
    assert_same_bits(*ahead)


def test_keys_come_back_from_shapes_alone(tmp_path):
    state = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4), 2)}
    found = there_and_back(state, tmp_path, jax.eval_shape(lambda: state))
    for name, key in state.items():
        got = jax.random.key_data(found[name])
        np.testing.assert_array_equal(got, jax.random.key_data(key))


def test_numbers_of_python_come_back_as_arrays(tmp_path):
    state = {"step": 3, "rate": 0.1, "on": True, "z": 1j, "nan": float("nan")}
    found = there_and_back(state, tmp_path)
    dtypes = {name: str(leaf.dtype) for name, leaf in found.items()}
    assert dtypes == {
        "step": "int32",
        "rate": "float32",
        "on": "bool",
        "z": "complex64",
        "nan": "float32",
    }
    assert found["rate"] == np.float32(0.1)
    assert np.isnan(found["nan"])


@pytest.mark.parametrize("number", [5_000_000_000, -(10**30), 1e300, -1e300, 1e-300])
def test_a_number_of_python_that_does_not_fit_is_refused(number, tmp_path):
    with pytest.raises(
        ValueError, match=r"leaf 'n': .* does not fit .*numpy array of 64"
    ):
        there_and_back({"w": jnp.ones(2), "n": number}, tmp_path)
    found = there_and_back({"w": jnp.ones(2), "n": np.float64(number)}, tmp_path)
    assert found["n"] == number


ODD = {
    "words": np.array(["a"]),
    "objects": np.array([None]),
    "days": np.array(["2020-01-01"], "datetime64[s]"),
    "long": np.ones(2, np.longdouble),
    "swapped": np.ones(2, np.dtype("float32").newbyteorder()),
    "float0": np.zeros(2, jax.dtypes.float0),
    "masked": np.ma.masked_array([1.0, 2.0], [False, True]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_array_of_numbers_is_refused_by_name(name, tmp_path):
    with pytest.raises(TypeError, match=f"leaf 'a/{name}' must be an array of numbers"):
        there_and_back({"a": {name: ODD[name]}, "w": jnp.ones(2)}, tmp_path)


def test_a_numpy_leaf_may_change_after_save(tmp_path):
    leaf = np.arange(6.0, dtype="float32")
    with Checkpointer(tmp_path, 2) as checkpointer:
        checkpointer.save(1, {"w": leaf})
        leaf += 1
        found = checkpointer.restore({"w": leaf})
    np.testing.assert_array_equal(found.state["w"], np.arange(6.0))
