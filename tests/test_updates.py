"""An update in factor form knows its sketch, its plan and how its weight is rounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import raclora_jax as rl

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
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


def by_hand(weight, update, state, path, spec):
    """W + scaling S F - decay W in float64, on the sketch of the state's own link."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    sketches = rl.sample_sketch(params, spec, key=state.key_data, link=state.link)
    lifted = rl.lift({path: update}, {path: sketches[path]}, {path: weight}, spec)[path]
    wide = np.asarray(weight, np.float64)
    return wide + np.asarray(lifted, np.float64) - float(update.decay) * wide


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_it_lands_on_its_own_sketch(law, cache):
    """At the first steps of links too, where the state before has another sketch."""
    spec = rl.Spec(3, sketch=law, resample_every=EVERY, cache=cache)
    tx, grad_fn = run_of(spec, weight_decay=0.3)
    params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    links = []
    for _ in range(STEPS):
        _, grads = grad_fn(params, state, X, Y)
        updates, state = tx.update(grads, state, params)
        new = rl.apply_updates(params, updates)
        for path in ("up", "down"):
            want = by_hand(params[path], updates[path], state, path, spec)
            np.testing.assert_allclose(new[path], want, rtol=1e-5, atol=1e-6)
        links.append(int(state.link))
        params = new
    assert links == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "master"])
@pytest.mark.parametrize("law", ["orthonormal", "block"])
def test_the_same_bits_wherever_it_was_applied(law, rounding):
    """In one program with its update, out of two programs, and outside of any."""
    spec = rl.Spec(3, sketch=law, resample_every=EVERY, rounding=rounding)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), PARAMS)
    tx, grad_fn = run_of(spec, weight_decay=0.3)
    state = tx.init(params)
    _, grads = jit(grad_fn)(params, state, X, Y)

    def both(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), updates, state

    one, updates, after = jit(both)(grads, state, params)
    two = jit(rl.apply_updates)(params, updates)
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
    params, state = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    for _ in range(STEPS):
        _, grads = grad_fn(params, state, X, Y)
        updates, state = tx.update(grads, state, params)
        new = rl.apply_updates(params, updates)
        want = by_hand(params["up"], updates["up"], state, "up", spec)
        np.testing.assert_allclose(new["up"], want, rtol=1e-5, atol=1e-6)
        params = new


@pytest.mark.parametrize("law", LAWS)
def test_rules_after_it_that_scale(law):
    """By a float32 factor that is no power of two, halfway there and to nothing."""
    spec = rl.Spec(3, sketch=law)
    tx, grad_fn = run_of(spec)
    state = tx.init(PARAMS)
    _, grads = grad_fn(PARAMS, state, X, Y)
    updates, state = tx.update(grads, state, PARAMS)
    for scale in (-0.37, 1e-9, 0.0):
        scaled, _ = optax.scale(scale).update(updates, optax.EmptyState())
        moved = rl.apply_updates(PARAMS, scaled)
        for path in ("up", "down"):
            whole = by_hand(PARAMS[path], updates[path], state, path, spec)
            want = PARAMS[path] + scale * (whole - PARAMS[path])
            np.testing.assert_allclose(moved[path], want, rtol=2e-6, atol=1e-7)


def test_norms_and_clips_see_its_numbers_alone():
    spec = rl.Spec(3, sketch="block")
    tx, grad_fn = run_of(spec)
    params = {p: jnp.asarray(PARAMS[p], jnp.bfloat16) for p in ("up", "down")}
    params["bias"] = jnp.asarray(PARAMS["bias"])
    state = tx.init(params)
    _, grads = grad_fn(params, state, X, Y)
    updates, _ = tx.update(grads, state, params)
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
