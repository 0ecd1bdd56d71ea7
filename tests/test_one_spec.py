"""A run's static facts are said once: doors that were told otherwise refuse, by name."""

import collections
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import raclora_jax as rl
from raclora_jax._core import paths
from raclora_jax._core.sketch import draw_all

RUN = rl.Spec(2, resample_every=2)
OTHERS = {
    "resample_every": rl.Spec(2, resample_every=5),
    "alpha": rl.Spec(2, resample_every=2, alpha=3.0),
    "sketch": rl.Spec(2, resample_every=2, sketch="rademacher"),
    "side": rl.Spec(2, resample_every=2, side="right"),
    "rank": rl.Spec(3, resample_every=2),
    "rounding": rl.Spec(2, resample_every=2, rounding="nearest"),
}
# Square, so that no shape tells one side from the other.
W = {"kernel": jnp.arange(36.0).reshape(6, 6) / 36}
X = jax.random.normal(jax.random.key(0), (5, 6))


def loss_fn(params, x):
    return jnp.mean((x @ params["kernel"] - 1) ** 2)


def optimizer_doors(specs):
    """One step in factor form, each door with a spec of its own."""
    tx = rl.raclora(0.1, specs["raclora"], key=0)
    params, state = W, tx.init(W)
    for _ in range(3):
        grad_fn = rl.value_and_grad(loss_fn, specs["value_and_grad"])
        _, grads = grad_fn(params, state, X)
        updates, state = tx.update(grads, state, params)
        params = rl.apply_updates(params, updates)
    return params


def adapter_doors(specs):
    factors, chain = rl.init_adapter(W, specs["init_adapter"], key=0)
    loss = rl.adapted(loss_fn, specs["adapted"])
    factors = jax.tree.map(
        lambda f, g: f - 0.1 * g, factors, jax.grad(loss)(factors, W, chain, X)
    )
    rl.effective_params(W, factors, chain, specs["effective_params"])
    params, factors, chain = rl.next_link(W, factors, chain, specs["next_link"])
    return jax.grad(loss)(factors, params, chain, X), params


DOORS = {
    optimizer_doors: ("raclora", "value_and_grad"),
    adapter_doors: ("init_adapter", "adapted", "effective_params", "next_link"),
}
PAIRS = [
    (run, door, field)
    for run, doors in DOORS.items()
    for door, field in itertools.product(doors, OTHERS)
]


@pytest.mark.parametrize(("run", "door", "field"), PAIRS)
def test_a_door_with_another_spec(run, door, field):
    """Every pair of doors differs in one of these runs."""
    specs = dict.fromkeys(DOORS[run], RUN)
    run(specs)
    with pytest.raises(ValueError, match="kernel") as error:
        run({**specs, door: OTHERS[field]})
    said = {"alpha": "alpha / rank", "rank": "rank|shape"}.get(field, field)
    assert re.search(said, str(error.value))
    assert "spec" in str(error.value)


def test_lift_refuses_factors_of_another_spec():
    sketches = rl.sample_sketch(W, RUN, key=0)
    factors = rl.project(W, sketches, RUN)
    for field in ("alpha", "sketch", "resample_every"):
        with pytest.raises(ValueError, match=field):
            rl.lift(factors, sketches, W, OTHERS[field])


def test_dense_updates_are_added_as_they_are():
    tx = rl.raclora(0.1, RUN, key=0)
    updates, _ = tx.update(W, tx.init(W), W)
    want = optax.apply_updates(W, updates)
    np.testing.assert_array_equal(rl.apply_updates(W, updates)["kernel"], want["kernel"])


@pytest.mark.smoke
def test_a_stamp_costs_nothing_and_survives_transformations():
    tx = rl.raclora(0.1, RUN, key=0)
    grad_fn = jax.jit(rl.value_and_grad(loss_fn, RUN))
    _, grads = grad_fn(W, tx.init(W), X)
    assert "stamp" not in str(jax.tree_util.tree_leaves_with_path(grads))
    doubled = jax.tree.map(lambda g: 2 * g, grads)
    assert doubled["kernel"].stamp == grads["kernel"].stamp
    by_hand = {"kernel": rl.Factor(grads["kernel"].value, jnp.zeros(()))}
    first, _ = tx.update(grads, tx.init(W), W)
    second, _ = tx.update(by_hand, tx.init(W), W)
    np.testing.assert_array_equal(first["kernel"].value, second["kernel"].value)


def trained(spec, state, steps, tx=None):
    """Dense steps on one gradient; the sketches of each."""
    tx = tx or rl.raclora(0.1, spec, key=0)
    seen = []
    for _ in range(steps):
        _, state = tx.update(W, state, W)
        seen.append((int(state.link), int(state.step_in_link), state.sketches.values))
    return state, seen


def sketch_of(spec, link):
    return rl.sample_sketch(W, spec, key=0, link=link)["kernel"]


def test_another_length_at_resume_ends_the_running_link():
    for before, after, ends in ((5, 2, (3, 5)), (2, 5, (5, 10))):
        old = dataclasses.replace(RUN, resample_every=before)
        new = dataclasses.replace(RUN, resample_every=after)
        new.check_resumes(old)
        state, _ = trained(old, rl.raclora(0.1, old, key=0).init(W), 3)
        link, done = int(state.link), int(state.step_in_link)
        _, seen = trained(new, state, 8)
        expected = []
        for _ in range(8):
            if done >= after:
                link, done = link + 1, 0
            done += 1
            expected.append((link, done))
        assert [entry[:2] for entry in seen] == expected, ends
        for at, _, sketches in seen:
            np.testing.assert_array_equal(sketches["kernel"], sketch_of(new, at))


@pytest.mark.parametrize("kept", [True, False])
def test_another_law_at_resume(kept):
    """The running link goes on with the sketch it keeps; without one, a link begins."""
    new = OTHERS["sketch"]
    new.check_resumes(RUN)
    state, _ = trained(RUN, rl.raclora(0.1, RUN, key=0).init(W), 3)
    assert (int(state.link), int(state.step_in_link)) == (1, 1)
    if not kept:
        empty = rl.raclora(0.1, new, key=0).init(W).sketches
        state = state._replace(sketches=empty)
    _, seen = trained(new, state, 3)
    if kept:
        np.testing.assert_array_equal(seen[0][2]["kernel"], sketch_of(RUN, 1))
        assert [entry[:2] for entry in seen] == [(1, 2), (2, 1), (2, 2)]
        np.testing.assert_array_equal(seen[1][2]["kernel"], sketch_of(new, 2))
    else:
        np.testing.assert_array_equal(seen[0][2]["kernel"], sketch_of(new, 2))
        assert [entry[:2] for entry in seen] == [(2, 1), (2, 2), (3, 1)]


def test_another_alpha_at_resume_acts_at_once():
    """With the identity inside a step is scaling^2 lift(project(G))."""
    rule = {"inner": optax.identity(), "key": 0}
    tx = rl.raclora(0.1, RUN, **rule)
    _, state = tx.update(W, tx.init(W), W)
    want, _ = tx.update(W, state, W)
    got, _ = rl.raclora(0.1, OTHERS["alpha"], **rule).update(W, state, W)
    np.testing.assert_allclose(got["kernel"], 1.5**2 * want["kernel"], rtol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("cache", [True, False])
def test_a_compiled_step_draws_once(cache):
    """Three doors in one program, and no more drawing than in a draw alone."""
    spec = rl.Spec(2, resample_every=2, cache=cache)
    tx = rl.raclora(0.1, spec, key=0)
    state = tx.init(W)

    def step(params, state, x):
        _, grads = rl.value_and_grad(loss_fn, spec)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state

    def draw(data, link):
        return draw_all(data, link, tuple(plans))

    plans = [rl.plan(spec, W)["kernel"]]
    whole = jax.jit(step).lower(W, state, X).compile().as_text()
    alone = jax.jit(draw).lower(state.key_data, state.link).compile().as_text()

    def loops(text):
        return len(re.findall(r" while\(", text))

    assert loops(alone) > 0
    assert loops(whole) == loops(alone)
    assert len(re.findall(r" conditional\(", whole)) == int(cache)


def test_a_field_called_value_keeps_its_name():
    """Only a box, a node with that one child, is no level of the tree."""
    QKV = collections.namedtuple("QKV", "query key value")
    tree = {"attn": QKV(W["kernel"], W["kernel"], W["kernel"])}
    assert [*paths.flatten(tree)[0]] == ["attn/query", "attn/key", "attn/value"]
    rules = [rl.Rule("attn/(query|value)", mode="frozen")]
    modes = {r.path: r.mode for r in rl.summary(tree, rl.Spec(2, rules=rules)).rows}
    assert modes == {
        "attn/query": "frozen",
        "attn/key": "lowrank",
        "attn/value": "frozen",
    }
    masked = {"attn": QKV(optax.MaskedNode(), optax.MaskedNode(), W["kernel"])}
    assert [*paths.flatten(masked)[0]] == ["attn/value"]


@pytest.mark.parametrize("where", ["kernel", "bias"])
def test_a_mini_step_is_skipped_by_all_groups_or_none(where):
    rule = optax.MultiSteps(
        optax.scale_by_adam(), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()
    params = {**W, "bias": jnp.ones(6)}
    tx = rl.raclora(0.1, RUN, inner=rule, weight_decay=0.5, key=0)
    bad = {**params, where: params[where] * jnp.nan}
    state, clean = tx.init(params), tx.init(params)
    for grads, is_bad in ((params, False), (bad, True), (params, False)):
        updates, state = tx.update(grads, state, params)
        if is_bad:
            assert all(bool((u == 0).all()) for u in jax.tree.leaves(updates))
        else:
            want, clean = tx.update(grads, clean, params)
            for got, expected in zip(
                jax.tree.leaves(updates), jax.tree.leaves(want), strict=True
            ):
                np.testing.assert_array_equal(got, expected)
    assert int(state.count) == 1
    assert any(bool((u != 0).any()) for u in jax.tree.leaves(updates))
