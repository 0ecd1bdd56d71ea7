"""Every form of the method gives one trajectory.

The optimizer form with dense gradients, the same with gradients in factor coordinates,
the adapter form and the NumPy oracle of ``reference.py`` start from the same weights and
see the same data; in float64 they must agree to rounding over several links. A layout, a
side, a scaling, a restart or a sketch that any of them gets wrong shows here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import repeat

import raclora_jax as rl
from raclora_jax._core.whiten import POLYNOMIALS

TOLERANCE = 1e-12
EVERY, LINKS, RANK, ALPHA, RATE = 3, 3, 2, 3.0, 0.05
STEPS = EVERY * LINKS

SHAPES = {
    "dense/kernel": (7, 5),
    "dense/bias": (5,),
    "layers/first": (3, 4, 6),
    "layers/second": (5, 2, 4),
    "query": (6, 2, 4),
    "conv": (2, 2, 3, 5),
    "norm": (4, 3),
    "table": (3, 4),
}
RULES = (
    rl.Rule("layers/first", batch=0),
    rl.Rule("layers/second", batch=1, alpha=1.0),
    rl.Rule("query", rows=0),
    rl.Rule("conv", rows=(0, 1, -2), rank=3),
    rl.Rule("norm", mode="dense"),
    rl.Rule("table", mode="frozen"),
)
# Enough to see a fault of the rule or of the state; the layouts are the others' task.
FEW = ("dense/kernel", "dense/bias")
SOME = (*FEW, "layers/second", "query", "norm", "table")
OTHERS = ("dense/bias", "layers/first", "conv")
# (rows, batch, scaling, side that "smaller" must take)
VIEWS = {
    "dense/kernel": ((0,), (), 1.5, "right"),
    "layers/first": ((1,), (0,), 1.5, "left"),
    "layers/second": ((0,), (1,), 0.5, "right"),
    "query": ((0,), (), 1.5, "left"),
    "conv": ((0, 1, 2), (), 1.0, "right"),
}
MAKERS = {
    "identity": (optax.identity, reference.Identity),
    "trace": (lambda: optax.trace(0.9), lambda: reference.Momentum(0.9)),
    "adam": (
        lambda: optax.scale_by_adam(0.8, 0.95, 1e-6),
        lambda: reference.Adam(0.8, 0.95, 1e-6),
    ),
    "lion": (
        lambda: optax.scale_by_lion(0.8, 0.95),
        lambda: reference.Lion(0.8, 0.95),
    ),
    "orthogonal": (rl.orthogonal, lambda: reference.Orthogonal(POLYNOMIALS)),
    "orthogonal, momentum": (
        lambda: rl.orthogonal(momentum=0.8),
        lambda: reference.Orthogonal(POLYNOMIALS, 0.8),
    ),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def spec_of(side, only, **settings):
    return rl.Spec(
        RANK,
        alpha=ALPHA,
        side=side,
        resample_every=EVERY,
        rules=[rule for rule in RULES if rule.path in only],
        **settings,
    )


def leaf_of(path, side):
    others = {"dense/bias": "dense", "norm": "dense", "table": "frozen"}
    if path in others:
        return reference.Leaf(others[path])
    rows, batch, scaling, best = VIEWS[path]
    return reference.Leaf(best if side == "smaller" else side, rows, batch, scaling)


def by_path(tree):
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, rl.Picks)
    )
    return {"/".join(key.key for key in path): leaf for path, leaf in pairs}


def problem(seed, only):
    """Weights, and a loss whose gradient depends on the weights, the entry and the step.

    ``only`` names the leaves.
    """
    rng = np.random.default_rng(seed)

    def normal(*lead):
        tree = {}
        for path, shape in SHAPES.items():
            if path in only:
                *groups, name = path.split("/")
                node = tree
                for group in groups:
                    node = node.setdefault(group, {})
                node[name] = rng.normal(size=(*lead, *shape))
        return tree

    params, slopes, targets = normal(), normal(), normal(STEPS)

    def loss(weights, target):
        def one(w, a, t):
            return jnp.sum(jnp.log(jnp.cosh(a * w - t)))

        return sum(jax.tree.leaves(jax.tree.map(one, weights, slopes, target)))

    flat_slopes, flat_targets = by_path(slopes), by_path(targets)

    def gradient(weights, step):
        return {
            path: flat_slopes[path]
            * np.tanh(flat_slopes[path] * w - flat_targets[path][step])
            for path, w in weights.items()
        }

    return jax.tree.map(jnp.asarray, params), loss, targets, gradient


@functools.cache
def drawn(spec, seed, only):
    """The sketches of every link, stacked; the key is the seed."""
    with jax.enable_x64(True):
        params = problem(seed, only)[0]

        def one(link):
            return rl.sample_sketch(params, spec, key=seed, link=link)

        return jax.jit(lambda links: jax.lax.map(one, links))(jnp.arange(LINKS))


def dense_run(tx, loss, params, state, targets):
    """Plain JAX and optax around the transformation."""

    def step(carry, target):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, target), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda *carry: jax.lax.scan(step, carry, targets)[1])(params, state)


def factor_run(tx, spec, sketches, loss, params, state, targets):
    """Gradients projected before the transformation sees them, links by its count."""

    def step(carry, target):
        params, state = carry
        link = state.link + (state.step_in_link >= spec.resample_every)
        now = jax.tree.map(lambda s: s[link], sketches)
        grads = rl.project(jax.grad(loss)(params, target), now, spec)
        updates, state = tx.update(grads, state, params)
        params = rl.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda *carry: jax.lax.scan(step, carry, targets)[1])(params, state)


def adapter_run(rule, spec, loss, params, seed, targets):
    """LoRA with one frozen factor: train, merge, draw again, restart."""
    base = params
    factors, chain = jax.jit(lambda base: rl.init_adapter(base, spec, key=seed))(base)
    one = optax.chain(rule, optax.scale(-RATE))
    tx = optax.partition({"lowrank": one, "dense": one}, rl.factor_labels(base, spec))
    tx = rl.with_plans(tx, base, spec)
    opt_state = tx.init(factors)
    adapted_loss = rl.adapted(loss, spec)

    @jax.jit
    def one_link(base, factors, chain, opt_state, targets):
        def step(carry, target):
            factors, opt_state = carry
            grads = jax.grad(adapted_loss)(factors, base, chain, target)
            updates, opt_state = tx.update(grads, opt_state, factors)
            factors = optax.apply_updates(factors, updates)
            seen = rl.effective_params(base, factors, chain, spec)
            return (factors, opt_state), seen

        return jax.lax.scan(step, (factors, opt_state), targets)

    renew = jax.jit(functools.partial(rl.next_link, spec=spec))
    history = []
    for link in range(LINKS):
        part = jax.tree.map(lambda t, k=link: t[k * EVERY : (k + 1) * EVERY], targets)
        (factors, opt_state), seen = one_link(base, factors, chain, opt_state, part)
        history.append(seen)
        base, factors, chain = renew(base, factors, chain)
        opt_state = rl.reset_moments(opt_state, tx, factors)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *history), base


def oracle(spec, seed, maker, params, gradient, sketches, **settings):
    flat, plans = by_path(sketches), rl.plan(spec, params)
    links = [
        {
            p: reference.explicit(jax.tree.map(lambda a, k=k: a[k], s), plans[p])
            for p, s in flat.items()
        }
        for k in range(LINKS)
    ]
    weights = by_path(params)
    settings = {"learning_rate": lambda step: RATE} | settings
    history = reference.trajectory(
        weights,
        {path: leaf_of(path, spec.side) for path in weights},
        links,
        gradient,
        maker,
        resample_every=EVERY,
        steps=STEPS,
        **settings,
    )
    return {path: np.stack([w[path] for w in history]) for path in history[0]}


def assert_one_path(actual, expected):
    """Equal to ``TOLERANCE`` of the norm of the tree, after every step."""
    actual = by_path(actual)
    assert actual.keys() == expected.keys()
    for step in range(STEPS):
        gap = sum(np.sum((actual[p][step] - expected[p][step]) ** 2) for p in expected)
        size = sum(np.sum(np.square(expected[p][step])) for p in expected)
        worst = max(expected, key=lambda p: np.abs(actual[p] - expected[p])[step].max())
        assert gap**0.5 <= TOLERANCE * size**0.5, f"step {step}, worst leaf {worst}"


@pytest.mark.parametrize(
    ("name", "side", "seed", "only", "law"),
    [
        ("adam", "smaller", 0, SOME, "orthonormal"),
        repeat("trace", "left", 1, OTHERS, "orthonormal"),
        ("identity", "right", 2, FEW, "orthonormal"),
        ("lion", "smaller", 3, FEW, "orthonormal"),
        repeat("orthogonal", "smaller", 4, OTHERS, "orthonormal"),
        repeat("orthogonal", "left", 5, ("query", "dense/kernel"), "coordinate"),
        repeat("orthogonal, momentum", "right", 6, OTHERS, "orthonormal"),
        repeat("orthogonal", "smaller", 7, (*FEW, "layers/second", "query"), "block"),
        repeat("orthogonal", "left", 8, OTHERS, "block"),
        pytest.param("adam", "right", 9, FEW, "block", marks=pytest.mark.smoke),
    ],
)
def test_all_forms_are_one_trajectory(name, side, seed, only, law):
    make_inner, maker = MAKERS[name]
    spec = spec_of(side, only, sketch=law)
    params, loss, targets, gradient = problem(seed, only)
    sketches = drawn(spec, seed, only)
    expected = oracle(spec, seed, maker, params, gradient, sketches)

    tx = rl.raclora(RATE, spec, inner=make_inner(), key=seed)
    state = jax.jit(tx.init)(params)
    # The oracle's sketches are those the state draws, so that no form has its own; none
    # is drawn before the first update.
    cached = by_path(sketches)
    assert int(state.sketches.link) == -1
    _, first = jax.jit(tx.update)(params, state, params)
    assert cached.keys() == first.sketches.values.keys()
    for path, sketch in first.sketches.values.items():
        (held,), (every,) = map(jax.tree.leaves, (sketch, cached[path]))
        np.testing.assert_allclose(held, every[0], atol=1e-14)
    words = jax.random.key_data(jax.random.key(seed))
    np.testing.assert_array_equal(state.key_data, words)

    assert_one_path(dense_run(tx, loss, params, state, targets), expected)
    assert_one_path(
        factor_run(tx, spec, sketches, loss, params, state, targets), expected
    )
    seen, merged = adapter_run(make_inner(), spec, loss, params, seed, targets)
    assert_one_path(seen, expected)
    for path, weight in by_path(merged).items():
        np.testing.assert_allclose(weight, expected[path][-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["identity", "trace"])
def test_oracle_is_equations_3_and_4(name):
    """Factor coordinates and dense projectors agree, so the oracle itself is anchored."""
    seed, spec = 1, spec_of("left", OTHERS)
    params, _, _, gradient = problem(seed, OTHERS)
    sketches = drawn(spec, seed, OTHERS)
    args = (spec, seed, MAKERS[name][1], params, gradient, sketches)
    in_factors = oracle(*args)
    dense = oracle(*args, direction=reference.dense_direction)
    for path in in_factors:
        np.testing.assert_allclose(in_factors[path], dense[path], rtol=0, atol=1e-12)


def test_raw_gaussian_sketches_agree_without_being_projectors():
    """S S^T is no projector here: only forms that use S as it is, twice, agree."""
    seed, spec = 5, spec_of("smaller", FEW, sketch="gaussian_raw")
    params, loss, targets, gradient = problem(seed, FEW)
    sketches = drawn(spec, seed, FEW)
    expected = oracle(spec, seed, MAKERS["trace"][1], params, gradient, sketches)
    tx = rl.raclora(RATE, spec, inner=optax.trace(0.9), key=seed)
    state = jax.jit(tx.init)(params)
    assert_one_path(dense_run(tx, loss, params, state, targets), expected)
    assert_one_path(
        factor_run(tx, spec, sketches, loss, params, state, targets), expected
    )


def test_weight_decay_and_schedule_in_both_forms():
    """Decoupled decay acts on the dense weights, with the rate of its step."""
    only = (*FEW, "layers/second", "norm", "table")
    seed, spec = 6, spec_of("smaller", only)
    params, loss, targets, gradient = problem(seed, only)
    sketches = drawn(spec, seed, only)
    mask = {
        "dense": {"kernel": False, "bias": False},
        "layers": True,  # a prefix stands for all below it
        "norm": True,
        "table": True,  # frozen: nothing may move it
    }
    off = (*FEW, "table")

    def rate(count):
        return 0.1 / (1 + 0.3 * count)

    expected = oracle(
        spec,
        seed,
        MAKERS["adam"][1],
        params,
        gradient,
        sketches,
        learning_rate=rate,
        decay={path: 0.0 if path in off else 0.7 for path in only},
    )
    tx = rl.raclora(
        rate, spec, inner=MAKERS["adam"][0](), weight_decay=0.7, mask=mask, key=seed
    )
    state = jax.jit(tx.init)(params)
    assert_one_path(dense_run(tx, loss, params, state, targets), expected)
    assert_one_path(
        factor_run(tx, spec, sketches, loss, params, state, targets), expected
    )


def test_without_cache_bit_for_bit():
    """A seed in place of the sketches changes no bit of the run, in either form."""
    seed = 7
    params, loss, targets, _ = problem(seed, FEW)
    spec = spec_of("smaller", FEW)
    sketches = drawn(spec, seed, FEW)

    def runs(cache):
        spec = spec_of("smaller", FEW, cache=cache)
        tx = rl.raclora(RATE, spec, inner=optax.scale_by_adam(), key=seed)
        state = jax.jit(tx.init)(params)
        assert bool(state.sketches.values) == cache
        return (
            dense_run(tx, loss, params, state, targets),
            factor_run(tx, spec, sketches, loss, params, state, targets),
        )

    jax.tree.map(np.testing.assert_array_equal, runs(cache=True), runs(cache=False))
