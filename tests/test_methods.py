"""The methods of comparison against their formulae."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import chequered, states_of

import raclora_jax as rl
from raclora_jax import methods

PARAMS = {
    "kernel": jnp.sin(jnp.arange(35.0)).reshape(7, 5),
    "bias": jnp.cos(jnp.arange(5.0)),
}
X = jnp.linspace(-1.0, 1.0, 21).reshape(3, 7) ** 3
Y = jnp.cos(jnp.arange(15.0)).reshape(3, 5)
LINK = 4


def loss_fn(params, x, y):
    return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


def spec(side="left", **kwargs):
    return rl.Spec(2, side=side, alpha=3.0, resample_every=LINK, **kwargs)


def history(method, steps):
    return states_of(method, PARAMS, loss_fn, X, Y, steps=steps)


CHAINED = {"cola": methods.cola, "published": methods.published_raclora}
PAIRS = {"lora": methods.lora, "asymmetric": methods.asymmetric, **CHAINED}


@pytest.mark.parametrize(("name", "side"), chequered(PAIRS, ["left", "right"]))
def test_pair_adds_to_frozen_weights(name, side):
    method = PAIRS[name](0.05, spec(side), key=1)
    states = history(method, 3)
    for state in (states[0], states[-1]):
        drawn, zero = np.array(state.drawn["kernel"]), np.array(state.zero["kernel"])
        pair = drawn.T @ zero if side == "left" else zero.T @ drawn
        expected = np.array(state.base["kernel"]) + 3 / 2 * pair
        np.testing.assert_allclose(method.params(state)["kernel"], expected, atol=1e-6)
        np.testing.assert_array_equal(state.base["kernel"], PARAMS["kernel"])
    assert loss_fn(method.params(states[-1]), X, Y) < loss_fn(PARAMS, X, Y)


@pytest.mark.parametrize("side", ["left", "right"])
def test_which_factors_move(side):
    for name, moves in (("lora", True), ("asymmetric", False), ("published", False)):
        first, *_, last = history(PAIRS[name](0.05, spec(side), key=1), 3)
        moved = np.any(first.drawn["kernel"] != last.drawn["kernel"])
        assert moved == moves, name
        assert np.any(last.zero["kernel"] != 0)
        assert np.any(last.dense["bias"] != 0)


@pytest.mark.parametrize("name", CHAINED)
def test_a_chain_merges_and_draws_again(name):
    method = CHAINED[name](0.05, spec(), key=1)
    states = history(method, LINK + 1)
    before, after = states[LINK], states[LINK + 1]
    merged = np.array(method.params(before)["kernel"])
    np.testing.assert_allclose(after.base["kernel"], merged, atol=1e-6)
    # A new link starts with a sketch of its own and a factor of zero, one step ago.
    overlap = np.sum(np.array(before.drawn["kernel"]) * np.array(after.drawn["kernel"]))
    norm = np.linalg.norm(before.drawn["kernel"]) * np.linalg.norm(after.drawn["kernel"])
    assert abs(overlap) < 0.99 * norm
    assert np.abs(after.zero["kernel"]).max() <= 0.05 * 1.1
    # The bias is no part of the pair: it goes on.
    assert not np.array_equal(after.dense["bias"], before.dense["bias"])
    np.testing.assert_array_equal(after.base["bias"], PARAMS["bias"])


def adam_counts(state):
    return {group: int(optax.tree.get(s, "count")) for group, s in state.inner.items()}


def test_cola_restarts_the_moments_of_the_pair_only():
    last = history(methods.cola(0.05, spec(), key=1), LINK + 1)[-1]
    assert adam_counts(last) == {"zero": 1, "drawn": 1, "dense": LINK + 1}


def test_published_is_adamw_on_a_raw_sketch_whose_moments_live_on():
    method = methods.published_raclora(0.05, spec(sketch="coordinate"), key=1)
    states = history(method, LINK + 1)
    assert adam_counts(states[-1]) == {"zero": LINK + 1, "dense": LINK + 1}
    wide = {"kernel": jnp.zeros((4000, 4001))}
    entries = np.array(method.init(wide).drawn["kernel"])
    assert abs(entries.std() - 1) < 5 / np.sqrt(2 * entries.size)
    # One step from the second state by hand: AdamW with decay 0.01 on the factor.
    state = states[1]

    def loss(zero):
        return loss_fn(method.params(state._replace(zero=zero)), X, Y)

    tx = optax.adamw(0.05, weight_decay=0.01)
    adam = tx.init(state.zero)
    adam = (state.inner["zero"][0], *adam[1:])
    updates, _ = tx.update(jax.grad(loss)(state.zero), adam, state.zero)
    expected = optax.apply_updates(state.zero, updates)["kernel"]
    np.testing.assert_allclose(states[2].zero["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_full_is_adam():
    method = methods.full(0.05)
    last = history(method, 5)[-1]
    tx, params = optax.adam(0.05), PARAMS
    opt_state = tx.init(params)
    for _ in range(5):
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, X, Y), opt_state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(method.params(last)["kernel"], params["kernel"], rtol=1e-6)


def test_raclora_is_the_library():
    method = methods.raclora(0.05, spec(), moments="transport", key=1)
    last = history(method, LINK + 2)[-1]
    tx = rl.raclora(0.05, spec(), moments="transport", key=1)
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(LINK + 2):
        grads = jax.grad(loss_fn)(params, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(method.params(last)["kernel"], params["kernel"], rtol=2e-5)


def test_numbers_of_the_paper():
    """784-64-64-5 at rank 1: 912, 133, 1045 and 54 725 trained numbers."""
    sizes = (784, 64, 64, 5)
    net = {
        f"layer{i}": {
            "kernel": jax.ShapeDtypeStruct((rows, cols), "float32"),
            "bias": jax.ShapeDtypeStruct((cols,), "float32"),
        }
        for i, (rows, cols) in enumerate(itertools.pairwise(sizes))
    }

    def count(make, side):
        return make(0.1, rl.Spec(1, side=side, rest="frozen"), key=0).trained(net)

    for make in (methods.raclora, methods.asymmetric, methods.published_raclora):
        assert (count(make, "right"), count(make, "left")) == (912, 133)
    assert count(methods.lora, "left") == count(methods.cola, "right") == 1045
    assert methods.full(0.1).trained(net) == 54_725


def test_optimizer_bytes():
    rank, rows, cols = 2, 7, 5
    adam = 4  # the step counter
    dense = 2 * 4 * cols + adam
    factor = 2 * 4 * rank * cols + adam
    drawn = 2 * 4 * rank * rows + adam
    assert methods.raclora(0.1, spec(), key=0).optimizer_bytes(PARAMS) == dense + factor
    assert (
        methods.asymmetric(0.1, spec(), key=0).optimizer_bytes(PARAMS) == dense + factor
    )
    lora = methods.lora(0.1, spec(), key=0).optimizer_bytes(PARAMS)
    assert lora == dense + factor + drawn
    full = methods.full(0.1).optimizer_bytes(PARAMS)
    assert full == 2 * 4 * (rows * cols + cols) + adam


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_pair_stays_beside_the_weights(side):
    """The gradients of both factors are those of the sum, which is never formed."""
    method = methods.lora(0.05, spec(side), inner=optax.identity(), key=1)
    before, after = history(method, 2)[1:]

    def loss(drawn, zero):
        pair = (drawn.T @ zero if side == "left" else zero.T @ drawn) * 3 / 2
        kernel = before.base["kernel"] + pair
        bias = before.base["bias"] + before.dense["bias"]
        return loss_fn({"kernel": kernel, "bias": bias}, X, Y)

    pair = before.drawn["kernel"], before.zero["kernel"]
    moved = after.drawn["kernel"] - pair[0], after.zero["kernel"] - pair[1]
    for step, gradient in zip(moved, jax.grad(loss, (0, 1))(*pair), strict=True):
        np.testing.assert_allclose(step, -0.05 * gradient, atol=1e-6)
