"""Small deltas on low-precision weights: kept by default, lost by nearest rounding.

200 merges of a delta at 3e-4 of the weights' RMS in bfloat16, far below half a unit in
the last place, and as far below it in float16.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import chequered, repeat

import raclora_jax as rl
from raclora_jax._core import rounding
from raclora_jax._core.factor import is_factor

MERGES = 200
# The delta's RMS over the weights': the same share of a unit in the last place.
RATIO = {"bfloat16": 3e-4, "float16": 3e-4 / 8}
SHAPE, LENGTH, RANK = (96, 160), 4096, 24
LOW = ("bfloat16", "float16")
# What an entry of the sum of 200 draws is off by, over its drift (both RMS).
NOISE = 0.25


def share_kept(before, after, drift):
    """The part of the intended drift that a leaf went."""
    went = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return (went * drift).sum() / (drift * drift).sum()


def normal(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def cases():
    """``{path: (weight dtype, gradient dtype)}``: every way to train in one tree."""
    found = {}
    for dtype in LOW:
        for form, grads in (("dense", "float32"), ("dense", dtype), ("factor", dtype)):
            found[f"{form}_{dtype}_by_{grads}"] = dtype, grads
        for grads in ("float32", dtype):
            found[f"bias_{dtype}_by_{grads}"] = dtype, grads
    return found


def train(rounded, after=None):
    """``MERGES`` equal steps on one sketch, and the drift they should add up to."""
    spec = rl.Spec(RANK, alpha=2 * RANK, resample_every=10_000, rounding=rounded)
    params, grads, wanted = {}, {}, {}
    for seed, (path, (dtype, grad_dtype)) in enumerate(cases().items()):
        shape = (LENGTH,) if path.startswith("bias") else SHAPE
        params[path] = normal(seed, shape, dtype)
        # scaling^2 H G has the RMS of 4 * sqrt(1/4) * G.
        size = RATIO[dtype] / (1 if path.startswith("bias") else 2)
        grads[path] = (size * 2**10 * normal(100 + seed, shape)).astype(grad_dtype)
    sketches = rl.sample_sketch(params, spec, key=3)
    factors = rl.project(grads, sketches, spec)
    directions = rl.lift(factors, sketches, params, spec)
    given = {p: factors[p] if p.startswith("factor") else g for p, g in grads.items()}
    tx = rl.raclora(2.0**-10, spec, inner=optax.identity(), key=3)
    tx = tx if after is None else optax.chain(tx, after)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(given, state, params)
        dense = [path for path in params if not path.startswith("factor")]
        params = rl.apply_updates(params, updates) | optax.apply_updates(
            {path: params[path] for path in dense}, {p: updates[p] for p in dense}
        )
        return (params, state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=MERGES)[0])
    end, state = run((params, tx.init(params)))
    assert all(end[path].dtype == dtype for path, (dtype, _) in cases().items())
    for path, direction in directions.items():
        wanted[path] = -(2.0**-10) * MERGES * np.asarray(direction, np.float64)
    return params, end, wanted, state


def test_the_default_keeps_what_nearest_loses():
    """Dense form with wide and 16-bit gradients, factor form, biases."""
    start, end, drift, _ = train("auto")
    for path, wanted in drift.items():
        share = share_kept(start[path], end[path], wanted)
        assert abs(share - 1) < max(0.01, 4.5 * NOISE / np.sqrt(wanted.size)), path
    moved = [share_kept(start[path], end[path], drift[path]) for path in drift]
    assert np.mean(moved) >= 0.99
    start, end, drift, _ = train("nearest")
    for path, wanted in drift.items():
        assert share_kept(start[path], end[path], wanted) <= 0.2, path


def test_master_keeps_it_in_the_state():
    start, end, drift, state = train("master")
    assert sorted(state.master) == sorted(drift)
    for path, wanted in drift.items():
        assert share_kept(start[path], state.master[path], wanted) >= 0.999, path
        assert share_kept(start[path], end[path], wanted) >= 0.98, path
        exact = np.asarray(start[path], np.float64) + wanted
        # Every sum rounds once at the size of the weights, below 8.
        np.testing.assert_allclose(
            state.master[path], exact, rtol=0, atol=MERGES * 8 * 2**-24
        )
        if path.startswith("factor") or path.endswith("float32"):
            # Updates of 16 bits cannot land everywhere.
            shown = state.master[path].astype(end[path].dtype)
            np.testing.assert_array_equal(end[path], shown, err_msg=path)


def test_scaling_after_raclora_loses_it():
    """Nothing may follow: half of an update that lands lies between two weights."""
    start, end, drift, _ = train("auto", after=optax.scale(0.5))
    for path, wanted in drift.items():
        share = share_kept(start[path], end[path], wanted / 2)
        if path.startswith("factor"):
            continue  # rounded later, by rl.apply_updates: scaling is allowed
        assert share <= 0.6, path
    path = "factor_bfloat16_by_bfloat16"
    share = share_kept(start[path], end[path], drift[path] / 2)
    assert abs(share - 1) < 4.5 * np.sqrt(2) * NOISE / np.sqrt(drift[path].size)


@pytest.mark.parametrize("rounded", ["auto", "nearest"])
def test_merging_adapters_keeps_it(rounded):
    """200 links of the adapter form, each with its own sketch."""
    spec = rl.Spec(RANK, rounding=rounded)
    start = {f"{name}_{dtype}": dtype for dtype in LOW for name in ("kernel", "bias")}
    shapes = {"kernel": SHAPE, "bias": (LENGTH,)}
    grads = {p: normal(20 + i, shapes[p.split("_")[0]]) for i, p in enumerate(start)}
    ratios = {path: RATIO[dtype] for path, dtype in start.items()}
    start = {path: grads[path][::-1].astype(dtype) for path, dtype in start.items()}
    factors, chain = rl.init_adapter(start, spec, key=5)

    def link(carry, _):
        base, factors, chain, drift = carry
        steps = rl.project(grads, chain.sketches, spec)
        deltas = rl.lift(steps, chain.sketches, base, spec)
        for path, delta in deltas.items():
            rate = -ratios[path] / jnp.sqrt(jnp.mean(delta**2))
            step = steps[path].value if is_factor(steps[path]) else steps[path]
            factors = factors | {path: rate * step}
            drift = drift | {path: drift[path] + rate * delta}
        return (*rl.next_link(base, factors, chain, spec), drift), None

    zero = jax.tree.map(jnp.zeros_like, grads)
    run = jax.jit(lambda carry: jax.lax.scan(link, carry, length=MERGES)[0])
    end, _, _, drift = run((start, factors, chain, zero))
    for path, wanted in drift.items():
        share = share_kept(start[path], end[path], np.asarray(wanted, np.float64))
        if rounded == "auto":
            # A kernel's drift is a random walk around half of its length.
            assert abs(share - 1) < max(0.01, 9 * NOISE / np.sqrt(wanted.size)), path
        else:
            assert share <= 0.2, path


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_is_right_on_average(dtype):
    """Both signs, next to powers of two, and exact values, which must stay."""
    eps = float(jnp.finfo(dtype).eps)
    exact = np.array(
        [1.0, 1 + eps / 3, 2 - eps / 5, -1 - eps / 7, -0.75, 0.013, -3.1e3, 0.0, 6.2e-3],
        np.float32,
    )
    draws = 20_000
    keys = jax.random.split(jax.random.key(9), draws)
    rounded = jax.vmap(lambda key: rounding.stochastic(exact, dtype, key))
    got = np.asarray(jax.jit(rounded)(keys), np.float64)
    np.testing.assert_array_equal(got, got.astype(dtype).astype(np.float64))
    assert (np.abs(got - exact) < eps * np.abs(exact) + 1e-30).all()
    on_grid = exact.astype(dtype).astype(np.float32) == exact
    assert 3 <= on_grid.sum() < len(exact)
    assert (got[:, on_grid] == exact[on_grid]).all()
    error = got.std(axis=0)[~on_grid] / np.sqrt(draws)
    assert (error > 0).all()
    z = (got.mean(axis=0) - exact)[~on_grid] / error
    assert np.abs(z).max() < 4.5, z


@pytest.mark.parametrize("update_dtype", ["float32", *LOW])
@pytest.mark.parametrize("dtype", LOW)
def test_the_landing_update_lands(dtype, update_dtype):
    """Exactly in float32; in 16 bits where weight and target are within a factor 2."""
    keys = jax.random.split(jax.random.key(2), 4)
    weight = jax.random.normal(keys[0], (5000,)).astype(dtype)
    ratio = jax.random.uniform(keys[1], (5000,), minval=0.5, maxval=2.0)
    target = rounding.nearest(weight.astype(jnp.float32) * ratio, dtype)
    if dtype != update_dtype != "float32":
        # Another 16-bit dtype cannot hold every difference; stay near the weight.
        near = 1 + (ratio - 1) / 64
        target = rounding.nearest(weight.astype(jnp.float32) * near, dtype)
    update = rounding.landing_update(weight, target, update_dtype, keys[2])
    assert update.dtype == jnp.dtype(update_dtype)
    landed = np.asarray(optax.apply_updates(weight, update), np.float32)
    if (dtype, update_dtype) == ("float16", "bfloat16"):
        # 8 bits cannot name a neighbour among 11 where the step is long.
        assert np.abs(landed - target).max() <= 2**-8 * np.abs(target - weight).max()
        return
    np.testing.assert_array_equal(landed, target)


@pytest.mark.parametrize("dtype", LOW)
def test_the_landing_update_is_right_on_average_elsewhere(dtype):
    """Weights at zero, steps across zero, steps far longer than the weight."""
    cases = np.array(
        [
            # weight, target before it is put on the grid
            (0.0, 0.013),
            (0.0, -7.7e-3),
            (1.0, -0.0371),
            (-0.51, 0.043),
            (3e-2, 1.937),
            (1.26e-2, -1.141),
            (2.09, 0.0123),
        ],
        np.float32,
    )
    weight = jnp.asarray(cases[:, 0]).astype(dtype)
    target = rounding.nearest(jnp.asarray(cases[:, 1]), dtype)
    draws = 8000
    keys = jax.random.split(jax.random.key(4), draws)

    def land(key):
        update = rounding.landing_update(weight, target, dtype, key)
        return optax.apply_updates(weight, update)

    got = np.asarray(jax.jit(jax.vmap(land))(keys), np.float64)
    error = got.std(axis=0) / np.sqrt(draws)
    z = (got.mean(axis=0) - np.asarray(target)) / np.maximum(error, 1e-12)
    assert np.abs(z).max() < 4.5, z
    np.testing.assert_array_equal(got[:, :2], np.broadcast_to(target[:2], (draws, 2)))


@pytest.mark.parametrize("dtype", LOW)
def test_small_steps_from_zero_weights_are_right_on_average(dtype):
    """The bias of a fresh layer, tiny steps, gradients in the same 16 bits."""
    spec = rl.Spec(1)
    params = {"bias": jnp.zeros((40_000,), dtype), "kernel": jnp.zeros((3, 2), dtype)}
    tx = rl.raclora(1e-3, spec, inner=optax.identity(), key=0)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.7531), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    end = np.asarray(optax.apply_updates(params, updates)["bias"], np.float64)
    want = -1e-3 * float(grads["bias"][0])
    assert len(set(end.tolist())) == 2
    assert abs(end.mean() - want) < 4.5 * end.std() / np.sqrt(len(end))


def test_the_numbers_behind_the_rounding():
    """Uniform, and without memory along an axis, between keys and between axes."""
    count = 1 << 16
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(2)]
    flat, other = (
        np.asarray(
            rounding._fraction(rounding._hash(k, rounding.places_of((count,)))), float
        )
        for k in keys
    )
    square = np.asarray(
        rounding._fraction(rounding._hash(keys[0], rounding.places_of((256, 256)))), float
    )
    np.testing.assert_array_equal(square.ravel(), flat)
    assert flat.min() >= 0
    assert flat.max() < 1
    cells = 1 << 8
    bins = np.bincount((flat * cells).astype(int), minlength=cells)
    spread = ((bins - count / cells) ** 2).sum() / (count / cells)
    assert abs(spread - (cells - 1)) < 5 * np.sqrt(2 * cells)
    pairs = [(flat, other), (flat[1:], flat[:-1]), (flat[256:], flat[:-256])]
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize(
    ("side", "dtype"), chequered(["left", "right"], ["float32", "bfloat16"])
)
def test_no_dense_delta_is_in_memory(side, dtype):
    """Lift, decay, rounding and the addition are one pass over the donated weights."""
    spec = rl.Spec(8, side=side, rules=[rl.Rule("stack", batch=0)])
    shapes = {"kernel": (128, 256), "stack": (3, 256, 128)}
    params = {path: jnp.ones(shape, dtype) for path, shape in shapes.items()}
    tx = rl.raclora(1e-3, spec, key=0)
    grads = rl.project(params, rl.sample_sketch(params, spec, key=0), spec)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)

    def apply(params, updates, state):
        return rl.apply_updates(params, updates)

    compiled = jax.jit(apply, donate_argnums=0).lower(params, updates, state).compile()
    memory = compiled.memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory.alias_size_in_bytes == weights
    assert memory.temp_size_in_bytes < 0.2 * weights


@pytest.mark.parametrize("rank", [repeat(16), 17])
def test_a_lift_is_one_sum_however_it_is_computed(rank):
    """Outer products up to some rank, a matmul above it; any order of axes."""
    views = {"left": {}, "right": {}, "mixed": {"rows": (1, 3), "batch": 2}}
    for name, view in views.items():
        shape = (5, 6, 3, 7) if view else (42, 35)
        rule = rl.Rule("w", side="right" if name == "right" else "left", **view)
        spec = rl.Spec(rank, alpha=2.0 * rank, rules=[rule])
        params = {"w": jnp.zeros(shape)}
        sketches = rl.sample_sketch(params, spec, key=0)
        factors = rl.project({"w": normal(1, shape)}, sketches, spec)
        got = rl.lift(factors, sketches, params, spec)["w"]
        S, F = (np.asarray(a, float) for a in (sketches["w"], factors["w"].value))
        product = {"left": "ri,rj->ij", "right": "rj,ri->ij", "mixed": "brik,brj->jibk"}
        want = 2.0 * np.einsum(product[name], S, F)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_values_that_are_not_finite_stay():
    exact = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0], jnp.float32)
    key = jax.random.key(0)
    for dtype in LOW:
        got = rounding.stochastic(exact, dtype, key)
        np.testing.assert_array_equal(got, exact)
        weight = jnp.array([1.0, 1.0, 1.0, 1.0], dtype)
        update = rounding.landing_update(weight, got, dtype, key)
        landed = optax.apply_updates(weight, update).astype(jnp.float32)
        np.testing.assert_array_equal(landed, got)


@pytest.mark.parametrize("rounded", [repeat("auto"), "nearest", "master"])
def test_dense_form_and_factor_form_draw_the_same_neighbours(rounded):
    """The same bits of every weight, tiny float16 ones included."""
    spec = rl.Spec(3, resample_every=2, rounding=rounded)
    start = {}
    for seed, dtype in enumerate(LOW):
        start[f"kernel_{dtype}"] = normal(seed, (11, 7), dtype)
        start[f"tiny_{dtype}"] = (3e-5 * normal(seed, (11, 7))).astype(dtype)
        start[f"bias_{dtype}"] = normal(seed, (13,), dtype)
    tx = rl.raclora(3e-3, spec, weight_decay=0.1, key=1)
    dense, factor = start, start
    dense_state, factor_state = tx.init(start), tx.init(start)
    for step in range(3):
        grads = {
            path: normal(10 * step + i, leaf.shape)
            for i, (path, leaf) in enumerate(start.items())
        }
        updates, dense_state = tx.update(grads, dense_state, dense)
        dense = optax.apply_updates(dense, updates)
        sketches = rl.sample_sketch(start, spec, key=1, link=step // 2)
        factors = rl.project(grads, sketches, spec)
        updates, factor_state = tx.update(factors, factor_state, factor)
        factor = rl.apply_updates(factor, updates)
        for path in start:
            np.testing.assert_array_equal(dense[path], factor[path], err_msg=path)
    moved = [bool((start[path] != dense[path]).any()) for path in start]
    assert all(moved) if rounded == "auto" else any(moved)
