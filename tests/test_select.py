"""Sketches that pick rows: blocks and coordinates, and what is spared by them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import chequered, repeat
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from benchmarks import hlo
from raclora_jax._core import lowrank, merge, select
from raclora_jax._core.factor import Origin
from raclora_jax._core.plan import plan_tree

LAWS = ("block", "coordinate")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def picked_rows(spec, shape, links, key=0):
    """The rows that each link picks of one leaf, by the oracle."""
    like = {"w": jax.ShapeDtypeStruct(shape, "float32")}
    plan = plan_tree(spec, like)["w"]
    draw = jax.jit(
        jax.vmap(lambda link: rl.sample_sketch(like, spec, key=key, link=link)["w"])
    )
    S = reference.explicit(draw(jnp.arange(links)), plan)
    S = S.reshape(links, plan.rank, plan.dim)
    assert (S.sum(axis=2) == 1).all()
    return S.argmax(axis=2)


@pytest.mark.parametrize(
    ("shape", "rank", "rows"),
    [((12, 20), 3, 0), ((64, 80), 16, 0), ((4, 16, 80), 8, (0, 1)), ((9, 20), 1, 0)],
)
def test_a_cycle_covers_every_row_once(shape, rank, rows):
    """And the next one does so in another order."""
    spec = rl.Spec(rank, side="left", sketch="block", rules=[rl.Rule("w", rows=rows)])
    dim = int(np.prod(shape[:-1]))
    cycle = dim // rank
    cycles = picked_rows(spec, shape, 4 * cycle).reshape(4, cycle * rank)
    for one in cycles:
        assert sorted(one) == list(range(dim))
    assert len({tuple(one) for one in cycles}) > 1
    others = picked_rows(spec, shape, cycle, key=1).ravel()
    assert any((others != one).any() for one in cycles)


@pytest.mark.parametrize(
    ("rank", "side", "dtype"),
    chequered([4, 16], ["left", "right"], ["float32", "bfloat16"]),
)
def test_a_matrix_of_a_stack_moves_in_place_as_it_does_alone(rank, side, dtype):
    """One run of rows, and two; the same bits, and no other matrix is touched."""
    rules = [rl.Rule("w", batch=0, rows=1)]
    spec = rl.Spec(rank, side=side, sketch="block", rules=rules)
    stack = jnp.asarray(normal(0, 3, 64, 80), dtype)
    plan = plan_tree(spec, {"w": stack})["w"].of_slice
    assert plan.selection.runs == {4: 1, 16: 2}[rank]
    value = jnp.asarray(normal(1, *plan.factor_shape), "float32") / 50
    key = jax.random.key(2) if dtype == "bfloat16" else None
    picks = rl.sample_sketch({"w": stack}, spec, key=0, link=1)["w"][1]
    start = jnp.uint32(64 * 80)
    options = plan, plan.rounding, key, start
    want = merge.merge_leaf(stack[1], value, picks, np.zeros(()), *options)
    found = merge.merge_in_stack(stack, value, picks, *options, jnp.int32(1))
    np.testing.assert_array_equal(found[1], want)
    assert int(np.sum(found[1] != stack[1])) > rank
    np.testing.assert_array_equal(found[::2], stack[::2])


@pytest.mark.parametrize(("dim", "rank"), [(11, 4), (10, 7), (9, 2)])
def test_a_rank_that_does_not_divide_leaves_rows_out(dim, rank):
    spec = rl.Spec(rank, side="left", sketch="block")
    cycle = dim // rank
    cycles = picked_rows(spec, (dim, 30), 50 * cycle).reshape(50, cycle * rank)
    for one in cycles:
        assert len(set(one)) == cycle * rank
    left_out = {tuple(sorted(set(range(dim)) - {*one})) for one in cycles}
    assert len(left_out) > dim // 2
    said = "\n".join(rl.summary({"w": jnp.zeros((dim, 30))}, spec).warnings)
    assert re.search(f"'w'.*leave {dim % rank} out of each cycle of {cycle}", said)


def test_runs_lie_alike_in_equal_parts():
    """Where a mesh shards a side in as many parts, every shard has its share."""
    for shape, rank, rows, runs in [
        ((512, 600), 128, 0, 8),
        ((512, 600), 32, 0, 4),
        ((8, 64, 600), 128, (0, 1), 8),
        ((3, 3, 16, 600), 36, (0, 1, 2), 9),
    ]:
        rule = rl.Rule("w", rows=rows)
        spec = rl.Spec(rank, side="left", sketch="block", rules=[rule])
        plan = plan_tree(spec, {"w": jax.ShapeDtypeStruct(shape, "float32")})["w"]
        assert plan.selection.runs == runs
        for picks in picked_rows(spec, shape, 5):
            part = plan.dim // runs
            places = picks.reshape(runs, rank // runs) - part * np.arange(runs)[:, None]
            assert (places == places[0]).all()
            assert (np.diff(places[0]) == 1).all()
            assert places[0][0] >= 0
            assert places[0][-1] < part


VIEWS = {
    "left": ((24, 7), {}),
    "right": ((7, 24), {"side": "right"}),
    "heads": ((3, 8, 5), {"rows": (0, 1)}),
    "columns in two": ((5, 3, 8), {"rows": 0, "side": "right"}),
    "stack": ((4, 24, 7), {"batch": 0}),
    "stack in the middle": ((24, 4, 7), {"batch": 1}),
    "rows apart": ((6, 5, 4), {"rows": (0, 2)}),
}


@pytest.mark.parametrize(("name", "rank", "law"), chequered(VIEWS, [4, 5], LAWS))
def test_picking_is_what_a_product_with_the_sketch_is(name, rank, law):
    """``project``, ``lift`` and the change of basis, against the explicit sketch."""
    shape, fields = VIEWS[name]
    rule = rl.Rule("w", **{"side": "left", **fields})
    spec = rl.Spec(rank, sketch=law, alpha=3.0 * rank, rules=[rule])
    params = {"w": jnp.asarray(normal(1, *shape), jnp.float32)}
    plan = plan_tree(spec, params)["w"]
    arrays = plan_tree(
        rl.Spec(rank, alpha=3.0 * rank, rules=[rl.Rule("w", **rule_fields(rule))]), params
    )["w"]
    sketches = [rl.sample_sketch(params, spec, key=0, link=i)["w"] for i in (0, 1)]
    explicit = [jnp.asarray(reference.explicit(s, plan), jnp.float32) for s in sketches]
    np.testing.assert_array_equal(lowrank.formed(sketches[0], plan), explicit[0])
    factor = lowrank.project_leaf(params["w"], sketches[0], plan)
    want = lowrank.project_leaf(params["w"], explicit[0], arrays)
    np.testing.assert_allclose(factor, want, rtol=1e-6)
    np.testing.assert_allclose(
        lowrank.lift_leaf(factor, sketches[0], plan),
        lowrank.lift_leaf(factor, explicit[0], arrays),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        lowrank.change_of_basis(sketches[1], sketches[0], plan),
        lowrank.change_of_basis(explicit[1], explicit[0], arrays),
        atol=1e-6,
    )


def rule_fields(rule):
    return {name: getattr(rule, name) for name in ("side", "rows", "batch")}


@pytest.mark.parametrize(
    ("name", "law", "dtype"), chequered(VIEWS, LAWS, ["float32", "bfloat16"])
)
def test_other_rows_keep_their_bits(name, law, dtype):
    """And the picked ones are those of the dense form, rounding included."""
    shape, fields = VIEWS[name]
    rules = [rl.Rule("w", **{"side": "left", **fields})]
    spec = rl.Spec(4, sketch=law, rules=rules)
    start = {"w": jnp.asarray(normal(1, *shape), dtype)}
    grads = {"w": jnp.asarray(normal(2, *shape), "float32")}
    tx = rl.raclora(1e-3, spec, key=0)

    @jax.jit
    def factor_step(params):
        state = tx.init(params)
        sketches = rl.sample_sketch(params, spec, key=0)
        updates, state = tx.update(rl.project(grads, sketches, spec), state, params)
        return rl.apply_updates(params, updates)

    @jax.jit
    def dense_step(params):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    ours, dense = factor_step(start)["w"], dense_step(start)["w"]
    if dtype == "bfloat16":
        np.testing.assert_array_equal(ours, dense)
    np.testing.assert_allclose(np.float32(ours), np.float32(dense), rtol=1e-6)
    plan = plan_tree(spec, start)["w"]
    S = jnp.asarray(rl.sample_sketch(start, spec, key=0)["w"])
    ones = jnp.ones(plan.factor_shape)
    touched = np.asarray(lowrank.lift_leaf(ones, S, plan)) != 0
    assert 0 < touched.sum() < touched.size
    np.testing.assert_array_equal(ours[~touched], start["w"][~touched])
    assert (np.float32(ours) != np.float32(start["w"]))[touched].any()


def test_weight_decay_reaches_every_row():
    params = {"w": jnp.ones((24, 30))}
    spec = rl.Spec(4, sketch="block")
    tx = rl.raclora(0.1, spec, weight_decay=0.5, key=0)
    sketches = rl.sample_sketch(params, spec, key=0)
    grads = rl.project(jax.tree.map(jnp.zeros_like, params), sketches, spec)
    updates, _ = tx.update(grads, tx.init(params), params)
    ends = rl.apply_updates(params, updates)["w"]
    np.testing.assert_allclose(ends, 0.95, rtol=1e-6)


# The step of a small network, each size a number that stands for itself.
SIZES = {"up": (48, 131), "mix": (131, 66), "down": (66, 29)}


def network(params, x):
    for name in SIZES:
        x = jnp.tanh(x @ params[name])
    return jnp.sum(x**2)


def compiled_step(spec, dtype="float32", weight_decay=0.0):
    params = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in SIZES.items()}
    tx = rl.raclora(0.1, spec, inner=rl.orthogonal(), weight_decay=weight_decay, key=0)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, x):
        grads = rl.grad(network, spec)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state

    x = jax.ShapeDtypeStruct((37, 48), dtype)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, x).compile()


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_product_with_a_one_hot_and_no_full_size_delta(side):
    """The compiled step multiplies by no sketch; with arrays for sketches it does."""
    rank = 6 if side == "left" else 7
    leaves = dict(SIZES)
    widths = {
        law: rl.Spec(rank, side=side, sketch=law) for law in ("block", "gaussian_raw")
    }
    found = {}
    for law, spec in widths.items():
        text = compiled_step(spec).as_text()
        assert hlo.weight_gradients(text, leaves, rank) == []
        found[law] = hlo.products(text)
    # Forward and backward of the frozen network, and for each factor its gradient, its
    # Gram matrix and its direction.
    own = [p for p in found["block"] if not is_square(p, rank)]
    assert len(own) == 3 + 2 + 3 * 3, own
    more = [p for p in found["gaussian_raw"] if not is_square(p, rank)]
    assert len(more) >= len(own) + 3


def is_square(product, rank):
    """Whether a product is one of the polar factor's at rank x rank."""
    return product.shape[-2:] == (rank, rank) and product.contracted == rank


def update_of(params, value, state, spec):
    """The update of one leaf with a given factor, on the sketch that a state holds."""
    plan = plan_tree(spec, params)["w"]
    origin = Origin.of(plan, state.sketches.values["w"], None, None)
    return {"w": rl.Factor(value, np.zeros(()), plan.stamp, origin)}


def test_memory_of_a_step_is_that_of_the_factors():
    spec = rl.Spec(16, side="left", sketch="block")
    params = {"w": jax.ShapeDtypeStruct((512, 2048), "float32")}
    state = jax.eval_shape(rl.raclora(0.1, spec, key=0).init, params)
    factor = jax.ShapeDtypeStruct((16, 2048), "float32")

    def apply(params, value, state):
        return rl.apply_updates(params, update_of(params, value, state, spec))

    memory = (
        jax.jit(apply, donate_argnums=0)
        .lower(params, factor, state)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == 4 * 512 * 2048
    assert memory.temp_size_in_bytes <= 3 * 4 * 16 * 2048


@pytest.mark.parametrize("side", ["left", "right"])
def test_on_a_mesh_nothing_is_sent_for_a_sketch(side):
    """Rows sharded in as many parts as a block has runs stay where they are."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    spec = rl.Spec(64, side=side, sketch="block")
    axes = ("x", None) if side == "left" else (None, "x")
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    params = {"w": jax.device_put(normal(0, 128, 128).astype("f"), sharding)}
    tx = rl.raclora(0.1, spec, inner=optax.identity(), key=0)
    state = tx.init(params)

    def apply(params, state, value):
        return rl.apply_updates(params, update_of(params, value, state, spec))

    value = jnp.asarray(normal(1, 64, 128), jnp.float32)
    text = jax.jit(apply).lower(params, state, value).compile().as_text()
    sent = re.findall(r" (all-\w+|collective-permute|reduce-scatter)\(", text)
    assert not sent, sent
    alone = {"w": jnp.asarray(params["w"])}
    got, want = apply(params, state, value), apply(alone, state, value)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)


@pytest.mark.parametrize("condition", [10.0, 1000.0])
def test_the_bounds_of_a_cycle(condition):
    """``D >= |g|^2 / (2 (1 + C))`` for every draw, ``/ (2 (1 + h))`` in the mean.

    ``D`` is the sum over a cycle of ``|H grad|^2``, which gradient descent on the factor
    at ``gamma = 1 / L`` turns into descent; ``C = dim / rank`` links are a cycle, and
    ``h = 1 + 1/2 + ... + 1/(C - 1)``.
    """
    dim, rank = 16, 2
    cycle = dim // rank
    rotation = np.linalg.qr(normal(0, dim, dim))[0]
    hessian = (rotation * np.geomspace(1, condition, dim) / condition) @ rotation.T
    start, spec = (
        normal(1, dim, 3),
        rl.Spec(rank, side="left", sketch="block", resample_every=1),
    )
    with jax.enable_x64(True):
        H = jnp.asarray(hessian)

        def captured(key):
            tx = rl.raclora(1.0, spec, inner=optax.identity(), key=key)

            def step(carry, _):
                W, state = carry
                updates, state = tx.update(H @ W, state, W)
                return (W + updates, state), jnp.sum(updates**2)

            carry = jnp.asarray(start), tx.init(jnp.asarray(start))
            return jnp.sum(jax.lax.scan(step, carry, None, cycle)[1])

        keys = jax.random.split(jax.random.key(0), 400)
        ratios = np.asarray(jax.jit(jax.vmap(captured))(keys))
    ratios = ratios / np.sum((hessian @ start) ** 2)
    harmonic = sum(1 / k for k in range(1, cycle))
    assert ratios.min() >= 1 / (2 * (1 + cycle))
    error = ratios.std() / np.sqrt(len(ratios))
    assert ratios.mean() - 4 * error >= 1 / (2 * (1 + harmonic))
    # No law without memory has the sure bound: four independent links of eight may agree.
    assert len(np.unique(ratios.round(12))) > 10


def test_rows_by_the_mesh_or_the_rank_are_the_same_numbers():
    """A selection is a function of sizes alone."""
    assert select.selection_of("block", 128, [512]).runs == 8
    assert select.selection_of("block", 8, [512]).runs == 1
    assert select.selection_of("block", 24, [512]).runs == 1
    assert not select.selection_of("block", 24, [512]).sliced
    assert select.selection_of("coordinate", 24, [512]).runs == 1


@pytest.mark.parametrize("law", LAWS)
def test_a_rank_above_half_the_side(law):
    """One block a cycle, and still all of the others' laws."""
    spec = rl.Spec(5, sketch=law, resample_every=1, side="left")
    params = {"w": jnp.asarray(normal(0, 8, 9), jnp.float32)}
    tx = rl.raclora(0.5, spec, inner=optax.identity(), key=0)
    step = jax.jit(functools.partial(tx.update))
    W, state = params, tx.init(params)
    for _ in range(60):
        updates, state = step(W, state, W)
        W = optax.apply_updates(W, updates)
    assert jnp.abs(W["w"]).max() < 1e-3


def small_model(params, tokens, image):
    """A table, layers in a loop, heads, a convolution: every way that rows are picked."""
    h = params["table"][tokens]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])
    heads = jnp.einsum("btd,dhk->bthk", h, params["query"])
    h = jnp.einsum("bthk,hkd->btd", jnp.tanh(heads), params["out"])
    drawn = jax.lax.conv_general_dilated(
        image, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(h.astype("float32") ** 2) + jnp.mean(drawn.astype("float32") ** 2)


@pytest.mark.parametrize(
    ("dtype", "side", "law"),
    [
        ("float32", "left", "block"),
        repeat("float32", "left", "coordinate"),
        repeat("float32", "right", "block"),
        ("float32", "right", "coordinate"),
        *(repeat("bfloat16", side, law) for side in ("left", "right") for law in LAWS),
    ],
)
def test_gradients_of_a_model_in_its_own_dtype(dtype, side, law):
    """Slices of a convolution's taps and of heads too, against the dense gradients."""
    shapes = {
        "table": (40, 24),
        "layers": (2, 24, 24),
        "query": (24, 4, 12),
        "out": (4, 12, 24),
        "conv": (3, 3, 8, 36),
    }
    params = {
        name: jnp.asarray(0.3 * normal(i, *shape), dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 7)))
    image = jnp.asarray(normal(9, 2, 6, 5, 8), dtype)
    rules = [
        rl.Rule("layers", batch=0),
        rl.Rule("query", rows=0),
        rl.Rule("out", rows=(0, 1)),
        rl.Rule("conv", rows=(0, 1, 2), rank=18),
    ]
    spec = rl.Spec(4, side=side, sketch=law, rules=rules)
    state = rl.raclora(0.1, spec, key=0).init(params)
    ours = jax.jit(rl.grad(small_model, spec))(params, state, tokens, image)
    dense = jax.jit(jax.grad(small_model))(params, tokens, image)
    want = rl.project(dense, rl.sample_sketch(params, spec, key=0), spec)
    for path in params:
        got, expected = (np.asarray(tree[path].value) for tree in (ours, want))
        scale = np.abs(expected).max()
        assert scale > 0, path
        tolerance = 1e-5 if dtype == "float32" else 0.03
        assert np.abs(got - expected).max() <= tolerance * scale, path
