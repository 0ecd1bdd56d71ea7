"""The price list agrees with what init and one step really allocate."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import raclora_jax as rl

PARAMS = {
    "embed": jax.ShapeDtypeStruct((96, 24), "bfloat16"),
    "attention": {
        "query": jax.ShapeDtypeStruct((3, 24, 2, 5), "bfloat16"),
        "bias": jax.ShapeDtypeStruct((3, 2, 5), "float32"),
    },
    "head": jax.ShapeDtypeStruct((24, 3), "float32"),
    "fixed": jax.ShapeDtypeStruct((24, 7), "float32"),
}
SPEC = rl.Spec(
    4,
    side="smaller",
    rules=[
        rl.Rule("attention/query", batch=0, rows=1, rank=2),
        rl.Rule("attention/bias", mode="dense"),
        rl.Rule("fixed", mode="frozen"),
    ],
)


def real_params():
    return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), PARAMS)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("rounding", ["auto", "master"])
@pytest.mark.parametrize("inner", [None, optax.trace(0.9), optax.identity()])
def test_bytes_are_those_of_a_real_state(inner, rounding):
    spec = rl.Spec(4, rules=SPEC.rules, rounding=rounding)
    state = rl.raclora(0.1, spec, inner=inner, key=0).init(real_params())
    total = rl.summary(PARAMS, spec, inner=inner).total
    assert total.state_bytes + total.sketch_bytes == nbytes(state)
    assert total.weight_bytes == nbytes(real_params())


def test_gradient_bytes_are_those_of_factor_gradients():
    params = real_params()
    sketches = rl.sample_sketch(params, SPEC, key=0)
    grads = rl.project(params, sketches, SPEC)
    # What else a Factor has is zero, and not there once a step is compiled.
    values = [
        leaf.value if is_factor(leaf) else leaf
        for leaf in jax.tree.leaves(grads, is_leaf=is_factor)
    ]
    costs = rl.summary(PARAMS, SPEC)
    assert costs.total.gradient_bytes == nbytes(values)
    assert costs.total.traffic_bytes == costs.total.gradient_bytes


def test_rows():
    rows = {row.path: row for row in rl.summary(PARAMS, SPEC).rows}
    query = rows["attention/query"]
    assert (query.view, query.rank, query.side) == ("[3] x 24 x 2*5", 2, "right")
    assert query.lam == 2 / 10
    assert query.trained == 3 * 2 * 24
    assert rows["embed"].trained == 4 * 96
    assert (rows["head"].mode, rows["head"].trained) == ("dense", 72)
    assert (rows["fixed"].mode, rows["fixed"].trained) == ("frozen", 0)


def test_beside_full_and_lora():
    costs = rl.summary(PARAMS, SPEC)
    numbers = 96 * 24 + 3 * 24 * 10 + 3 * 10 + 24 * 3  # all but the frozen leaf
    assert costs.full.trained == numbers
    assert costs.full.state_bytes == 2 * 4 * numbers + 4
    pairs = 4 * (96 + 24) + 3 * 2 * (24 + 10)
    assert costs.lora.trained == pairs + 3 * 10 + 24 * 3
    assert costs.total.state_bytes < costs.lora.state_bytes < costs.full.state_bytes


def test_warnings_and_text():
    costs = rl.summary(PARAMS, SPEC)
    assert any("'embed'" in warning for warning in costs.warnings)
    assert any("'head' is dense: rank 4" in warning for warning in costs.warnings)
    text = str(costs)
    for word in ("attention/query", "[3] x 24 x 2*5", "lambda", "LoRA, Adam", "warning:"):
        assert word in text


def widest(text):
    return max(map(len, text.splitlines()))


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def layer():
    attention = {name: abstract(768, 768) for name in ("query", "key", "value")}
    return {"attention": attention, "mlp": {"up": abstract(768, 3072)}}


def leaf_lines(costs):
    """The table of leaves, as ``{name: cells}``; cells are two spaces apart."""
    _, table, *_ = str(costs).split("\n\n")
    lines = [re.split(" {2,}", line) for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in lines}


def test_equal_layers_share_a_line_with_their_sum():
    params = {"layers": [layer() for _ in range(12)], "head": abstract(768, 100)}
    costs = rl.summary(params, 8)
    lines = leaf_lines(costs)
    assert set(lines) == {
        "head",
        "layers/{0..11}/attention/query",
        "layers/{0..11}/attention/key",
        "layers/{0..11}/attention/value",
        "layers/{0..11}/mlp/up",
    }
    numbers = 12 * 8 * 3072
    assert lines["layers/{0..11}/mlp/up"][:5] == [
        "12 of 768 x 3072", "8", "left", "0.0104", f"{numbers:,}"
    ]  # fmt: skip
    told = sum(int(cells[4].replace(",", "")) for cells in lines.values())
    assert told == costs.total.trained
    assert len(costs.rows) == 1 + 12 * 4
    every = costs.by_leaf().splitlines()[2:]
    assert [line.split()[0] for line in every] == [row.path for row in costs.rows]


def test_layers_that_differ_keep_their_own_line():
    params = {f"block_{i}": {f"expert_{j}": abstract(64, 32) for j in range(4)}
              for i in range(6)}  # fmt: skip
    rules = [
        rl.Rule("block_2/expert_3", rank=2),
        rl.Rule("block_4/.*", mode="dense"),
        rl.Rule("block_5/.*", mode="frozen"),
    ]
    costs = rl.summary(params, rl.Spec(4, rules=rules))
    lines = leaf_lines(costs)
    assert {name: cells[:2] for name, cells in lines.items()} == {
        "block_{0..1, 3}/expert_{0..3}": ["12 of 64 x 32", "4"],
        "block_2/expert_{0..2}": ["3 of 64 x 32", "4"],
        "block_2/expert_3": ["64 x 32", "2"],
        "block_4/expert_{0..3}": ["4 of 64 x 32", "dense"],
        "block_5/expert_{0..3}": ["4 of 64 x 32", "frozen"],
    }
    assert lines["block_5/expert_{0..3}"][2:] == ["0", "0 B"]


def test_stacks_and_drawn_sides():
    spec = rl.Spec(
        4,
        side=0.5,
        rules=[rl.Rule("stack", batch=0, rows=1, side="left"), rl.Rule("w[0-9]")],
    )
    params = {"stack": abstract(24, 64, 8, 16), "w0": abstract(64, 32)}
    params["w1"] = params["w0"]
    lines = leaf_lines(rl.summary(params, spec))
    assert lines["stack"][:3] == ["[24] x 64 x 8*16", "4", "left"]
    assert lines["w{0..1}"][:3] == ["2 of 64 x 32", "4", "0.5"]


def test_no_line_is_wider_than_a_hundred_columns():
    deep = "transformer/module/layers_{}/self_attention/out_projection/kernel"
    params = {deep.format(i): abstract(8, 2048, 32, 64) for i in range(40)}
    params["x" * 120] = params[deep.format(0)]
    costs = rl.summary(params, rl.Spec(128, rules=[rl.Rule(".*", batch=0, rows=1)]))
    assert widest(str(costs)) == 100
    deep, long = leaf_lines(costs)
    assert re.fullmatch(r"transf\w*\.\.\.\w*t_projection/kernel", deep)
    assert re.fullmatch(r"x+\.\.\.x+", long)
    many = {f"{'x' * 90}_{i}": abstract(2000, 2000) for i in range(9)}
    text = str(rl.summary(many, 4))  # a warning that names one of them
    assert "warning: 9 leaves" in text
    assert widest(text) <= 100


def test_a_single_leaf():
    costs = rl.summary(jax.ShapeDtypeStruct((512, 6), "float32"), 2)
    state = rl.raclora(0.1, 2, key=0).init(jnp.ones((512, 6)))
    assert costs.total.state_bytes + costs.total.sketch_bytes == nbytes(state)
    assert "(leaf)" in str(costs)


def test_a_spec_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="wins no leaf"):
        rl.summary(PARAMS, rl.Spec(4, rules=[*SPEC.rules, rl.Rule("nothing")]))


def loss_fn(params, x):
    hidden = x @ params["first"]
    hidden, _ = jax.lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), hidden, params["stack"]
    )
    return jnp.mean(hidden @ params["last"]) + jnp.mean(params["last"] ** 2)


LOSS_PARAMS = {
    "first": jax.ShapeDtypeStruct((32, 64), "float32"),
    "stack": jax.ShapeDtypeStruct((3, 64, 64), "float32"),
    "last": jax.ShapeDtypeStruct((64, 48), "float32"),
}


def test_peak_is_what_the_compiler_confirms():
    x = jax.ShapeDtypeStruct((256, 32), "float32")
    spec = rl.trace_spec(loss_fn, LOSS_PARAMS, x, rank=4)
    costs = rl.summary(LOSS_PARAMS, spec, loss_fn, x)
    tx = rl.raclora(1e-3, spec, weight_decay=0.1, key=0)
    grad_fn = rl.value_and_grad(loss_fn, spec)

    def step(params, opt_state, x):
        loss, grads = grad_fn(params, opt_state, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return rl.apply_updates(params, updates), opt_state, loss

    state = jax.eval_shape(tx.init, LOSS_PARAMS)
    with pytest.warns(UserWarning, match="'last' by"):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(LOSS_PARAMS, state, x)
    memory = lowered.compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert costs.peak_bytes == pytest.approx(held, rel=0.1)
    assert f"peak of a compiled step: {costs.peak_bytes / 1024:.1f} KiB" in str(costs)
    grads = jax.eval_shape(grad_fn, LOSS_PARAMS, state, x)[1]
    values = [g.value for g in jax.tree.leaves(grads, is_leaf=is_factor)]
    assert costs.total.gradient_bytes == sum(v.size * v.dtype.itemsize for v in values)


def is_factor(node):
    return isinstance(node, rl.Factor)


def test_dense_gradients_are_listed():
    x = jnp.ones((8, 32))
    spec = rl.trace_spec(loss_fn, LOSS_PARAMS, x, rank=4)
    costs = rl.summary(LOSS_PARAMS, spec, loss_fn, x)
    assert [w for w in costs.warnings if "formed in full" in w] == [
        "leaf 'last': its gradient is formed in full by integer_pow"
    ]
    assert rl.summary(LOSS_PARAMS, spec).peak_bytes is None
