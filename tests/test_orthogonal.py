"""The orthogonalised step: its directions, its state, and what it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import chequered, repeat

import raclora_jax as rl
from raclora_jax._core.whiten import polar_factor

# Where the docstring says that singular values end.
WITHIN = 0.007


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def stacked(matrix, axis):
    return np.asarray(matrix, np.float64).reshape(
        *matrix.shape[:axis], matrix.shape[axis], -1
    )


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 50), 0), ((40, 7), 0), ((2, 4, 5, 6), 1), ((2, 3, 4, 5), 2), ((1, 9), 0)],
)
def test_the_polar_factor(shape, axis):
    """Against the singular value decomposition, stacks and axis groups apart."""
    for seed in range(3):
        matrix = normal(seed, *shape).astype(np.float32)
        got = stacked(jax.jit(polar_factor, static_argnums=1)(matrix, axis), axis)
        left, _, right = np.linalg.svd(stacked(matrix, axis), full_matrices=False)
        np.testing.assert_allclose(got, left @ right, rtol=0, atol=WITHIN)


def test_where_singular_values_end():
    """Down to 0.05 of the 8-norm they end together; below they go to zero."""
    left, right = (np.linalg.qr(normal(seed, 60, 5))[0] for seed in (1, 2))
    values = np.array([1.0, 0.8, 0.3, 5.5e-2, 1e-5])
    matrix = (left * values) @ right.T
    with jax.enable_x64(True):
        got = np.linalg.svd(np.asarray(polar_factor(jnp.asarray(matrix), 0)))[1]
    assert np.abs(got[:4] - 1).max() < WITHIN
    assert got[4] < 0.02


@pytest.mark.parametrize("dtype", ["float32", repeat("bfloat16")])
def test_no_gradient_gives_no_step_and_no_nan(dtype):
    params = {"kernel": jnp.ones((9, 7), dtype), "stack": jnp.ones((2, 6, 8), dtype)}
    spec = rl.Spec(3, rules=[rl.Rule("stack", batch=0)])
    all_of_it = {"momentum": 0.9, "second_moment": True, "memory": 0.5}
    for options in ({}, all_of_it, {"block_size": 2, **all_of_it}):
        tx = rl.raclora(0.1, spec, inner=rl.orthogonal(**options), key=0)
        state = tx.init(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        # Rank one: two of the three directions are empty.
        thin = jax.tree.map(jnp.ones_like, params)
        for grads in (zeros, thin, zeros, thin):
            updates, state = jax.jit(tx.update)(grads, state, params)
            for leaf in jax.tree.leaves((updates, state.inner_state)):
                assert np.isfinite(np.asarray(leaf, np.float32)).all()
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("size", "shape"), chequered([1e-30, 1e18, 1e30, 1e37], [(3, 8), (9, 4)])
)
def test_a_gradient_of_any_finite_size(size, shape):
    """The polar factor knows no size; a stack has matrices of several."""
    matrix = np.random.default_rng(0).normal(size=shape).astype("f")
    want = polar_factor(jnp.asarray(matrix), 0)
    stack = jnp.stack([matrix, np.float32(size) * matrix])
    for got in polar_factor(stack, 1):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(polar_factor(jnp.zeros(shape), 0), 0)


def test_it_keeps_nothing():
    """No byte for any adapted leaf; biases have Adam's."""
    params = {"kernel": jnp.ones((9, 7)), "bias": jnp.ones(7)}
    inner = rl.raclora(0.1, 3, inner=rl.orthogonal(), key=0).init(params).inner_state
    assert jax.tree.leaves(inner.lowrank) == []
    adam = optax.scale_by_adam().init({"bias": params["bias"]})
    assert jax.tree.map(jnp.shape, inner.dense.adam) == jax.tree.map(jnp.shape, adam)


def test_leaves_trained_in_full_get_adam():
    """A matrix that a rule trains in full too, whatever its axes."""
    rules = [rl.Rule("head|scales", mode="dense")]
    params = {
        "kernel": normal(0, 9, 7),
        "head": normal(1, 7, 5),
        "scales": normal(2, 3, 4),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    spec = rl.Spec(3, rules=rules)
    runs = {}
    for name, inner in {"adam": optax.scale_by_adam(), "ours": rl.orthogonal()}.items():
        tx = rl.raclora(0.1, spec, inner=inner, key=0)
        state = tx.init(params)
        for seed in range(3):
            grads = {p: normal(seed, *w.shape).astype("f") for p, w in params.items()}
            runs[name], state = jax.jit(tx.update)(grads, state, params)
    for path in ("head", "scales"):
        np.testing.assert_allclose(runs["ours"][path], runs["adam"][path], rtol=1e-6)
    assert np.abs(runs["ours"]["kernel"] - runs["adam"]["kernel"]).max() > 1e-3


def test_rank_one_is_the_normalised_gradient():
    params = {"kernel": jnp.zeros((6, 20))}
    spec = rl.Spec(1, side="left")
    grads = {"kernel": jnp.asarray(normal(0, 6, 20), jnp.float32)}
    factor = rl.project(grads, rl.sample_sketch(params, spec, key=0), spec)["kernel"]
    tx = rl.raclora(0.1, spec, inner=rl.orthogonal(), key=0)
    (updates, _) = tx.update({"kernel": factor}, tx.init(params), params)
    length = jnp.linalg.norm(factor.value) / np.sqrt(20)
    np.testing.assert_allclose(
        updates["kernel"].value, -0.1 * factor.value / length, rtol=WITHIN
    )


@pytest.mark.slow
def test_the_mean_captured_nuclear_norm():
    """E |S G|_* >= lambda |G|_*, for every law, by 400 draws."""
    gradient = normal(3, 16, 24)
    nuclear = np.linalg.svd(gradient, compute_uv=False).sum()
    for law in ("orthonormal", "rademacher", "coordinate", "block"):
        for rank in (1, 2, 4):
            spec = rl.Spec(rank, side="left", sketch=law)
            draw = jax.jit(
                jax.vmap(
                    lambda link, spec=spec: rl.sample_sketch(
                        jnp.zeros((16, 24)), spec, key=0, link=link
                    )
                )
            )
            (plan,) = rl.plan(spec, jnp.zeros((16, 24))).values()
            sketches = reference.explicit(draw(jnp.arange(400)), plan)
            kept = np.linalg.svd(sketches @ gradient, compute_uv=False).sum(axis=1)
            error = kept.std() / np.sqrt(len(kept))
            assert kept.mean() > rank / 16 * nuclear - 4 * error, (law, rank)


def test_the_second_moment_outlives_a_link_and_momentum_does_not():
    params = {"kernel": jnp.zeros((9, 30)), "bias": jnp.zeros(30)}
    inner = rl.orthogonal(momentum=0.9, second_moment=True)
    tx = rl.raclora(0.1, rl.Spec(3, resample_every=2), inner=inner, key=0)
    state, step = tx.init(params), jax.jit(tx.update)
    for seed in range(3):
        grads = {p: normal(seed, *w.shape).astype("f") for p, w in params.items()}
        before, (updates, state) = state, step(grads, state, params)
    old, new = before.inner_state.lowrank, state.inner_state.lowrank
    assert int(state.link) == 1
    assert int(new.count) == 3
    np.testing.assert_allclose(new.momentum["kernel"], project(grads, state), rtol=1e-5)
    now = (new.second_moment["kernel"] - 0.95 * old.second_moment["kernel"]) / 0.05
    assert now.shape == (30,)
    # Three orthonormal rows of 30 columns.
    np.testing.assert_allclose(now.sum(), 1.0, rtol=0.01)
    # The length of a step stays what it was.
    rms = np.sqrt(np.mean(np.square(updates["kernel"])))
    np.testing.assert_allclose(rms, 0.1 * np.sqrt(3 / 9), rtol=0.01)


def project(grads, state):
    return state.sketches.values["kernel"] @ grads["kernel"]


def inverse_root(gram):
    values, vectors = np.linalg.eigh(gram)
    return (vectors / np.sqrt(values)) @ vectors.T


@pytest.mark.smoke
@pytest.mark.parametrize("memory", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(4, 30), (9, 5)])
def test_memory_whitens_by_the_mean_of_what_was_seen(memory, shape):
    """Against NumPy in float64, also where gradients are of very different sizes."""
    rule = rl.orthogonal(memory=memory)
    step = jax.jit(rule.update)
    state = rule.init({"f": jnp.zeros(shape)})
    seen = []
    for seed, size in enumerate((1.0, 0.3, 3.0, 1.5)):
        factor = (1e-25 * size * normal(seed, *shape)).astype("f")
        got, state = step({"f": factor}, state)
        lying = np.float64(factor) if shape[0] < shape[1] else np.float64(factor).T
        seen.append(lying @ lying.T)
        mixed = (1 - memory) * seen[-1] + memory * np.mean(seen, axis=0)
        want = np.sqrt(max(shape)) * inverse_root(mixed) @ lying
        want = want if shape[0] < shape[1] else want.T
        np.testing.assert_allclose(got["f"], want, atol=2 * WITHIN * np.abs(want).max())
        plain = np.sqrt(max(shape)) * np.asarray(polar_factor(factor, 0))
        assert seed == 0 or np.abs(plain - want).max() > 0.04 * np.abs(want).max()


def blocks_of(matrix, rows):
    """The blocks of rows that are whitened apart."""
    count = -(-len(matrix) // rows)
    size = -(-len(matrix) // count)
    return [matrix[at : at + size] for at in range(0, len(matrix), size)]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("shape", "rows"), [((12, 30), 4), ((13, 30), 4), ((40, 6), 16), ((5, 30), 8)]
)
def test_blocks_of_rows_are_whitened_apart(shape, rows):
    """By the singular value decomposition of each; 13 rows are 4, 4, 4 and 1."""
    for seed in range(3):
        factor = normal(seed, *shape).astype("f")
        rule = rl.orthogonal(block_size=rows)
        got, _ = jax.jit(rule.update)({"f": factor}, rule.init({"f": factor}))
        want = []
        for block in blocks_of(np.float64(factor), rows):
            left, _, right = np.linalg.svd(block, full_matrices=False)
            size = max(len(blocks_of(factor, rows)[0]), shape[1])
            want.append(np.sqrt(size) * left @ right)
        want = np.concatenate(want)
        np.testing.assert_allclose(got["f"], want, atol=WITHIN * np.abs(want).max())
        np.testing.assert_allclose(np.sqrt(np.mean(want**2)), 1, rtol=0.15)
        # Not what whole factors give, but for those of no more rows than a block.
        whole = np.sqrt(max(shape)) * np.asarray(polar_factor(factor, 0))
        assert (np.abs(whole - want).max() < 0.1) == (shape[0] <= rows)


@pytest.mark.parametrize("shape", [(2, 7, 20), (2, 11, 3, 4)])
def test_a_block_remembers_its_own(shape):
    """Of a stack and with a momentum: one by one as all together."""
    rows, options = 3, {"momentum": 0.9, "memory": 0.8}
    rule, alone = rl.orthogonal(block_size=rows, **options), rl.orthogonal(**options)
    spec = rl.Spec(shape[1], rules=[rl.Rule("f", rows=1, batch=0, mode="full")])
    count = -(-shape[1] // rows)
    tx = rl.raclora(1.0, spec, inner=rule, key=0)
    params = {"f": jnp.zeros(shape)}
    state, step = tx.init(params), jax.jit(tx.update)
    gram = state.inner_state.lowrank.gram["f"]
    size = min(-(-shape[1] // count), int(np.prod(shape[2:])))
    assert gram.shape == (2, count, size, size)
    width = int(np.prod(shape[2:]))
    lone = {}
    for seed in range(3):
        grads = {"f": normal(seed, *shape).astype("f")}
        updates, state = step(grads, state, params)
        for i in range(2):
            blocks = blocks_of(grads["f"][i].reshape(-1, width), rows)
            got = blocks_of(-np.asarray(updates["f"][i]).reshape(-1, width), rows)
            for j, block in enumerate(blocks):
                start = alone.init({"f": jnp.zeros(block.shape)})
                want, lone[i, j] = alone.update({"f": block}, lone.get((i, j), start))
                np.testing.assert_allclose(got[j], want["f"], atol=2e-3)


def test_blocks_descend_no_less():
    """Along the gradient, at the same length over all."""
    for seed in range(5):
        factor = normal(seed, 24, 60) * np.logspace(0, -2, 60)
        along, length = {}, {}
        for rows in (None, 12, 5, 1):
            rule = rl.orthogonal(block_size=rows)
            step, _ = rule.update({"f": factor.astype("f")}, rule.init({"f": factor}))
            along[rows] = np.sum(factor * step["f"])
            length[rows] = np.linalg.norm(step["f"])
        assert along[None] < along[12] < along[5] < along[1]
        np.testing.assert_allclose(list(length.values()), length[None], rtol=2 * WITHIN)


def test_blocks_keep_less():
    """A memory of blocks has a share of the numbers of one of whole factors."""
    params = {"kernel": jnp.zeros((64, 80))}
    kept = {}
    for rows in (None, 8):
        rule = rl.orthogonal(memory=0.9, block_size=rows)
        tx = rl.raclora(1.0, rl.Spec(32, side="left"), inner=rule, key=0)
        kept[rows] = tx.init(params).inner_state.lowrank.gram["kernel"].size
    assert kept == {None: 32 * 32, 8: 32 * 8}


def test_memory_of_a_stack_is_that_of_its_matrices():
    """One by one: a large matrix does not hide a small one."""
    spec = rl.Spec(3, side="left", rules=[rl.Rule("stack", batch=0)])
    tx = rl.raclora(1.0, spec, inner=rl.orthogonal(memory=0.8), key=0)
    params = {"stack": jnp.zeros((2, 8, 20))}
    state, step = tx.init(params), jax.jit(tx.update)
    rule = rl.orthogonal(memory=0.8)
    alone = [rule.init({"f": jnp.zeros((3, 20))}) for _ in range(2)]
    for seed in range(3):
        sizes = np.array([1e15, 1e-15], "f")[:, None, None]
        grads = {"stack": sizes * normal(seed, 2, 8, 20).astype("f")}
        updates, state = step(grads, state, params)
        assert state.inner_state.lowrank.gram["stack"].shape == (2, 3, 3)
        sketches = np.asarray(state.sketches.values["stack"])
        for i in range(2):
            want, alone[i] = rule.update({"f": sketches[i] @ grads["stack"][i]}, alone[i])
            got = -sketches[i] @ updates["stack"][i]
            np.testing.assert_allclose(got, want["f"], atol=1e-3)


def test_a_new_link_forgets():
    """Its first step is the polar factor's; the second is not."""
    params = {"kernel": jnp.zeros((9, 30))}
    grads = [{"kernel": normal(seed, 9, 30).astype("f")} for seed in range(4)]
    found = {}
    for memory in (0.0, 0.8):
        spec = rl.Spec(3, resample_every=2)
        tx = rl.raclora(0.1, spec, inner=rl.orthogonal(memory=memory), key=0)
        state, step = tx.init(params), jax.jit(tx.update)
        found[memory] = []
        for one in grads:
            updates, state = step(one, state, params)
            found[memory].append(np.asarray(updates["kernel"]))
    same = [
        np.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(found[0.0], found[0.8], strict=True)
    ]
    assert same == [True, False, True, False]


def test_columns_are_evened():
    """A column that is always long takes as long a step as the others."""
    params = {"kernel": jnp.zeros((8, 40))}
    scale = np.where(np.arange(40) == 7, 30.0, 1.0).astype("f")
    spread = {}
    for second_moment in (False, True):
        inner = rl.orthogonal(second_moment=second_moment)
        tx = rl.raclora(1.0, rl.Spec(4, side="left"), inner=inner, key=0)
        state = tx.init(params)
        for seed in range(40):
            grads = {"kernel": scale * normal(seed, 8, 40).astype("f")}
            updates, state = jax.jit(tx.update)(grads, state, params)
        lengths = np.linalg.norm(updates["kernel"], axis=0)
        spread[second_moment] = lengths[7] / np.median(lengths)
    assert spread[True] < 1.6 < 3 < spread[False]


@pytest.mark.slow
def test_one_rate_for_all_ranks():
    """With alpha="dim" a step has the same root mean square at every rank and side."""
    grads = {"kernel": jnp.asarray(normal(0, 24, 60), jnp.float32)}
    params = jax.tree.map(jnp.zeros_like, grads)
    for side in ("left", "right"):
        for rank in (1, 3, 12):
            spec = rl.Spec(rank, side=side, alpha="dim")
            plan = rl.plan(spec, params)["kernel"]
            assert plan.scaling == np.sqrt(plan.dim / rank)
            tx = rl.raclora(0.01, spec, inner=rl.orthogonal(), key=0)
            updates, _ = tx.update(grads, tx.init(params), params)
            rms = np.sqrt(np.mean(np.square(updates["kernel"])))
            np.testing.assert_allclose(rms, 0.01, rtol=WITHIN)


def test_a_rules_own_alpha_wins():
    spec = rl.Spec(
        2, alpha="dim", rules=[rl.Rule("a", alpha=6.0), rl.Rule("b", alpha="dim")]
    )
    shapes = {name: jax.ShapeDtypeStruct((8, 32), "float32") for name in "abc"}
    plans = rl.plan(spec, shapes)
    assert [plans[name].scaling for name in "abc"] == [3.0, 2.0, 2.0]
    assert rl.Spec.from_json(spec.to_json()) == spec
    for wrong in ("dims", "", True):
        with pytest.raises(TypeError, match="'dim'"):
            rl.Spec(2, alpha=wrong)


def test_rules_that_ask_know_the_plans():
    """Through chains and MultiSteps; a stock rule is never handed them."""
    seen = []

    def init(params):
        return ()

    def update(updates, state, params=None, *, plans, **extra):
        assert not extra
        seen.append({path: plan.mode for path, plan in plans.items()})
        return updates, state

    asks = optax.GradientTransformationExtraArgs(init, update)
    params = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    for inner in (asks, optax.chain(optax.clip(1.0), asks), optax.MultiSteps(asks, 2)):
        seen.clear()
        tx = rl.raclora(0.1, 2, inner=inner, key=0)
        tx.update(params, tx.init(params), params)
        assert {"kernel": "lowrank"} in seen
        assert {"bias": "dense"} in seen


def test_under_a_mask_the_rest_of_the_leaves_is_orthogonalised():
    """What optax.masked hides passes as it is, and the others are found by their path."""
    params = {"a": jnp.zeros((6, 20)), "b": jnp.zeros((6, 20))}
    grads = jax.tree.map(lambda w: jnp.asarray(normal(1, *w.shape), jnp.float32), params)
    masked = optax.masked(rl.orthogonal(), lambda tree: {p: p == "a" for p in tree})
    tx = rl.raclora(1.0, rl.Spec(2, side="left"), inner=masked, key=0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    values = {p: np.linalg.svd(u, compute_uv=False)[:2] for p, u in updates.items()}
    np.testing.assert_allclose(values["a"], np.sqrt(20), rtol=WITHIN)
    assert np.ptp(values["b"]) > 0.1


@pytest.mark.parametrize(
    ("options", "error", "pieces"),
    [
        ({"momentum": 1.0}, ValueError, ["momentum", "below 1", "1.0"]),
        ({"momentum": -0.1}, ValueError, ["momentum", "-0.1"]),
        ({"momentum": float("nan")}, ValueError, ["momentum", "nan"]),
        ({"momentum": "0.9"}, TypeError, ["momentum", "'0.9'", "str"]),
        ({"momentum": True}, TypeError, ["momentum", "bool"]),
        ({"second_moment": 1}, TypeError, ["second_moment", "int"]),
        ({"memory": 1.5}, ValueError, ["memory", "between 0 and 1", "1.5"]),
        ({"memory": True}, TypeError, ["memory", "bool"]),
        ({"block_size": 0}, ValueError, ["block_size", "at least 1", "0"]),
        ({"block_size": 2.5}, TypeError, ["block_size", "an int", "2.5"]),
        ({"block_size": True}, TypeError, ["block_size", "an int", "bool"]),
    ],
)
def test_bad_options(options, error, pieces):
    with pytest.raises(error) as refused:
        rl.orthogonal(**options)
    assert all(piece in str(refused.value) for piece in pieces), refused.value


def test_leaves_joined_between_are_refused():
    params = {"a": jnp.zeros((6, 20)), "b": jnp.zeros((6, 20))}
    with pytest.raises(ValueError, match="rename or join"):
        rl.raclora(0.1, 2, inner=optax.flatten(rl.orthogonal()), key=0).init(params)
