"""A run that stopped anywhere and was restored goes on with the same bits."""

import functools
import itertools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_same_bits

import raclora_jax as rl

NAMES = itertools.count()
STEPS, EVERY = 8, 3
# After one step, one before a link change, exactly at it, one after it.
STOPS = (1, EVERY - 1, EVERY, EVERY + 1, 2 * EVERY)


def spec_of(**fields):
    rules = [rl.Rule(".*/stack", batch=0, rank=2)]
    return rl.Spec(3, resample_every=EVERY, rules=rules, **fields)


# name: (spec, weight dtype, the transformation's arguments, steps in factor form)
RUNS = {
    "reset": (spec_of(), "float32", {"weight_decay": 0.1}, False),
    "keep": (spec_of(cache=False), "float32", {"moments": "keep"}, True),
    "transport": (
        spec_of(sketch="gaussian_raw"),
        "float32",
        {"moments": "transport", "inner": optax.trace(0.9)},
        False,
    ),
    "accumulation": (
        spec_of(),
        "float32",
        {"inner": optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation()},
        False,
    ),
    "bfloat16, a master": (spec_of(rounding="master"), "bfloat16", {}, False),
    "bfloat16, stochastic": (spec_of(), "bfloat16", {}, True),
    "blocks, no moments": (
        spec_of(sketch="block", alpha="dim"),
        "bfloat16",
        {"inner": rl.orthogonal()},
        True,
    ),
    "blocks, both moments": (
        spec_of(sketch="block"),
        "float32",
        {"inner": rl.orthogonal(momentum=0.9, second_moment=True, memory=0.5)},
        False,
    ),
}


def initial(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "layer_0": {"kernel": jax.random.normal(keys[0], (9, 7)), "bias": jnp.ones(7)},
        "layers": {"stack": jax.random.normal(keys[1], (2, 5, 6))},
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def transformation(spec, fields, key=7):
    rate = optax.linear_schedule(0.1, 0.01, STEPS)
    # In a chain, as in the examples: the state sits somewhere inside.
    return optax.chain(rl.raclora(rate, spec, key=key, **fields))


def once(function):
    """Compiles a function that may be traced once, by whatever state comes first."""
    # chex counts by name and source; each of ours counts for itself.
    function.__name__ += f"_{next(NAMES)}"
    return jax.jit(chex.assert_max_traces(n=1)(function))


def stepper(tx, spec, factor_form):
    @once
    def step(params, opt_state, index):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index), 9)
        leaves, treedef = jax.tree.flatten(params)
        grads = [
            jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys, strict=False)
        ]
        grads = jax.tree.unflatten(treedef, grads)
        if factor_form:
            link = opt_state[0].count // EVERY
            grads = rl.project(
                grads, rl.sample_sketch(params, spec, key=7, link=link), spec
            )
        updates, opt_state = tx.update(grads, opt_state, params)
        if factor_form:
            return rl.apply_updates(params, updates), opt_state
        return optax.apply_updates(params, updates), opt_state

    return step


@functools.cache
def uninterrupted(name):
    """``(step, tx, [(params, opt_state) after 0, 1, ... steps])``."""
    spec, dtype, fields, factor_form = RUNS[name]
    tx = transformation(spec, fields)
    step = stepper(tx, spec, factor_form)
    params = initial(dtype)
    states = [(params, tx.init(params))]
    for index in range(STEPS):
        states.append(step(*states[-1], index))
    return step, tx, states


def go_on(step, params, opt_state, done):
    for index in range(done, STEPS):
        params, opt_state = step(params, opt_state, index)
    return params, opt_state


@pytest.mark.parametrize("name", RUNS)
def test_msgpack_at_any_step(name):
    """Restored into a fresh template, and without compiling anything anew."""
    step, tx, states = uninterrupted(name)
    links = [int(state[0].count) // EVERY for _, state in states]
    assert links[-1] >= 1
    assert not np.array_equal(
        states[0][0]["layer_0"]["kernel"], states[-1][0]["layer_0"]["kernel"]
    )
    template = (states[0][0], tx.init(states[0][0]))
    for done in range(STEPS + 1):
        text = flax.serialization.to_bytes(states[done])
        assert isinstance(text, bytes)
        restored = flax.serialization.from_bytes(template, text)
        assert_same_bits(restored, states[done])
        if done in STOPS:
            assert_same_bits(go_on(step, *restored, done), states[-1])


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_may_drop_the_sketches(name):
    """The cache is derived: a fresh one in its place is filled again."""
    step, tx, states = uninterrupted(name)
    for done in STOPS:
        params, (state,) = states[done]
        kept = state._asdict()
        kept.pop("sketches")
        text = flax.serialization.msgpack_serialize(
            flax.serialization.to_state_dict(kept)
        )
        (fresh,) = tx.init(params)
        template = fresh._asdict()
        sketches = template.pop("sketches")
        saved = flax.serialization.from_bytes(template, text)
        resumed = (rl.RacLoraState(**saved, sketches=sketches),)
        got = go_on(step, params, resumed, done)
        assert_same_bits(got[0], states[-1][0])
        assert_same_bits(got[1][0]._asdict(), states[-1][1][0]._asdict())


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["keep", "bfloat16, a master"])
def test_orbax_in_a_new_process(name, tmp_path):
    """Nothing is kept but the folder: spec, transformation and step are built anew.

    State dicts are keyed by path, so their keys hold "/".
    """
    _, _, states = uninterrupted(name)
    spec, dtype, fields, factor_form = RUNS[name]
    done = EVERY
    params, opt_state = states[done]
    assert "layer_0/kernel" in opt_state[0].inner_state.lowrank.mu
    (tmp_path / "spec.json").write_text(spec.to_json())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "opt": opt_state})

    saved = rl.Spec.from_json((tmp_path / "spec.json").read_text())
    spec.check_resumes(saved)
    # All randomness is in the state: another key at resume changes nothing.
    tx = transformation(saved, fields, key=12345)
    shapes = jax.eval_shape(lambda: initial(dtype))
    template = {"params": shapes, "opt": jax.eval_shape(tx.init, shapes)}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "step", template)
    restored = restored["params"], restored["opt"]
    assert_same_bits(restored, states[done])
    step = stepper(tx, saved, factor_form)
    assert_same_bits(go_on(step, *restored, done), states[-1])


@pytest.mark.smoke
@pytest.mark.parametrize("cache", [True, False])
def test_the_adapter_form_resumes(cache, tmp_path):
    """Base weights, factors and chain through msgpack; the sketches may be dropped."""
    spec = rl.Spec(2, cache=cache)
    base = initial("bfloat16")["layer_0"]
    target = jax.random.normal(jax.random.key(5), (9, 7))

    def loss(params):
        return jnp.mean((params["kernel"].astype(jnp.float32) - target) ** 2)

    @once
    def step(base, factors, chain):
        grads = jax.grad(rl.adapted(loss, spec))(factors, base, chain)
        factors = jax.tree.map(lambda f, g: f - 3.0 * g, factors, grads)
        return rl.next_link(base, factors, chain, spec)

    state = start = (base, *rl.init_adapter(base, spec, key=3))
    states = [state := step(*state) for _ in range(4)]
    text = flax.serialization.to_bytes(states[1])
    restored = flax.serialization.from_bytes(start, text)
    assert_same_bits(restored, states[1])
    assert_same_bits(step(*step(*restored)), states[-1])
    chain = restored[2]._replace(sketches={})
    dropped = rl.merge(restored[0], restored[1], chain, spec)
    assert_same_bits(dropped, rl.merge(*states[1], spec))
