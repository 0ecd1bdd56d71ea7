"""JAX's debugging switches work in every form, and bad input is refused by name."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import product, refuses

import raclora_jax as rl
from raclora_jax._core import rounding

SPEC = rl.Spec(2, resample_every=2)
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
# Each says in its error which one it is, so they are thrown together: a run compiles
# everything anew.
SWITCHES = (
    lambda: jax.debug_nans(True),
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.numpy_dtype_promotion("strict"),
    lambda: jax.debug_key_reuse(True),
)
# With leaks checked nothing is traced from a cache, and no dtype matters.
GROUPS = {
    "leaks, float32": (jax.checking_leaks,),
    "others, float32": SWITCHES,
    "others, bfloat16": SWITCHES,
}


def weights(dtype):
    return {"kernel": jnp.full((8, 6), 0.2, dtype), "bias": jnp.zeros(6, dtype)}


def loss_fn(params, x):
    y = x @ params["kernel"] + params["bias"][None]
    return jnp.mean(y.astype(jnp.float32) ** 2)


def losses(form, dtype):
    """Steps over a change of link, compiled and not."""
    params, x = weights(dtype), jnp.asarray(X, dtype)
    # The identity: Adam's own counters do not take strict dtype promotion.
    tx = rl.raclora(0.1, SPEC, inner=optax.trace(0.9), weight_decay=0.1, key=0)

    def step(params, state, x):
        if form == "dense":
            _, grads = jax.value_and_grad(loss_fn)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state
        _, grads = rl.value_and_grad(loss_fn, SPEC)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state

    if form == "adapter":
        factors, chain = rl.init_adapter(params, SPEC, key=0)
        loss = jax.jit(jax.value_and_grad(rl.adapted(loss_fn, SPEC)))
        before, grads = loss(factors, params, chain, x)
        factors = jax.tree.map(lambda f, g: f - 0.1 * g, factors, grads)
        params, factors, chain = rl.next_link(params, factors, chain, SPEC)
        return before, loss(factors, params, chain, x)[0]
    before, state = loss_fn(params, x), tx.init(params)
    compiled = jax.jit(step)
    for act in (step, compiled, compiled, compiled):
        params, state = act(params, state, x)
    return before, loss_fn(params, x)


@pytest.mark.parametrize(
    ("group", "form"),
    product(
        GROUPS,
        ["dense", "factor", "adapter"],
        repeats=[
            ("others, float32", "dense"),
            ("others, float32", "factor"),
            ("others, bfloat16", "dense"),
        ],
    ),
)
def test_under_debugging_switches(group, form):
    with contextlib.ExitStack() as stack:
        for switch in GROUPS[group]:
            stack.enter_context(switch())
        before, after = losses(form, dtype=group.split(", ")[1])
    assert after < before


@pytest.mark.parametrize("rate", [None, "1e-3", [0.1], jnp.ones(3)])
def test_a_learning_rate_that_is_none(rate):
    refuses(
        lambda: rl.raclora(rate, 2, key=0), "learning_rate", "schedule", error=TypeError
    )


@pytest.mark.parametrize("decay", [None, "0.1", lambda step: 0.1])
def test_a_weight_decay_that_is_no_number(decay):
    refuses(
        lambda: rl.raclora(0.1, 2, weight_decay=decay, key=0),
        "weight_decay",
        error=TypeError,
    )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_leaves_below_16_bits(dtype):
    params = {"kernel": jnp.zeros((8, 6), dtype), "other": jnp.zeros((8, 6))}
    way_out = ("'kernel'", dtype, "mode='frozen'")
    refuses(lambda: rl.raclora(0.1, 2, key=0).init(params), *way_out, error=ValueError)
    refuses(lambda: rl.init_adapter(params, 2, key=0), *way_out, error=ValueError)
    spec = rl.Spec(2, rules=[rl.Rule("kernel", mode="frozen")])
    rl.raclora(0.1, spec, key=0).init(params)


def test_a_tree_flattened_to_a_vector():
    tx = optax.flatten(rl.raclora(0.1, 2, key=0))
    refuses(lambda: tx.init(weights("float32")), "optax.flatten", error=ValueError)


def test_optax_apply_updates_on_factors():
    params, tx = weights("float32"), rl.raclora(0.1, SPEC, key=0)
    state = tx.init(params)
    grads = rl.grad(loss_fn, SPEC)(params, state, X)
    updates, _ = tx.update(grads, state, params)
    way_out = "raclora_jax.apply_updates"
    refuses(lambda: optax.apply_updates(params, updates), way_out, error=TypeError)
    host = jax.tree.map(np.asarray, params)
    refuses(lambda: optax.apply_updates(host, updates), way_out, error=TypeError)


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "ema after": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "trace before": lambda tx: optax.chain(optax.trace(0.9), tx),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_factors_under_wrappers_that_keep_dense_state(name):
    params = weights("float32")
    state = WRAPPERS[name](rl.raclora(0.1, SPEC, key=0)).init(params)
    grad_fn = rl.value_and_grad(loss_fn, SPEC)
    refuses(lambda: grad_fn(params, state, X), "'kernel'", "inner=", error=ValueError)


def test_a_damaged_checkpoint():
    params, tx = weights("float32"), rl.raclora(0.1, SPEC, key=0)
    state = tx.update(params, tx.init(params), params)[1]
    sketches = {k: v.at[0, 0].set(jnp.nan) for k, v in state.sketches.values.items()}
    damaged = {
        "count=-1": state._replace(count=jnp.int32(-1)),
        "step_in_link=-2": state._replace(step_in_link=jnp.int32(-2)),
        "NaN": state._replace(sketches=state.sketches._replace(values=sketches)),
        "float32 of shape ()": state._replace(count=jnp.float32(1)),
    }
    for piece, broken in damaged.items():
        refuses(lambda s=broken: tx.update(params, s, params), piece, error=ValueError)
    grad_fn = rl.value_and_grad(loss_fn, SPEC)
    for piece in ("count=-1", "NaN"):
        refuses(lambda s=damaged[piece]: grad_fn(params, s, X), piece, error=ValueError)


def test_leaves_too_small_for_the_rank_are_one_line():
    small = {f"small_{i}": jnp.ones((2, 9)) for i in range(5)}
    costs = rl.summary({**small, "kernel": jnp.ones((8, 6))}, 2)
    said = [text for text in costs.warnings if "sketched side" in text]
    assert len(said) == 1
    assert "'small_0' and 4 more" in said[0]


def test_float16_just_above_its_largest_number():
    """Rounds as the nearest cast: 65510 stays, 65530 does not."""
    keys = jax.random.split(jax.random.key(0), 400)
    for value, want in ((65510.0, 65504.0), (-65510.0, -65504.0), (65530.0, np.inf)):
        exact = jnp.full((4,), value)
        drawn = jax.vmap(lambda k, x=exact: rounding.stochastic(x, jnp.float16, k))(keys)
        np.testing.assert_array_equal(drawn, want)
