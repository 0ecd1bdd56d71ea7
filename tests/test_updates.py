"""An update in factor form knows its sketch, its plan and how its weight is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import product, with_repeats

import raclora_jax as rl

EVERY, STEPS = 2, 5
LAWS = ("orthonormal", "coordinate", "block", "gaussian_raw")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


PARAMS = {"up": normal(0, 7, 12) / 3, "down": normal(1, 12, 5) / 3, "bias": normal(2, 5)}
X, Y = normal(3, 9, 7), normal(4, 9, 5)


def loss_fn(params, x, y):
    inside = jnp.tanh(x @ params["up"])
    return jnp.mean((inside @ params["down"] + params["bias"] - y) ** 2)


def run_of(spec, tx=None, **options):
    tx = tx or rl.raclora(0.1, spec, key=0, **options)
    return tx, rl.value_and_grad(loss_fn, spec)


def step_of(tx, grad_fn):
    @jax.jit
    def step(params, state):
        _, grads = grad_fn(params, state, X, Y)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), updates, state

    return step


def by_hand(spec):
    """W + scaling S F - decay W in float64, on the sketch of the state's own link."""

    @jax.jit
    def lift(updates, state):
        sketches = rl.sample_sketch(PARAMS, spec, key=state.key_data, link=state.link)
        return rl.lift(updates, sketches, PARAMS, spec)

    def landed(params, updates, state):
        found, lifted = {}, lift(updates, state)
        for path in ("up", "down"):
            wide = np.asarray(params[path], np.float64)
            decay = float(updates[path].decay)
            found[path] = wide + np.asarray(lifted[path], np.float64) - decay * wide
        return found

    return landed


@pytest.mark.parametrize(
    ("law", "cache"), product(LAWS, [True, False], repeats=[("coordinate", True)])
)
def test_it_lands_on_its_own_sketch(law, cache):
    """At the first steps of links too, where the state before has another sketch."""
    spec = rl.Spec(3, sketch=law, resample_every=EVERY, cache=cache)
    tx, grad_fn = run_of(spec, weight_decay=0.3)
    step, landed = step_of(tx, grad_fn), by_hand(spec)
    params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    links = []
    for _ in range(STEPS):
        new, updates, state = step(params, state)
        for path, want in landed(params, updates, state).items():
            np.testing.assert_allclose(new[path], want, rtol=1e-5, atol=1e-6)
        links.append(int(state.link))
        params = new
    assert links == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("law", "rounding"),
    product(
        ["orthonormal", "block"],
        ["stochastic", "nearest", "master"],
        repeats=[("block", "nearest"), ("orthonormal", "master")],
    ),
)
def test_the_same_bits_wherever_it_was_applied(law, rounding):
    """In one program with its update, out of two programs, and outside of any."""
    spec = rl.Spec(3, sketch=law, resample_every=EVERY, rounding=rounding)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    tx, grad_fn = run_of(spec, weight_decay=0.3)
    state = tx.init(params)
    _, grads = jax.jit(grad_fn)(params, state, X, Y)

    def both(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), updates, state

    one, updates, after = jax.jit(both)(grads, state, params)
    two = jax.jit(rl.apply_updates)(params, updates)
    three = rl.apply_updates(params, updates)
    for other in (two, three):
        for path in params:
            assert other[path].dtype == params[path].dtype
            np.testing.assert_array_equal(other[path], one[path])
    for path, master in after.master.items():
        np.testing.assert_array_equal(one[path], master.astype(jnp.bfloat16))
    assert (rounding == "master") == bool(after.master)


def test_a_drawn_side():
    spec = rl.Spec(2, side=0.5, resample_every=1, alpha="dim")
    tx, grad_fn = run_of(spec)
    step, landed = step_of(tx, grad_fn), by_hand(spec)
    params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    for _ in range(STEPS):
        new, updates, state = step(params, state)
        want = landed(params, updates, state)["up"]
        np.testing.assert_allclose(new["up"], want, rtol=1e-5, atol=1e-6)
        params = new


@pytest.mark.parametrize("law", with_repeats(LAWS, "coordinate"))
def test_rules_after_it_that_scale(law):
    """By a float32 factor that is no power of two, halfway there and to nothing."""
    spec = rl.Spec(3, sketch=law)
    tx, grad_fn = run_of(spec)
    state = tx.init(PARAMS)
    _, updates, state = step_of(tx, grad_fn)(PARAMS, state)
    whole = by_hand(spec)(PARAMS, updates, state)
    for scale in (-0.37, 1e-9, 0.0):
        scaled, _ = optax.scale(scale).update(updates, optax.EmptyState())
        moved = rl.apply_updates(PARAMS, scaled)
        for path, end in whole.items():
            want = PARAMS[path] + scale * (end - PARAMS[path])
            np.testing.assert_allclose(moved[path], want, rtol=2e-6, atol=1e-7)


def test_norms_and_clips_see_its_numbers_alone():
    spec = rl.Spec(3, sketch="block")
    tx, grad_fn = run_of(spec)
    params = {p: jnp.asarray(PARAMS[p], jnp.bfloat16) for p in ("up", "down")}
    params["bias"] = jnp.asarray(PARAMS["bias"])
    state = jax.jit(tx.init)(params)
    _, grads = jax.jit(grad_fn)(params, state, X, Y)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    for tree in (grads, updates):
        values = [tree["up"].value, tree["down"].value, tree["bias"]]
        norm = np.sqrt(sum(float(jnp.sum(jnp.float32(v) ** 2)) for v in values))
        np.testing.assert_allclose(optax.tree.norm(tree), norm, rtol=1e-5)
    clipped, _ = optax.clip(1e-3).update(updates, optax.EmptyState())
    by_value = {**updates, "bias": jnp.clip(updates["bias"], -1e-3, 1e-3)}
    for path in ("up", "down"):
        value = jnp.clip(updates[path].value, -1e-3, 1e-3)
        by_value[path] = updates[path].__class__(
            value, updates[path].decay, updates[path].stamp, updates[path].origin
        )
    got, want = (rl.apply_updates(params, u) for u in (clipped, by_value))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_old_call_says_what_to_write():
    tx = rl.raclora(0.1, 3, key=0)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"apply_updates\(params, updates\)"):
        rl.apply_updates(PARAMS, PARAMS, state, 3)


def test_noise_after_it_is_refused():
    """Once it is seen: eager in apply_updates, and in every step by its state."""
    spec = rl.Spec(3)
    tx, grad_fn = run_of(spec)
    _, grads = grad_fn(PARAMS, tx.init(PARAMS), X, Y)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    noise = optax.add_noise(0.1, 0.5, jax.random.key(0))
    noisy, _ = noise.update(updates, noise.init(updates))
    with pytest.raises(ValueError, match=r"'(up|down)'.*after raclora"):
        rl.apply_updates(PARAMS, noisy)
    chain = optax.chain(tx, noise)
    with pytest.raises(ValueError, match="add_noise"):
        jax.eval_shape(grad_fn, PARAMS, chain.init(PARAMS), X, Y)


@pytest.mark.filterwarnings("ignore:a rule stands before raclora")
def test_what_stands_for_a_leaf_names_the_way_out():
    """optax reads weights beside updates before any code of ours runs."""
    for around in (
        lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
        lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
        lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda w: w.ndim > 1, p)),
    ):
        tx, grad_fn = run_of(3, around(rl.raclora(0.1, 3, key=0)))
        state = tx.init(PARAMS)
        _, grads = grad_fn(PARAMS, state, X, Y)
        with pytest.raises(ValueError, match=r"weight_decay=\.\.\., mask=\.\.\."):
            tx.update(grads, state, PARAMS)
