"""Random bits by place: the cipher is Threefry, and a shuffle is any order alike."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raclora_jax._core import bits, keys, orthonormal


def words(seed, *shape):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.integers(0, 2**32, shape, np.uint32)) for _ in range(2))


@pytest.mark.parametrize("seed", range(3))
def test_the_cipher_is_the_one_that_jax_draws_from(seed):
    key = words(seed)
    own = jax.random.wrap_key_data(jnp.stack(key), impl="threefry2x32")
    with jax.threefry_partitionable(True):
        want = jax.random.bits(own, (37,), jnp.uint32)
    places = jnp.arange(37, dtype=jnp.uint32)
    got = bits.bits(key, jnp.uint32(0), places)
    np.testing.assert_array_equal(got, want)
    folded = keys.folded(jnp.stack(key), places[:3, None])
    for word in places[:3]:
        own = jax.random.fold_in(own, word)
    np.testing.assert_array_equal(
        jax.random.key_data(folded[0]), jax.random.key_data(own)
    )


def test_normal_numbers_have_their_law():
    drawn = np.asarray(
        bits.normal(bits.bits(words(0), 0, jnp.arange(10**6, dtype="uint32")))
    )
    assert np.isfinite(drawn).all()
    # Moments in standard errors: variances of x, x^2, x^3 and x^4 are 1, 2, 15 and 96.
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        error = np.mean(drawn.astype(float) ** power) - mean
        assert abs(error) < 5 * math.sqrt(variance / drawn.size), power
    ends = bits.normal(jnp.array([0, 2**32 - 1], jnp.uint32))
    np.testing.assert_array_equal(ends[0], -ends[1])
    assert np.isfinite(ends).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_order_is_as_likely_as_any_other(size):
    count = 50_000
    one, other = words(size, count, 1)
    places = jnp.arange(size, dtype=jnp.uint32)
    orders = np.asarray(jax.jit(bits.shuffled)((one, other), places, jnp.uint32(size)))
    np.testing.assert_array_equal(np.sort(orders), np.tile(places, (count, 1)))
    numbers = orders @ size ** np.arange(size)
    found = np.unique(numbers, return_counts=True)[1]
    possible = len([*itertools.permutations(range(size))])
    expected = count / possible
    assert len(found) == possible
    # Chi-square with as many degrees of freedom as orders but one.
    chi = np.sum((found - expected) ** 2) / expected
    assert chi - (possible - 1) < 5 * math.sqrt(2 * possible)


@pytest.mark.parametrize("size", [97, 1000, 4096])
def test_a_long_order_has_every_place_once_and_no_pattern(size):
    one, other = words(size, 200, 1)
    places = jnp.arange(size, dtype=jnp.uint32)
    orders = np.asarray(bits.shuffled((one, other), places, jnp.uint32(size)), int)
    np.testing.assert_array_equal(np.sort(orders), np.tile(places, (200, 1)))
    # Neighbours are a third of the side apart on average, as two random places are.
    gaps = np.abs(np.diff(orders, axis=1)).mean()
    assert abs(gaps * 3 / size - 1) < 0.02


def test_keys_of_a_step_differ_by_leaf_purpose_step_and_run():
    def one(seed=3, domain="rounding", name="a/kernel", count=7, among=("b",)):
        found = keys.step_keys(keys.key_data(seed), domain, (*among, name), count)
        return tuple(jax.random.key_data(found[name]).tolist())

    # Other leaves do not enter.
    assert one() == one(among=("c", "d"))
    others = [{"seed": 4}, {"domain": "landing"}, {"name": "a/bias"}, {"count": 8}]
    assert len({one(), *(one(**other) for other in others)}) == 5


@pytest.mark.parametrize(("rank", "dim"), [(1, 16), (16, 32), (63, 64), (100, 128)])
def test_draws_of_any_shape_become_orthonormal(rank, dim):
    """On either side of where a draw counts as well conditioned."""
    places = jnp.arange(100 * rank * dim, dtype=jnp.uint32).reshape(100, rank, dim)
    numbers = bits.normal(bits.bits(words(rank), 0, places))
    for start in (numbers, orthonormal.signs(numbers)):
        (rows,) = orthonormal.orthonormal([start])
        gram = np.einsum("nri,nsi->nrs", *[np.asarray(rows, float)] * 2)
        assert np.abs(gram - np.eye(rank)).max() < 1e-5
