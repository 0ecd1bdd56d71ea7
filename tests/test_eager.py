"""The contract of optax outside of ``jit`` as well as in it, and in a user's own trace.

What a test compiles, a user may run step by step, and may put into a branch, a loop or a
``vmap`` of which only some values are traced.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import raclora_jax as rl

SPEC = rl.Spec(2, resample_every=2)
STEPS = 5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f")


PARAMS = {"bias": jnp.asarray(normal(0, 5)), "kernel": jnp.asarray(normal(1, 7, 5))}
X = jnp.asarray(normal(2, STEPS, 6, 7))


def loss_fn(params, x):
    return jnp.mean(jnp.sin(x @ params["kernel"] + params["bias"]))


def core(**options):
    return rl.raclora(0.1, SPEC, weight_decay=0.1, key=0, **options)


AROUND = {
    "nothing": core,
    "chain": lambda: optax.chain(core(), optax.scale(0.5)),
    "apply_if_finite": lambda: optax.apply_if_finite(core(), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: rl.raclora(rate, SPEC, key=0)
    )(0.1),
    "masked": lambda: optax.masked(core(), {"bias": True, "kernel": True}),
    "partition": lambda: optax.partition(
        {"chain": core(), "rest": optax.sgd(0.1)}, {"bias": "rest", "kernel": "chain"}
    ),
    "accumulation inside": lambda: core(
        inner=optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation()
    ),
    "clip_norm": lambda: core(clip_norm=0.01),
    "no cache": lambda: rl.raclora(0.1, rl.Spec(2, resample_every=2, cache=False), key=0),
    "orthogonal": lambda: core(inner=rl.orthogonal()),
}
DENSE_ONLY = {
    "MultiSteps": lambda: optax.MultiSteps(core(), 2),
    "ema": lambda: optax.chain(core(), optax.ema(0.9)),
    "schedule_free": lambda: optax.contrib.schedule_free(core(), 0.1),
    "add_noise": lambda: optax.chain(
        core(), optax.add_noise(1e-3, 0.5, jax.random.key(0))
    ),
}
QUICK = {("nothing", "factor"), ("apply_if_finite", "factor")}
CASES = [
    pytest.param(name, make, form, id=f"{name}-{form}",
                 marks=[] if (name, form) in QUICK else pytest.mark.slow)
    for makes, forms in ((AROUND, ("dense", "factor")), (DENSE_ONLY, ("dense",)))
    for name, make in makes.items()
    for form in forms
]  # fmt: skip


def step_of(tx, form, spec=SPEC):
    factor = rl.value_and_grad(loss_fn, spec)

    def step(params, state, x):
        if form == "factor":
            _, grads = factor(params, state, x)
            updates, state = tx.update(grads, state, params)
            return rl.apply_updates(params, updates), state
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "make", "form"), CASES)
def test_outside_jit_and_in_the_users_own_traces(name, make, form):
    """Eager steps, a branch, a scan, a while loop and a vmap: the compiled run."""
    spec = rl.Spec(2, resample_every=2, cache=name != "no cache")
    tx = make()
    step = step_of(tx, form, spec)
    start = PARAMS, tx.init(PARAMS)
    compiled = jax.jit(step)
    carry = start
    for x in X:
        carry = compiled(*carry, x)
    want = carry[0]
    assert float(jnp.abs(want["kernel"] - PARAMS["kernel"]).max()) > 1e-3

    def close(got):
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

    carry = start
    for index, x in enumerate(X):
        if index == SPEC.resample_every:  # in a branch that closes over everything
            carry = jax.lax.cond(
                jnp.asarray(True),
                lambda carry=carry, x=x: step(*carry, x),
                lambda carry=carry: carry,
            )
        else:
            carry = step(*carry, x)
    close(carry[0])

    scanned, _ = jax.lax.scan(lambda carry, x: (step(*carry, x), None), start, X)
    close(scanned[0])

    _, looped = jax.lax.while_loop(
        lambda at: at[0] < STEPS,
        lambda at: (at[0] + 1, step(*at[1], X[at[0]])),
        (0, start),
    )
    close(looped[0])

    def whole(params):
        carry = params, tx.init(params)
        return jax.lax.scan(lambda carry, x: (step(*carry, x), None), carry, X)[0][0]

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    both = jax.jit(jax.vmap(whole))(twice)
    close(jax.tree.map(lambda leaf: leaf[1], both))


@pytest.mark.smoke
def test_a_step_not_taken_in_a_branch_spends_nothing():
    """Factor gradients in one branch, zeros of their structure in the other."""
    tx = core()
    state = tx.init(PARAMS)
    _, grads = rl.value_and_grad(loss_fn, SPEC)(PARAMS, state, X[0])

    def one(taken):
        updates, after = jax.lax.cond(
            taken,
            lambda: tx.update(grads, state, PARAMS),
            lambda: (jax.tree.map(jnp.zeros_like, grads), state),
        )
        return rl.apply_updates(PARAMS, updates), after

    for run in (one, jax.jit(one)):
        params, after = run(jnp.asarray(False))
        chex.assert_trees_all_equal(params, PARAMS)
        assert int(after.count) == 0
        params, after = run(jnp.asarray(True))
        assert float(jnp.abs(params["kernel"] - PARAMS["kernel"]).max()) > 1e-3
        assert int(after.count) == 1


@pytest.mark.parametrize("law", ["orthonormal", "block", "gaussian_raw"])
def test_a_clip_acts_alike_in_both_forms(law):
    """By the norm that the sketches tell of; exact where one is the whole space."""
    spec = rl.Spec(2, sketch=law, alpha=3.0)
    steps = {}
    for form in ("dense", "factor"):
        tx = rl.raclora(1.0, spec, inner=optax.identity(), clip_norm=2e-2, key=0)
        new, _ = step_of(tx, form, spec)(PARAMS, tx.init(PARAMS), X[0])
        steps[form] = jax.tree.map(jnp.subtract, new, PARAMS)
    chex.assert_trees_all_close(steps["factor"], steps["dense"], rtol=1e-4, atol=1e-9)
    tx = rl.raclora(1.0, spec, inner=optax.identity(), key=0)
    new, _ = step_of(tx, "dense", spec)(PARAMS, tx.init(PARAMS), X[0])
    free = jax.tree.map(jnp.subtract, new, PARAMS)
    shares = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a)) / jnp.max(jnp.abs(b)),
                          steps["dense"], free)  # fmt: skip
    np.testing.assert_allclose(shares["kernel"], shares["bias"], rtol=1e-4)


def test_the_norm_of_a_clip_is_the_gradients_in_the_mean():
    """``E |F|^2`` over what a sketch sees of it is ``|G|^2``: over 200 sketches."""
    weight, gradient = PARAMS["kernel"], jnp.asarray(normal(5, 7, 5))
    square = float(jnp.sum(gradient**2))
    for law in ("orthonormal", "block", "gaussian_raw"):
        spec = rl.Spec(2, sketch=law, alpha=3.0, side="left")

        def clipped(key, spec=spec):
            tx = rl.scale_by_raclora(
                spec, inner=optax.identity(), clip_norm=1e-6, key=key
            )
            free = rl.scale_by_raclora(spec, inner=optax.identity(), key=key)
            one, two = (t.update(gradient, t.init(weight), weight)[0] for t in (tx, free))
            # |step| / |free step| is clip_norm / norm.
            return (1e-6 * jnp.linalg.norm(two) / jnp.linalg.norm(one)) ** 2

        keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(1), 200))
        seen = np.asarray(jax.jit(jax.vmap(clipped))(keys))
        error = seen.std() / np.sqrt(len(seen))
        assert abs(seen.mean() - square) < 4 * error + 1e-4 * square, law


def test_rules_before_it_are_warned_of():
    tx = optax.chain(optax.clip_by_global_norm(1.0), core())
    grad_fn = rl.value_and_grad(loss_fn, SPEC)
    with pytest.warns(UserWarning, match=r"clip_norm=1\.0"):
        grad_fn(PARAMS, tx.init(PARAMS), X[0])


def test_the_last_link_is_followed_by_the_first():
    last = jnp.int32(2**31 - 1)
    spec = rl.Spec(2, resample_every=1)
    tx = rl.raclora(0.1, spec, key=0)
    state = tx.init(PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS)
    state = state._replace(link=last)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert int(state.link) == 0
    tx.update(PARAMS, state, PARAMS)
    factors, chain = rl.init_adapter(PARAMS, spec, key=0)
    _, _, chain = rl.next_link(PARAMS, factors, chain._replace(link=last), spec)
    assert int(chain.link) == 0
