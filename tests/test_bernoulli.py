"""A side drawn for each link: its law, and the same run in every form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import compiled_once, refuses, repeat

import raclora_jax as rl
import raclora_jax.methods

EVERY, LINKS, RATE, SEED = 3, 3, 0.05, 1
STEPS = EVERY * LINKS
SHAPES = {"body": (6, 5), "bias": (5,), "query": (5, 2, 3), "stack": (2, 6, 6)}
RULES = (
    rl.Rule("query", rows=0, side=0.3),
    rl.Rule("stack", batch=0, side="left"),
)


def spec_of(side=0.6, **settings):
    return rl.Spec(2, side=side, alpha=3.0, resample_every=EVERY, rules=RULES, **settings)


def params_of(dtype="float32"):
    rng = np.random.default_rng(0)
    return {p: jnp.asarray(rng.normal(size=s), dtype) for p, s in SHAPES.items()}


def batches(dtype="float32"):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(STEPS, 7, 6)), dtype)


def some(dtype="float32"):
    """Enough to see a fault of the state; the layouts are the others' task."""
    whole = params_of(dtype)
    return {path: whole[path] for path in ("body", "bias")}


def some_spec(side=0.6, **settings):
    return rl.Spec(2, side=side, resample_every=EVERY, **settings)


def loss(params, x):
    """Products on either side of a leaf, an axis group, and a scan over a stack."""
    hidden = jnp.tanh(x @ params["body"] + params["bias"])
    if "query" not in params:
        return jnp.mean((hidden - 0.3) ** 2)
    heads = jnp.einsum("ti,ihd->thd", hidden, params["query"]).reshape(len(x), 6)

    def layer(h, kernel):
        return jnp.tanh(h @ kernel), None

    out, _ = jax.lax.scan(layer, heads, params["stack"])
    return jnp.mean((out - 0.3) ** 2)


def sides(params, spec, links=LINKS, key=SEED):
    """``{path: bool array over the links}`` of the leaves whose side is drawn."""

    def one(link):
        drawn = rl.sample_sketch(params, spec, key=key, link=link)
        return {p: s.is_left for p, s in drawn.items() if hasattr(s, "is_left")}

    return jax.jit(lambda n: jax.lax.map(one, n))(jnp.arange(links))


def dense_form(tx, spec):
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def factor_form(tx, spec):
    grad_fn = rl.grad(loss, spec)

    def step(params, state, x):
        updates, state = tx.update(grad_fn(params, state, x), state, params)
        return rl.apply_updates(params, updates), state

    return step


FORMS = {"dense": dense_form, "factor": factor_form}


def trajectory(form, spec, params, stream, **settings):
    """Params and states after every step, in one compiled loop."""
    tx = rl.raclora(RATE, spec, key=SEED, **settings)
    step = FORMS[form](tx, spec)

    def body(carry, x):
        carry = step(*carry, x)
        return carry, carry

    state = jax.jit(tx.init)(params)
    return jax.jit(lambda c, xs: jax.lax.scan(body, c, xs)[1])((params, state), stream)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
def test_a_link_is_left_with_the_given_probability(chance):
    links = 4000
    leaf = {"w": jnp.zeros((4, 3))}
    found = sides(leaf, rl.Spec(1, side=chance), links)["w"]
    standard_error = np.sqrt(chance * (1 - chance) / links)
    assert abs(found.mean() - chance) < 4 * standard_error
    # A draw of its own in every link: as many changes as independent coins have.
    changes = 2 * chance * (1 - chance)
    assert abs(np.mean(found[1:] != found[:-1]) - changes) < 5 * standard_error


def test_one_number_decides_for_all_leaves_of_a_link():
    """So that k different chances have k + 1 cases, and a compiled step holds them."""
    params = {name: jnp.zeros((4, 3)) for name in "abc"}
    rules = [rl.Rule("a", side=0.2), rl.Rule("b", side=0.7)]
    found = sides(params, rl.Spec(1, side=0.7, rules=rules), 500)
    np.testing.assert_array_equal(found["b"], found["c"])
    assert (found["a"] <= found["b"]).all()
    assert (found["a"] != found["b"]).any()


def test_a_certain_side_is_that_side():
    for chance, name in ((0, "right"), (0.0, "right"), (1, "left"), (1.0, "left")):
        assert rl.Spec(2, side=chance) == rl.Spec(2, side=name)
        assert rl.Rule("x", side=chance) == rl.Rule("x", side=name)
    spec = rl.Spec(2, side=0.25, rules=[rl.Rule("x", side=0.5)])
    assert rl.Spec.from_json(spec.to_json()) == spec
    assert hash(spec) != hash(rl.Spec(2, side=0.5))


@pytest.mark.parametrize("sketch", ["orthonormal", "coordinate"])
def test_sketches_are_those_of_the_fixed_sides(sketch):
    """The coin is a draw of its own: no sketch depends on it."""
    like = {"w": jnp.zeros((6, 5))}

    def drawn(side):
        spec = rl.Spec(2, side=side, sketch=sketch)

        def one(link):
            return rl.sample_sketch(like, spec, key=SEED, link=link)["w"]

        return jax.jit(lambda links: jax.lax.map(one, links))(jnp.arange(4))

    both = drawn(0.5)
    for side in ("left", "right"):
        want = drawn(side)
        jax.tree.map(np.testing.assert_array_equal, getattr(both, side), want)


@pytest.mark.parametrize(
    ("chance", "sketch"), [(0.0, "orthonormal"), (0.3, "orthonormal"), (0.7, "block")]
)
def test_the_mean_projector(chance, sketch):
    """E[G -> lift(project(G))] = (p r / m + (1 - p) r / n) I, entry by entry."""
    links, like = 4000, jnp.zeros((6, 4))
    spec = rl.Spec(2, side=chance, sketch=sketch)
    lam = chance * 2 / 6 + (1 - chance) * 2 / 4
    (plan,) = rl.plan(spec, like).values()
    assert plan.lam == pytest.approx(lam)
    assert rl.summary(like, spec).rows[0].lam == plan.lam

    @jax.jit
    def moments(links):
        def one(link):
            drawn = rl.sample_sketch(like, spec, key=SEED, link=link)

            def through(unit):
                factor = rl.project(unit.reshape(6, 4), drawn, spec)
                return rl.lift(factor, drawn, like, spec).ravel()

            projector = jax.vmap(through)(jnp.eye(24))
            return projector, projector**2

        first, second = jax.lax.map(one, links, batch_size=100)
        return first.mean(0), second.mean(0)

    mean, square = map(np.asarray, moments(jnp.arange(links)))
    standard_error = np.sqrt(np.maximum(square - mean**2, 0) / links)
    # 576 entries: five standard errors, and rounding where an entry is always zero.
    assert (np.abs(mean - lam * np.eye(24)) <= 5 * standard_error + 1e-5).all()
    # The smallest eigenvalue of a mean of draws is below lambda by its noise alone.
    smallest = np.linalg.eigvalsh((mean + mean.T) / 2)[0]
    assert abs(smallest - lam) < 0.06


def test_lift_is_the_transpose_of_project():
    params = {p: w for p, w in params_of().items() if p != "bias"}
    spec = spec_of()

    @jax.jit
    def through(link):
        drawn = rl.sample_sketch(params, spec, key=SEED, link=link)
        factors = rl.project(params, drawn, spec)
        return drawn, factors, rl.lift(factors, drawn, params, spec)

    for link in range(LINKS):
        drawn, factors, lifted = through(link)
        for path, factor in factors.items():
            square = sum(jnp.sum(f**2) for f in jax.tree.leaves(factor.value))
            inner = jnp.sum(params[path] * lifted[path])
            np.testing.assert_allclose(inner, square, rtol=1e-5)
        for name in ("left", "right"):
            used = drawn["body"].is_left == (name == "left")
            value = getattr(factors["body"].value, name)
            assert bool(jnp.any(value != 0)) == bool(used)


RULES_INSIDE = {
    "adam": (
        lambda: optax.scale_by_adam(0.8, 0.95, 1e-6),
        lambda: reference.Adam(0.8, 0.95, 1e-6),
    ),
    "orthogonal": (
        rl.orthogonal,
        lambda: reference.Orthogonal(rl._core.whiten.POLYNOMIALS),
    ),
}


def leaves_of(found, fixed):
    """What the oracle is told: the side of every leaf, link by link."""
    views = {"body": ((0,), ()), "query": ((0,), ()), "stack": ((1,), (0,))}

    def leaf(path, link):
        if path == "bias":
            return reference.Leaf("dense")
        left = path == "stack" or bool(found[path][link])
        rows, batch = views[path]
        return reference.Leaf("left" if left else "right", rows, batch, 1.5)

    paths = [path for path in SHAPES if path in (*found, *fixed)]
    return [{path: leaf(path, link) for path in paths} for link in range(LINKS)]


def oracle(spec, params, stream, maker):
    found = sides(params, spec)
    cases = set(zip(*(np.asarray(v).tolist() for v in found.values()), strict=True))
    assert len(cases) == len(found) + 1, "the links of this seed must show every case"
    draw = jax.jit(lambda link: rl.sample_sketch(params, spec, key=SEED, link=link))
    leaves, sketches = leaves_of(found, {*params} - {*found}), []
    for link in range(LINKS):
        drawn = draw(link)
        used = {p: getattr(s, leaves[link][p].side, s) for p, s in drawn.items()}
        sketches.append(used)
    grad = jax.jit(jax.grad(loss))
    return reference.trajectory(
        params,
        leaves,
        sketches,
        lambda weights, step: grad(weights, stream[step]),
        maker,
        learning_rate=lambda step: RATE,
        resample_every=EVERY,
        steps=STEPS,
    )


def adapter_run(spec, params, stream, rule):
    one = optax.chain(rule, optax.scale(-RATE))
    labels = rl.factor_labels(params, spec)
    tx = rl.with_plans(
        optax.partition({"lowrank": one, "dense": one}, labels), params, spec
    )
    base, (factors, chain) = params, rl.init_adapter(params, spec, key=SEED)
    opt_state, history = tx.init(factors), []
    grad_fn = compiled_once(jax.jit(jax.grad(rl.adapted(loss, spec))))
    renew = jax.jit(functools.partial(rl.next_link, spec=spec))
    summed = jax.jit(functools.partial(rl.effective_params, spec=spec))
    update = jax.jit(tx.update)
    for step, x in enumerate(stream):
        grads = grad_fn(factors, base, chain, x)
        updates, opt_state = update(grads, opt_state, factors)
        factors = optax.apply_updates(factors, updates)
        history.append(summed(base, factors, chain))
        if (step + 1) % EVERY == 0:
            base, factors, chain = renew(base, factors, chain)
            opt_state = rl.reset_moments(opt_state, tx, factors)
    return history


@pytest.mark.parametrize(
    ("name", "spec", "make_params"),
    [
        repeat("adam", spec_of(), params_of),
        ("orthogonal", some_spec(alpha=3.0), some),
    ],
)
def test_all_forms_are_one_trajectory(name, spec, make_params):
    make, maker = RULES_INSIDE[name]
    with jax.enable_x64(True):
        params, stream = make_params("float64"), batches("float64")
        expected = oracle(spec, params, stream, maker)
        runs = {
            form: trajectory(form, spec, params, stream, inner=make())[0]
            for form in FORMS
        }
        adapter = adapter_run(spec, params, stream, make())
        for step, weights in enumerate(expected):
            for path, weight in weights.items():
                close = functools.partial(
                    np.testing.assert_allclose, desired=weight, rtol=0, atol=1e-12
                )
                close(runs["dense"][path][step])
                close(runs["factor"][path][step])
                close(adapter[step][path])


@pytest.mark.parametrize("sketch", [repeat("block"), "coordinate"])
def test_forms_agree_where_rows_are_picked(sketch):
    with jax.enable_x64(True):
        spec, params = some_spec(sketch=sketch), some("float64")
        stream = batches("float64")
        dense, factor = (trajectory(form, spec, params, stream)[0] for form in FORMS)
        for path in params:
            np.testing.assert_allclose(dense[path], factor[path], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_compiled_once(form):
    """Whichever side a link takes."""
    spec, params, stream = some_spec(), some(), batches()
    tx = rl.raclora(RATE, spec, key=SEED)
    step = compiled_once(jax.jit(FORMS[form](tx, spec)))
    state, seen = jax.jit(tx.init)(params), []
    for x in stream:
        params, state = step(params, state, x)
        seen.append(bool(state.sketches.values["body"].is_left))
    assert seen == np.repeat(sides(params, spec)["body"], EVERY).tolist()
    assert len(set(seen)) == 2


@pytest.mark.parametrize(
    ("moments", "sketch"),
    [("keep", "orthonormal"), ("transport", "gaussian_raw")],
)
def test_moments_of_the_other_side_move_nothing(moments, sketch):
    """A step stays in the span of its link's sketch, whatever the link before left."""
    spec = rl.Spec(2, side=0.5, sketch=sketch, resample_every=2)
    params = {"w": params_of()["body"]}
    tx = rl.raclora(0.1, spec, inner=optax.trace(0.9), moments=moments, key=SEED)
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    seen = set()
    for _ in range(12):
        updates, state = update(params, state, params)
        drawn = state.sketches.values["w"]
        seen.add(bool(drawn.is_left))
        step = np.asarray(updates["w"] if drawn.is_left else updates["w"].T)
        S = np.asarray(drawn.left if drawn.is_left else drawn.right)
        outside = step - S.T @ np.linalg.pinv(S.T) @ step
        assert np.linalg.norm(step) > 1e-3
        assert np.linalg.norm(outside) < 1e-5 * np.linalg.norm(step)
        params = optax.apply_updates(params, updates)
    assert seen == {True, False}


def test_accumulation_spends_no_link():
    """Three mini-steps of one batch are one step, side and all."""
    spec, params, stream = some_spec(), some(), batches()
    once, _ = trajectory("factor", spec, params, stream)
    inner = optax.MultiSteps(optax.scale_by_adam(), 3).gradient_transformation()
    thrice, state = trajectory(
        "factor", spec, params, jnp.repeat(stream, 3, axis=0), inner=inner
    )
    for path in params:
        np.testing.assert_allclose(thrice[path][2::3], once[path], rtol=0, atol=2e-4)
    assert state.link[-1] == LINKS - 1


def test_no_cache_and_a_restart_change_no_bit():
    params, stream = some(), batches()
    spec, drawing = some_spec(), some_spec(cache=False)
    expected, _ = trajectory("factor", spec, params, stream)
    actual, states = trajectory("factor", drawing, params, stream)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    # From the middle of a link, as a checkpoint brings it back.
    step = jax.jit(factor_form(rl.raclora(RATE, drawing, key=SEED), drawing))
    at = STEPS // 2 + 1
    now, state = jax.tree.map(lambda a: jnp.asarray(np.asarray(a[at])), (actual, states))
    now, _ = step(now, state, stream[at + 1])
    for path in params:
        np.testing.assert_allclose(now[path], expected[path][at + 1], atol=1e-6)


@pytest.mark.parametrize(
    ("form", "rounding"),
    [("dense", "auto"), repeat("factor", "auto"), ("factor", "master")],
)
def test_low_precision(form, rounding):
    params = some("bfloat16")
    spec = some_spec(rounding=rounding)
    weights, states = trajectory(form, spec, params, batches("bfloat16"))
    for path, leaf in params.items():
        assert weights[path].dtype == leaf.dtype
        assert bool(jnp.all(jnp.isfinite(weights[path])))
        assert bool(jnp.any(weights[path][-1] != leaf))
    held = rl.summary(params, spec).total
    total = sum(leaf[0].nbytes for leaf in jax.tree.leaves(states))
    assert held.state_bytes + held.sketch_bytes == total


def test_what_it_costs_is_said():
    params = params_of()
    costs = rl.summary(params, spec_of(), loss, batches()[0])
    rows = {row.path: row for row in costs.rows}
    body = rows["body"]
    assert (body.side, body.rank, body.trained) == ("0.6", 2, 2 * (6 + 5))
    assert body.lam == pytest.approx(0.6 * 2 / 6 + 0.4 * 2 / 5)
    # Adam's two moments of both factors, and both sketches; the one bool is no leaf's.
    assert body.state_bytes == 2 * 4 * body.trained
    assert body.sketch_bytes == body.gradient_bytes == 4 * body.trained
    assert rows["query"].trained == 2 * (5 + 6)
    assert rows["stack"].side == "left"
    state = rl.raclora(0.1, spec_of(), key=0).init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert costs.total.state_bytes + costs.total.sketch_bytes == held
    assert costs.peak_bytes > 0
    assert not [text for text in costs.warnings if "in full" in text]
    assert "0.6" in str(costs)


def test_a_sharded_leaf():
    """Over two devices: the steps of one."""
    spec, params, stream = some_spec(), some(), batches()
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    place = jax.sharding.PartitionSpec
    sharding = jax.sharding.NamedSharding(mesh, place("x"))
    spread = params | {"body": jax.device_put(params["body"], sharding)}
    alone, _ = trajectory("factor", spec, params, stream)
    shared, _ = trajectory("factor", spec, spread, stream)
    for path in params:
        np.testing.assert_allclose(shared[path], alone[path], atol=2e-5)


@pytest.mark.parametrize(
    ("call", "pieces"),
    [
        (lambda: rl.Spec(2, side=1.2), ["Spec", "side", "between 0 and 1", "1.2"]),
        (lambda: rl.Spec(2, side=-0.1), ["side", "between 0 and 1", "-0.1"]),
        (lambda: rl.Spec(2, side=float("nan")), ["side", "between 0 and 1", "nan"]),
        (lambda: rl.Spec(2, side=True), ["side", "probability", "True", "side=0.5"]),
        (lambda: rl.Spec(2, side=None), ["side", "'left'", "None"]),
        (lambda: rl.Rule("x", side=2), ["Rule('x')", "between 0 and 1", "2"]),
        (
            lambda: rl.Rule("x", mode="dense", side=0.5),
            ["Rule('x')", "side=0.5", "mode='dense'", "leave out"],
        ),
        (
            lambda: rl.plan(
                rl.Spec(2, side=0.5, rules=[rl.Rule("w", rank=4)]),
                {"w": jnp.zeros((6, 4))},
            ),
            ["'w'", "rank 4", "4 (right)", "mode='dense'"],
        ),
        (
            lambda: rl.methods.lora(0.1, rl.Spec(2, side=0.5), key=0),
            ["side=0.5", "side='left'", "methods.raclora"],
        ),
        (
            lambda: rl.raclora(0.1, rl.Spec(2, side=0.5), key=0).update(
                {"w": rl.Factor(jnp.zeros((2, 4)), jnp.zeros(()))},
                rl.raclora(0.1, rl.Spec(2, side=0.5), key=0).init(
                    {"w": jnp.zeros((6, 4))}
                ),
                {"w": jnp.zeros((6, 4))},
            ),
            ["'w'", "left=(2, 4), right=(2, 6)", "got (2, 4)"],
        ),
        (
            lambda: rl.raclora(0.1, rl.Spec(2, side=0.5), key=0).update(
                {"w": jnp.zeros((6, 4))},
                rl.raclora(0.1, rl.Spec(2, side="left"), key=0).init(
                    {"w": jnp.zeros((6, 4))}
                ),
            ),
            ["state", "does not fit", "w/left"],
        ),
        (
            lambda: rl.Spec(2, side=0.5).check_resumes(rl.Spec(2, side=0.4)),
            ["side=0.5", "side=0.4"],
        ),
    ],
)
def test_bad_input(call, pieces):
    refuses(call, *pieces)


def test_a_leaf_too_small_for_one_side_is_trained_in_full():
    spec = rl.Spec(4, side=0.5)
    costs = rl.summary({"thin": jnp.zeros((9, 3)), "wide": jnp.zeros((9, 8))}, spec)
    thin = costs.rows[0]
    assert (thin.mode, thin.why) == ("dense", "rank 4 >= sketched side 3")
