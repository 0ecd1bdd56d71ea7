"""PAGE and MVR: their recursions, their floors, and what optax asks of them."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import compiled_once, refuses, repeat

import raclora_jax as rl
from raclora_jax.estimators import PageState, mvr, next_is_full, page

SHAPES = {"body": {"kernel": (6, 5), "bias": (5,)}, "scale": (3,)}


def tree_of(seed, dtype="float32", lead=()):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def estimates(tx, grads, before):
    """The answers to a stream, and the states, in one compiled loop."""

    def step(state, pair):
        answer, new = tx.update(pair[0], state, grad_at_previous=pair[1])
        return new, (answer, state)

    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    return jax.jit(lambda s, pair: jax.lax.scan(step, s, pair)[1])(state, (grads, before))


@pytest.mark.parametrize("seed", [0, 1])
def test_recursions_are_those_of_the_papers(seed):
    steps = 12
    with jax.enable_x64(True):
        grads, before = (tree_of(seed + i, "float64", (steps,)) for i in (0, 10))
        paged, states = estimates(page(0.3, key=seed), grads, before)
        smoothed, _ = estimates(mvr(0.2), grads, before)
        full = np.asarray(states.is_full)
        assert full[0]
        assert 0 < full.sum() < steps
        for index, leaf in enumerate(jax.tree.leaves(grads)):
            at_previous = np.asarray(jax.tree.leaves(before)[index])
            for actual, expected in (
                (paged, reference.page_estimates(np.asarray(leaf), at_previous, full)),
                (smoothed, reference.mvr_estimates(np.asarray(leaf), at_previous, 0.2)),
            ):
                got = jax.tree.leaves(actual)[index]
                np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_coins(probability):
    tx, steps = page(probability, key=5), 3000

    def step(state, _):
        _, state = tx.update(jnp.ones(()), state, grad_at_previous=jnp.ones(()))
        return state, next_is_full((optax.EmptyState(), {"page": state}))

    _, coins = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(
        tx.init(jnp.ones(()))
    )
    standard_error = np.sqrt(probability * (1 - probability) / steps)
    assert abs(coins.mean() - probability) < 4 * standard_error
    changes = 2 * probability * (1 - probability)
    assert abs(np.mean(coins[1:] != coins[:-1]) - changes) < 5 * standard_error


def test_certain_estimators_are_the_gradient():
    grads, before = tree_of(0, lead=(4,)), tree_of(1, lead=(4,))
    for tx in (page(1.0, key=0), mvr(1.0)):
        answer, _ = estimates(tx, grads, before)
        jax.tree.map(np.testing.assert_array_equal, answer, grads)


def test_a_full_gradient_forgets_what_was_not_finite():
    tx, grads = page(1.0, key=0), tree_of(0)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    answer, state = tx.update(grads, tx.init(grads), grad_at_previous=bad)
    jax.tree.map(np.testing.assert_array_equal, answer, grads)
    chex.assert_tree_all_finite(state.estimate)


def least_squares(name, seed, steps=2500, rate=0.3):
    """Relative gap at the end: 60 samples, batches of 6, a new link in every step."""
    rng = np.random.default_rng(7)
    X, Y = jnp.asarray(rng.normal(size=(60, 8))), jnp.asarray(rng.normal(size=(60, 6)))
    hessian = X.T @ X / 60
    optimum = jnp.linalg.solve(hessian, X.T @ Y / 60)
    smoothness = float(jnp.linalg.eigvalsh(hessian)[-1])

    def gradient(W, rows):
        return X[rows].T @ (X[rows] @ W - Y[rows]) / len(rows)

    def gap(W):
        return jnp.sum((W - optimum) * (hessian @ (W - optimum))) / 2

    front = {
        "sgd": optax.identity(),
        "page": page(0.1, key=seed),
        "mvr": mvr(0.1),
    }[name]
    spec = rl.Spec(2, side=0.5, resample_every=1, cache=False)
    chain = rl.raclora(rate / smoothness, spec, inner=optax.identity(), key=seed)
    tx = optax.chain(front, chain)
    every = jnp.arange(60)

    def step(carry, key):
        W, before, state = carry
        rows = jax.random.choice(key, 60, (6,), replace=False)
        grads = gradient(W, rows)
        if name == "page":
            grads = jax.lax.cond(
                next_is_full(state), lambda: gradient(W, every), lambda: grads
            )
        updates, state = tx.update(
            grads, state, W, grad_at_previous=gradient(before, rows)
        )
        return (optax.apply_updates(W, updates), W, state), None

    W = jnp.asarray(rng.normal(size=(8, 6)))
    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    return float(gap(run((W, W, tx.init(W)))[0]) / gap(W))


@pytest.mark.parametrize("seed", [repeat(0), 1, repeat(2)])
def test_page_has_no_floor_and_mvr_a_lower_one(seed):
    with jax.enable_x64(True):
        gaps = {name: least_squares(name, seed) for name in ("sgd", "page", "mvr")}
    assert gaps["page"] < 1e-10
    assert gaps["sgd"] > 1e-4
    assert gaps["mvr"] < gaps["sgd"] / 2


ESTIMATORS = {"page": lambda: page(0.3, key=0), "mvr": lambda: mvr(0.3)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_types_never_drift(name):
    tx = ESTIMATORS[name]()
    params = tree_of(0, "bfloat16")
    grads = tree_of(1, "bfloat16")
    update, start = compiled_once(jax.jit(tx.update)), tx.init(params)
    answer, state = update(grads, start, params, grad_at_previous=grads)
    _, state = update(grads, state, params, grad_at_previous=grads)

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    assert types(state) == types(start)
    assert types(answer) == types(grads)
    # Differences of a run add up: they are kept in float32.
    assert state.estimate["scale"].dtype == jnp.float32


@pytest.mark.parametrize("name", ESTIMATORS)
def test_under_masked_and_tree_map_params(name):
    grads, before = tree_of(0), tree_of(1)
    mask = {"body": {"kernel": True, "bias": False}, "scale": False}
    alone = ESTIMATORS[name]()
    for settings in ({}, {"mask_compatible_extra_args": True}):
        tx = optax.masked(ESTIMATORS[name](), mask, **settings)
        state, lone = tx.init(grads), alone.init(grads["body"]["kernel"])
        for _ in range(3):
            answer, state = tx.update(grads, state, grads, grad_at_previous=before)
            kernel, lone = alone.update(
                grads["body"]["kernel"], lone, grad_at_previous=before["body"]["kernel"]
            )
        np.testing.assert_array_equal(answer["body"]["kernel"], kernel)
        np.testing.assert_array_equal(answer["scale"], grads["scale"])
        assert len(jax.tree.leaves(state.inner_state.estimate)) == 1
    mapped = optax.tree.map_params(alone, lambda x: x.shape, alone.init(grads))
    assert mapped.estimate == jax.tree.map(jnp.shape, grads)


def test_hyperparameters_may_change():
    tx = optax.inject_hyperparams(mvr)(weight=0.5)
    grads, before = tree_of(0), tree_of(1)
    state = tx.init(grads)
    _, state = tx.update(grads, state, grad_at_previous=before)
    state.hyperparams["weight"] = jnp.asarray(1.0)
    answer, _ = jax.jit(tx.update)(before, state, grad_at_previous=grads)
    chex.assert_trees_all_close(answer, before)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_in_front_of_an_accumulating_chain(name):
    """The weights rest for a mini-step; its two gradients cancel, or are both new."""
    spec = rl.Spec(2, side=0.5, resample_every=1)
    inner = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    tx = optax.chain(ESTIMATORS[name](), rl.raclora(0.1, spec, inner=inner, key=0))
    params, state = tree_of(0), tx.init(tree_of(0))
    update, moved = jax.jit(tx.update), []
    for _ in range(4):
        updates, state = update(params, state, params, grad_at_previous=params)
        moved.append(bool(jnp.any(updates["body"]["kernel"] != 0)))
        params = optax.apply_updates(params, updates)
    assert moved == [False, True, False, True]
    assert int(state[1].count) == 2


def test_the_dense_state_is_in_the_price_list():
    params, spec = tree_of(0), rl.Spec(2, side=0.5)
    plain = rl.summary(params, spec)
    tx = page(0.1, key=0)
    costs = rl.summary(params, spec, before=tx)
    for row, bare in zip(costs.rows, plain.rows, strict=True):
        size = {"body/kernel": 30, "body/bias": 5, "scale": 3}[row.path]
        assert row.state_bytes - bare.state_bytes == 4 * size
    state = tx.init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert costs.total.state_bytes - plain.total.state_bytes == held


@pytest.mark.parametrize(
    ("call", "pieces"),
    [
        (lambda: page(0.0, key=0), ["page", "probability", "above 0", "got 0.0"]),
        (lambda: page(1.5, key=0), ["probability", "at most 1", "got 1.5"]),
        (lambda: page(True, key=0), ["probability", "a number", "True"]),
        (lambda: page("0.1", key=0), ["probability", "a number", "'0.1'"]),
        (lambda: mvr(-0.1), ["mvr", "weight", "above 0", "-0.1"]),
        (lambda: mvr(float("nan")), ["weight", "nan"]),
        (lambda: next_is_full(mvr(0.1).init(jnp.ones(3))), ["PageState", "found 0"]),
        (
            lambda: next_is_full([page(0.1, key=0).init(jnp.ones(3))] * 2),
            ["PageState", "found 2", "page(...) once"],
        ),
        (
            lambda: mvr(0.1).update(jnp.ones(3), mvr(0.1).init(jnp.ones(3))),
            ["mvr", "previous weights", "grad_at_previous=..."],
        ),
        (
            lambda: mvr(0.1).update(
                {"a": jnp.ones(3)},
                mvr(0.1).init({"a": jnp.ones(3)}),
                grad_at_previous={"b": jnp.ones(3)},
            ),
            ["'a'", "grad_at_previous", "one form"],
        ),
        (
            lambda: mvr(0.1).update(
                {"a": jnp.ones(3)},
                mvr(0.1).init({"a": jnp.ones(3)}),
                grad_at_previous={"a": jnp.ones(4)},
            ),
            ["'a'", "(3,)", "(4,)"],
        ),
        (
            lambda: mvr(0.1).update(
                {"a": rl.Factor(jnp.ones((2, 3)), jnp.zeros(()))},
                mvr(0.1).init({"a": jnp.ones((4, 3))}),
                grad_at_previous={"a": jnp.ones((4, 3))},
            ),
            ["'a'", "Factor", "jax.value_and_grad"],
        ),
    ],
)
def test_bad_input(call, pieces):
    refuses(call, *pieces)


def test_the_factor_form_refuses_an_estimator_in_front():
    params = {"w": jnp.ones((6, 5))}
    tx = optax.chain(mvr(0.1), rl.raclora(0.1, 2, key=0))
    with pytest.raises(ValueError, match=r"'w'.*full shape.*jax\.value_and_grad"):
        rl.grad(lambda p: jnp.sum(p["w"] ** 2), 2)(params, tx.init(params))
    assert isinstance(page(0.1, key=0).init(params), PageState)
