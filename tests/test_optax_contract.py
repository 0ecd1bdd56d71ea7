"""What optax asks of a transformation, asked of RAC-LoRA with a projected leaf.

The list follows the checks that optax's contributed optimizers must pass, each with a
leaf that is really projected (rank below both sides, sides that differ), first for dense
gradients and then, where it can be said at all, for ``Factor`` gradients.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import product, repeat

import raclora_jax as rl

EVERY = 3
STEPS = 2 * EVERY + 1
SPEC = rl.Spec(2, alpha=3.0, resample_every=EVERY)
FORMS = ("dense", "factor")
F32 = 1e-5  # for short runs of float32 steps on weights of order one
BODY = {"body": {"bias": (4,), "kernel": (7, 4)}}
WHOLE = BODY | {"head": {"kernel": (4, 9)}}


def tree_of(seed, shapes=None, lead=(), dtype="float32"):
    """Normal values in the tree of the given shapes, a step axis in front if asked."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(rng.normal(size=(*lead, *shape)), jnp.dtype(dtype)),
        BODY if shapes is None else shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS = tree_of(0)
STREAM = tree_of(1, lead=(STEPS,))
GRADS = jax.tree.map(lambda g: g[0], STREAM)


def is_chain(node):
    return isinstance(node, rl.RacLoraState)


def chain_state(opt_state):
    (state,) = filter(is_chain, jax.tree.leaves(opt_state, is_leaf=is_chain))
    return state


def as_factors(grads, params, opt_state, spec):
    """Dense gradients in the coordinates the next update will use."""
    state = chain_state(opt_state)
    link = state.link + (state.step_in_link >= spec.resample_every)
    sketches = rl.sample_sketch(params, spec, key=state.key_data, link=link)
    return rl.project(grads, sketches, spec)


def one_step(tx, form, spec, grads, state, params, **extra):
    """One update in either form, applied."""
    if form == "factor":
        grads = as_factors(grads, params, state, spec)
    updates, state = tx.update(grads, state, params, **extra)
    if form == "factor":
        return rl.apply_updates(params, updates), state
    return optax.apply_updates(params, updates), state


def to_numpy(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else np.asarray(leaf)


def trainer(tx, form="dense", spec=SPEC):
    """A compiled scan; gives params and state after every step, as NumPy arrays."""

    def step(carry, grads):
        carry = one_step(tx, form, spec, grads, carry[1], carry[0])
        return carry, carry

    @jax.jit
    def run(params, stream, state):
        state = tx.init(params) if state is None else state
        return jax.lax.scan(step, (params, state), stream)[1]

    def train(params, stream, state=None):
        return jax.tree.map(to_numpy, run(params, stream, state))

    return train


@functools.cache
def plain(form="dense"):
    """The run most wrappers must not change: (params, state) after every step."""
    tx = rl.raclora(0.1, SPEC, weight_decay=0.2, key=0)
    return trainer(tx, form)(PARAMS, STREAM)


def same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def close(actual, expected, tol=F32):
    chex.assert_trees_all_close(actual, expected, rtol=tol, atol=tol)


def at(tree, index):
    return jax.tree.map(operator.itemgetter(index), tree)


def types(tree):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree
    )


@contextlib.contextmanager
def compilations():
    """A list of what JAX says about compiling while the context is open."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield heard
    finally:
        logger.removeHandler(handler)
        heard[:] = [text for text in heard if "XLA compilation" in text]


# Extra arguments, compilation, hyperparameters.


@pytest.mark.parametrize("form", FORMS)
def test_extra_args_are_accepted_and_reach_the_inner_rule(form):
    def update(updates, state, params=None, *, gain=1.0, **extra):
        assert params is None
        reached.append(extra)
        return jax.tree.map(lambda u: gain * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    reached, moved = [], []
    for rule, extra in ((inner, {"gain": 2.0}), (optax.scale(2.0), {})):
        tx = rl.raclora(0.1, SPEC, inner=rule, key=0)

        @jax.jit
        def step(params, tx=tx, extra=extra):
            extra = extra | {"unknown": 1}
            return one_step(tx, form, SPEC, GRADS, tx.init(params), params, **extra)[0]

        moved.append(step(PARAMS))
    close(*moved)
    # With the plans of the leaves it was called for, of one mode in a call.
    plans = reached[-1].pop("plans")
    assert len({plan.mode for plan in plans.values()}) == 1
    assert reached[-1] == {"unknown": 1}


@pytest.mark.smoke
@pytest.mark.parametrize("form", FORMS)
def test_compiles_once(form):
    """Not at step 2, not at a new link, not after a restore from plain arrays."""
    chex.clear_trace_counter()
    tx = rl.raclora(0.1, SPEC, weight_decay=0.1, key=0)
    params, state = jax.tree.map(jnp.asarray, PARAMS), jax.jit(tx.init)(PARAMS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(grads, state, params):
        return one_step(tx, form, SPEC, grads, state, params)

    with compilations() as first:
        params, state = step(at(STREAM, 0), state, params)
    assert len(first) == 1  # and not none: the log can be heard
    with compilations() as later:
        for k in range(1, EVERY + 1):
            params, state = step(at(STREAM, k), state, params)
    saved = jax.tree.map(np.asarray, (params, state))
    params, state = jax.tree.map(jnp.asarray, saved)
    with compilations() as restored:
        for k in range(EVERY + 1, STEPS):
            params, state = step(at(STREAM, k), state, params)
    assert restored == []
    assert later == []
    assert state.count == STEPS


@pytest.mark.parametrize("injected", [False, True])
def test_compiles_once_without_jit(injected):
    """Eager updates reuse what the first step and the first new link compiled."""
    make = optax.inject_hyperparams(rl.raclora) if injected else rl.raclora
    tx = make(0.1, SPEC, key=0)
    state = tx.init(PARAMS)
    with compilations() as first:
        _, state = tx.update(GRADS, state, PARAMS)
    assert first
    with compilations() as later:
        for _ in range(EVERY):
            _, state = tx.update(GRADS, state, PARAMS)
    assert later == []


@pytest.mark.parametrize(
    ("form", "key"), [("dense", jax.random.key(0)), ("factor", 0)], ids=FORMS
)
def test_inject_hyperparams_equals_plain(form, key):
    """Rate and decay traced, the key an array: the same run, and rates can be set."""
    tx = optax.inject_hyperparams(rl.raclora)(9.0, SPEC, weight_decay=0.2, key=key)
    state = jax.jit(tx.init)(PARAMS)
    assert {"learning_rate", "weight_decay", "key"} <= state.hyperparams.keys()
    # Set by hand what was 9.
    state.hyperparams["learning_rate"] = jnp.asarray(0.1, jnp.float32)
    seen, states = trainer(tx, form)(PARAMS, STREAM, state)
    expected, expected_states = plain(form)
    close(seen, expected)
    close(states.inner_state, expected_states)


def test_inject_hyperparams_with_schedules_and_traced_inner_settings():
    def factory(learning_rate, b1):
        inner = optax.scale_by_adam(b1=b1)
        return rl.raclora(learning_rate, SPEC, inner=inner, key=2)

    def rate(count):
        return 0.1 / (count + 1)

    injected = optax.inject_hyperparams(factory)(learning_rate=rate, b1=0.5)
    expected, _ = trainer(factory(rate, 0.5))(PARAMS, STREAM)
    close(trainer(injected)(PARAMS, STREAM)[0], expected)


INNERS = {
    "injected": optax.inject_hyperparams(optax.scale_by_adam)(b1=0.5),
    "masked": optax.masked(
        optax.scale_by_adam(b1=0.5), lambda tree: jax.tree.map(lambda leaf: True, tree)
    ),
}


@pytest.mark.parametrize(
    ("form", "inner"),
    product(FORMS, INNERS, repeats=[("dense", "injected"), ("factor", "masked")]),
)
def test_rules_around_the_inner_rule_change_nothing(form, inner):
    plain = rl.raclora(0.1, SPEC, inner=optax.scale_by_adam(b1=0.5), key=2)
    around = rl.raclora(0.1, SPEC, inner=INNERS[inner], key=2)
    close(
        trainer(around, form)(PARAMS, STREAM)[0], trainer(plain, form)(PARAMS, STREAM)[0]
    )


def test_a_new_link_keeps_what_was_set_by_hand_and_the_noise():
    inner = optax.chain(
        INNERS["injected"], optax.add_noise(eta=0.1, gamma=0.5, key=jax.random.key(3))
    )
    tx = rl.raclora(0.1, SPEC, inner=inner, key=2)
    state = tx.init(PARAMS)
    adam, noise = state.inner_state.lowrank
    adam.hyperparams["b1"] = jnp.asarray(0.7, jnp.float32)
    keys = [jax.random.key_data(noise.rng_key)]
    for _ in range(EVERY + 1):
        _, state = tx.update(GRADS, state, PARAMS)
        adam, noise = state.inner_state.lowrank
        assert adam.hyperparams["b1"] == jnp.float32(0.7)
        keys.append(jax.random.key_data(noise.rng_key))
    assert len({key.tobytes() for key in map(np.asarray, keys)}) == EVERY + 2


def test_a_leaf_that_is_a_number():
    params, grads = PARAMS | {"scale": 1.0}, GRADS | {"scale": jnp.float32(0.5)}
    tx = rl.raclora(0.1, SPEC, inner=optax.identity(), weight_decay=0.2, key=0)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["scale"] == pytest.approx(-0.1 * (0.5 + 0.2))


def test_a_traced_spec_is_refused_with_the_way_out():
    tx = optax.inject_hyperparams(rl.raclora)(0.1, 2, key=0)
    with pytest.raises(TypeError, match="static_args"):
        jax.eval_shape(tx.init, PARAMS)
    tx = optax.inject_hyperparams(rl.raclora, static_args="spec")(0.1, 2, key=0)
    assert chain_state(jax.eval_shape(tx.init, PARAMS)).count.shape == ()


# Dtypes, types and shapes.


@pytest.mark.parametrize("weights", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("gradient", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_kept(weights, gradient):
    """Updates in the dtype of the gradient, state in float32, in both forms."""
    params, grads = tree_of(0, dtype=weights), tree_of(1, dtype=gradient)
    for tx in (
        rl.raclora(0.1, SPEC, weight_decay=0.1, key=0),
        rl.scale_by_raclora(SPEC, key=0),
    ):
        state = jax.eval_shape(tx.init, params)
        factors = jax.eval_shape(
            lambda g, p, s: as_factors(g, p, s, SPEC), grads, params, state
        )
        for given in (grads, factors):
            updates, after = jax.eval_shape(tx.update, given, state, params)
            assert jax.tree.structure(updates) == jax.tree.structure(given)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, given)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        floats = [
            x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


RULES = {
    "adam": lambda: optax.scale_by_adam(),
    "half a moment": lambda: optax.scale_by_adam(mu_dtype=jnp.bfloat16),
    "trace": lambda: optax.trace(0.9, nesterov=True, accumulator_dtype=jnp.float16),
    "steps": lambda: optax.MultiSteps(optax.scale_by_adam(), 2),
    "orthogonal": lambda: rl.orthogonal(momentum=0.9, second_moment=True, memory=0.5),
}


@pytest.mark.parametrize(
    ("dtype", "moments"),
    product(
        ["float16", "bfloat16", "float32", "float64"],
        ["reset", "transport"],
        repeats=[("float16", "reset"), ("bfloat16", "transport")],
    ),
)
def test_state_is_stable_under_cond(dtype, moments):
    """Shape, dtype and weak type of no leaf move, whatever the dtypes around."""
    with jax.enable_x64(dtype == "float64"):
        params, grads = tree_of(0, dtype=dtype), tree_of(1, dtype=dtype)
        # A rate in another dtype than anything else, to confuse what can be confused.
        other = jnp.bfloat16 if dtype == "float16" else jnp.float16
        for make_rule in RULES.values():
            tx = rl.raclora(
                lambda count: jnp.asarray(0.1, other) / (1 + count),
                SPEC,
                inner=make_rule(),
                moments=moments,
                weight_decay=0.1,
                key=0,
            )

            def step(params, state, take, tx=tx):
                updates, state = jax.lax.cond(
                    take,
                    lambda: tx.update(grads, state, params),
                    lambda: (jax.tree.map(jnp.zeros_like, grads), state),
                )
                return optax.apply_updates(params, updates), state

            state = jax.eval_shape(tx.init, params)
            after = jax.eval_shape(step, params, state, True)
            assert types(after) == types((params, state))


def test_state_is_stable_when_run():
    tx = rl.raclora(0.1, SPEC, weight_decay=0.1, key=0)
    state = tx.init(PARAMS)
    before = types(state)
    for _ in range(EVERY + 1):
        _, state = tx.update(GRADS, state, PARAMS)
        assert types(state) == before


def test_abstract_init():
    """Shapes are enough, given directly or through ``eval_shape``."""
    shapes = jax.eval_shape(lambda: PARAMS)
    tx = rl.raclora(0.1, SPEC, key=0)
    concrete, from_shapes = tx.init(PARAMS), tx.init(shapes)
    same_bits(from_shapes, concrete)
    assert types(jax.eval_shape(tx.init, PARAMS)) == types(concrete)
    assert types(jax.eval_shape(tx.init, shapes)) == types(concrete)


def test_a_donated_state_leaves_the_transformation_usable():
    """The state must not share a buffer with the key inside the transformation."""
    tx = rl.raclora(0.1, SPEC, key=0)
    step = jax.jit(functools.partial(one_step, tx, "dense", SPEC), donate_argnums=(1,))
    first, state = step(GRADS, tx.init(PARAMS), PARAMS)
    step(GRADS, state, first)
    again, _ = step(GRADS, tx.init(PARAMS), PARAMS)
    same_bits(again, first)


# Learning rates.


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_schedule_is_a_constant(form):
    tx = rl.raclora(optax.constant_schedule(0.1), SPEC, weight_decay=0.2, key=0)
    close(trainer(tx, form)(PARAMS, STREAM), plain(form))


def test_is_the_chain_of_its_parts():
    """float32: scale_by_raclora, decoupled decay, learning rate."""

    def rate(count):
        return 0.1 / (1 + count)

    mask = {"body": {"bias": False, "kernel": True}}
    whole = rl.raclora(rate, SPEC, weight_decay=0.3, mask=mask, key=4)
    parts = optax.chain(
        rl.scale_by_raclora(SPEC, key=4),
        optax.add_decayed_weights(0.3, mask),
        optax.scale_by_learning_rate(rate),
    )
    seen, states = trainer(parts)(PARAMS, STREAM)
    close((seen, states[0]), trainer(whole)(PARAMS, STREAM))


# Wrappers of optax around the transformation.


def test_accumulation_outside():
    """``MultiSteps`` around the whole: the mean gradient steps, nothing else moves."""
    tx = optax.MultiSteps(rl.raclora(0.1, SPEC, weight_decay=0.2, key=0), 2)
    # Two halves whose mean is the gradient of the plain run.
    stream = jax.tree.map(lambda g: np.repeat(g, 2, axis=0), STREAM)
    for leaf in jax.tree.leaves(stream):
        leaf[::2] += 1.0
        leaf[1::2] -= 1.0
    seen, states = trainer(tx)(PARAMS, stream)
    expected, expected_states = plain()
    close(at(seen, np.s_[1::2]), expected)
    same_bits(at(seen, 0), PARAMS)
    same_bits(at(seen, np.s_[2::2]), at(seen, np.s_[1:-1:2]))
    close(chain_state(at(states, -1)), at(expected_states, -1))


# The head is outside the mask, and so must not be adapted in the spec.
HEADLESS = rl.Spec(
    2, alpha=3.0, resample_every=EVERY, rules=[rl.Rule("head/.*", mode="dense")]
)


def with_head(seed, body, lead=()):
    return tree_of(seed, {"head": WHOLE["head"]}, lead) | body


@pytest.mark.smoke
@pytest.mark.parametrize(("form", "prefix"), [("dense", False), ("factor", True)])
def test_masked(form, prefix):
    """Outside the mask nothing changes; inside it is the run of that part alone."""
    inside = True if prefix else {"kernel": True, "bias": True}
    mask = {"head": False if prefix else {"kernel": False}, "body": inside}
    params, stream = with_head(2, PARAMS), with_head(3, STREAM, (STEPS,))
    tx = optax.chain(
        optax.masked(rl.raclora(0.1, HEADLESS, weight_decay=0.2, key=0), mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(operator.not_, mask)),
    )
    seen, states = trainer(tx, form, HEADLESS)(params, stream)
    expected, expected_states = plain(form)
    close(seen["body"], expected["body"])
    close(chain_state(states), expected_states)
    same_bits(at(seen["head"], -1), params["head"])


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("form", "labels"),
    [("dense", "computed"), ("factor", "computed"), ("factor", "tree")],
)
def test_partition(form, labels):
    """Another rule for the rest; labels may stop early or be computed."""

    def computed(tree):
        # optax calls this with the gradients too, where a Factor is one leaf.
        def is_leaf(node):
            return isinstance(node, rl.Factor)

        head = jax.tree.map(lambda _: "other", tree["head"], is_leaf=is_leaf)
        body = jax.tree.map(lambda _: "chain", tree["body"], is_leaf=is_leaf)
        return {"head": head, "body": body}

    prefix = {"head": "other", "body": "chain"}
    params, stream = with_head(2, PARAMS), with_head(3, STREAM, (STEPS,))
    chain = rl.raclora(0.1, HEADLESS, weight_decay=0.2, key=0)
    rules = {"chain": chain, "other": optax.sgd(0.1)}
    tx = optax.partition(rules, computed if labels == "computed" else prefix)
    seen, _ = trainer(tx, form, HEADLESS)(params, stream)
    close(seen["body"], plain(form)[0]["body"])
    descent = params["head"]["kernel"] - 0.1 * stream["head"]["kernel"].cumsum(0)
    close(seen["head"]["kernel"], descent)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("dense", "float32"), ("factor", "float32"), ("dense", "bfloat16")],
)
def test_apply_if_finite_spends_nothing_on_a_rejected_step(form, dtype):
    """NaN at a link's first step: the run goes on as if that step had not been."""
    params, stream = tree_of(0, dtype=dtype), tree_of(1, None, (STEPS,), dtype)
    poisoned = jax.tree.map(lambda g: np.insert(g, EVERY, g[0], 0)[:STEPS], stream)
    poisoned["body"]["kernel"][EVERY, 1, 2] = np.nan  # one bad entry is enough
    tx = optax.apply_if_finite(rl.raclora(0.1, SPEC, weight_decay=0.2, key=0), 5)
    train = trainer(tx, form)
    expected, clean = train(params, stream)
    seen, states = train(params, poisoned)
    same_bits(at(seen, EVERY), at(seen, EVERY - 1))
    same_bits(at(states.inner_state, EVERY), at(states.inner_state, EVERY - 1))
    kept = np.delete(np.arange(STEPS), EVERY)
    same_bits(at(seen, kept), at(expected, np.s_[:-1]))
    same_bits(at(states.inner_state, kept), at(clean.inner_state, np.s_[:-1]))
    assert states.total_notfinite[-1] == 1
    if dtype == "float32":
        close(expected, plain(form)[0])


@pytest.mark.parametrize("form", FORMS)
def test_in_a_chain(form):
    """Leaf-wise scaling before and after acts alike in both forms."""
    core = rl.raclora(0.4, SPEC, weight_decay=0.2, key=0)
    tx = optax.chain(optax.scale(2.0), core, optax.scale(0.25))
    # Adam forgets the 2; 0.4 * 0.25 is the rate of the plain run, decay included.
    seen, _ = trainer(tx, form)(PARAMS, STREAM)
    close(seen, plain(form)[0])


def test_forms_agree_over_several_leaves():
    """Dense and factor gradients: one run, decay and frozen leaves included."""
    rules = [rl.Rule("head/.*", side="left"), rl.Rule("body/bias", mode="frozen")]
    spec = rl.Spec(2, alpha=3.0, resample_every=EVERY, rules=rules)
    tx = rl.raclora(0.1, spec, weight_decay=0.3, key=5)
    trainers = [trainer(tx, form, spec) for form in FORMS]
    for seed in range(3):
        params, stream = tree_of(seed, WHOLE), tree_of(9 - seed, WHOLE, (STEPS,))
        one, other = (train(params, stream) for train in trainers)
        close(other, one)
        last = at(one[0], -1)
        same_bits(last["body"]["bias"], params["body"]["bias"])
        assert np.abs(last["body"]["kernel"] - params["body"]["kernel"]).min() > 0


@pytest.mark.smoke
def test_map_params():
    """Alone nothing mirrors the params; in a chain the other states are mapped."""
    alone = rl.raclora(0.1, SPEC, key=0)
    state = jax.jit(alone.init)(PARAMS)
    same_bits(optax.tree.map_params(alone, lambda leaf: leaf * 0 - 1, state), state)
    tx = optax.chain(optax.trace(0.9), optax.masked(alone, {"body": True}))
    state = jax.jit(tx.init)(PARAMS)
    trace, rest = optax.tree.map_params(tx, lambda s, p: s + p, state, PARAMS)
    same_bits(trace.trace, PARAMS)
    same_bits(rest, state[1])


@pytest.mark.parametrize("form", FORMS)
def test_scan_is_the_python_loop(form):
    tx = rl.raclora(0.1, SPEC, weight_decay=0.2, key=0)
    step = jax.jit(functools.partial(one_step, tx, form, SPEC))
    seen, states = plain(form)
    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    for k in range(STEPS):
        params, state = step(at(STREAM, k), state, params)
        close((params, state), (at(seen, k), at(states, k)))


def test_eager_is_compiled():
    tx = rl.raclora(0.1, SPEC, weight_decay=0.2, key=0)
    params, state = PARAMS, tx.init(PARAMS)
    for k in range(EVERY + 1):
        params, state = one_step(tx, "dense", SPEC, at(STREAM, k), state, params)
    close((params, state), at(plain(), EVERY))


# MultiSteps as the inner rule: accumulation in factor space.


def every_k(case):
    """(every_k_schedule, how many mini-steps each emission takes)."""
    if case == "growing":
        return (lambda emitted: 1 + emitted % 3), [1, 2, 3, 1, 2, 3, 1]
    return case, [case] * 7


@pytest.mark.parametrize(
    ("form", "case", "resample_every", "moments"),
    [
        repeat("factor", 2, 3, "reset"),
        ("factor", 3, 2, "transport"),
        ("dense", "growing", 2, "reset"),
        repeat("dense", 2, 1, "keep"),
    ],
)
def test_accumulation_inside(form, case, resample_every, moments):
    """Count, link, schedule, decay and moments advance at emissions only."""
    schedule, sizes = every_k(case)
    spec = rl.Spec(2, alpha=3.0, resample_every=resample_every)
    stream = tree_of(1, lead=(sum(sizes),))

    def train(inner, stream):
        tx = rl.raclora(
            lambda count: 0.1 / (1 + count),
            spec,
            inner=inner,
            moments=moments,
            weight_decay=0.2,
            key=0,
        )
        return trainer(tx, form, spec)(PARAMS, stream)

    steps = optax.MultiSteps(optax.scale_by_adam(), schedule)
    seen, states = train(steps.gradient_transformation() if case == 3 else steps, stream)

    ends = np.cumsum(sizes)
    spans = list(zip(ends, sizes, strict=True))
    means = jax.tree.map(
        lambda g: np.stack([g[e - k : e].mean(0) for e, k in spans]), stream
    )
    expected, by_hand = train(optax.scale_by_adam(), means)
    emitted = at(states, ends - 1)
    close(at(seen, ends - 1), expected)
    same_bits(emitted.count, by_hand.count)
    close(emitted.sketches, by_hand.sketches)
    moments_of = emitted.inner_state.lowrank.inner_opt_state
    close(moments_of, by_hand.inner_state.lowrank)
    # Between emissions the weights stand still, decay included, to the bit.
    before = jax.tree.map(lambda w, s: np.concatenate([w[None], s[:-1]]), PARAMS, seen)
    waits = np.setdiff1d(np.arange(sum(sizes)), ends - 1)
    same_bits(at(seen, waits), at(before, waits))
    same_bits(states.count[waits], np.searchsorted(ends, waits, side="right"))


@pytest.mark.parametrize("moments", ["reset", "transport"])
def test_accumulation_inside_may_skip(moments):
    """A mini-step skipped at the start of a link does not begin that link twice."""
    inner = optax.MultiSteps(
        optax.trace(0.9), 2, should_skip_update_fn=optax.skip_not_finite
    )
    spec = rl.Spec(2, resample_every=2)
    train = trainer(rl.raclora(0.1, spec, inner=inner, moments=moments, key=0), spec=spec)
    bad = 4  # the first mini-step of the second link
    poisoned = jax.tree.map(lambda g: np.insert(g, bad, np.nan, axis=0)[:-1], STREAM)
    expected, clean = train(PARAMS, STREAM)
    seen, states = train(PARAMS, poisoned)
    kept = np.delete(np.arange(STEPS), bad)
    close(at(seen, kept), at(expected, np.s_[:-1]))
    same_bits(states.count[kept], clean.count[:-1])


# Moments at a new link, against chains written by hand.


@pytest.mark.parametrize("moments", ["reset", "keep", "transport"])
def test_moments_at_a_new_link(moments):
    """Adam: reset starts afresh, counter too; keep keeps all; transport turns mu."""
    rule = optax.scale_by_adam(0.8, 0.9)
    tx = rl.scale_by_raclora(SPEC, inner=rule, moments=moments, key=0)
    kernel = PARAMS["body"]["kernel"]
    sketches = [rl.sample_sketch(PARAMS, SPEC, key=0, link=link) for link in (0, 1)]
    old, new = (tree["body"]["kernel"] for tree in sketches)

    def by_hand(grads):
        """The factor loop in plain sight: project, step, lift."""
        state, directions = rule.init(jnp.zeros((2, 7))), []
        for step in range(2 * EVERY):
            sketch = sketches[step // EVERY]
            if step == EVERY and moments == "reset":
                state = rule.init(jnp.zeros((2, 7)))
            if step == EVERY and moments == "transport":
                # Sketches (rank, cols) are orthonormal, factors (rank, rows).
                state = state._replace(mu=(new @ old.T) @ state.mu)
            projected = rl.project(at(grads, step), sketch, SPEC)
            moved, state = rule.update(projected["body"]["kernel"].value, state)
            directions.append(1.5 * moved.T @ sketch["body"]["kernel"])
        return jnp.stack(directions), state

    def by_library(grads):
        def step(state, grads):
            updates, state = tx.update(grads, state)
            return state, updates["body"]["kernel"]

        state, updates = jax.lax.scan(step, tx.init(PARAMS), grads)
        return updates, state.inner_state.lowrank

    stream = at(STREAM, np.s_[: 2 * EVERY])
    expected, hand = jax.jit(by_hand)(stream)
    actual, state = jax.jit(by_library)(stream)
    assert expected[0].shape == kernel.shape
    close(actual, expected)
    close(jax.tree.leaves(state), jax.tree.leaves(hand))


@pytest.mark.parametrize(
    ("sketch", "rule"), [("orthonormal", "trace"), ("gaussian_raw", "adam")]
)
def test_transport_projects_the_lifted_momentum(sketch, rule):
    """P of the old lifted momentum on the new span, for every side and batch axis."""
    views = {
        "left": ((4, 7), reference.Leaf("left", (0,))),
        "right": ((7, 4), reference.Leaf("right", (0,))),
        "stack": ((5, 2, 4), reference.Leaf("right", (0,), (1,))),
        "heads": ((5, 2, 3), reference.Leaf("left", (0,))),
    }
    spec = rl.Spec(
        2,
        alpha=3.0,
        resample_every=2,
        sketch=sketch,
        rules=[rl.Rule("stack", batch=1), rl.Rule("heads", rows=0)],
    )
    params = tree_of(0, {name: shape for name, (shape, _) in views.items()})
    stream = tree_of(1, {name: shape for name, (shape, _) in views.items()}, (2,))
    inner = optax.trace(0.9) if rule == "trace" else optax.scale_by_adam(0.9)
    field = "trace" if rule == "trace" else "mu"
    tx = rl.scale_by_raclora(spec, inner=inner, moments="transport", key=0)

    @jax.jit
    def run():
        state = tx.init(params)
        for k in range(2):
            _, state = tx.update(at(stream, k), state, params)
        quiet = jax.tree.map(jnp.zeros_like, params)
        return state, tx.update(quiet, state, params)[1]

    old, new = run()
    momenta = [getattr(state.inner_state.lowrank, field) for state in (old, new)]
    sketches = [state.sketches.values for state in (old, new)]
    lift = functools.partial(rl.lift, params=params, spec=spec)
    before, after = map(lift, momenta, sketches)
    for name, (_, leaf) in views.items():
        # A step with no gradient keeps 0.9 of the momentum it finds.
        want = 0.9 * reference.momentum_in_new_span(before[name], sketches[1][name], leaf)
        scale = np.abs(before[name]).max()
        np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-4 * scale)
        assert np.abs(after[name] - 0.9 * before[name]).max() > 0.01 * scale
    if rule == "adam":
        nu = [state.inner_state.lowrank.nu for state in (old, new)]
        close(nu[1], jax.tree.map(lambda v: 0.999 * v, nu[0]))
        assert new.inner_state.lowrank.count == 3
