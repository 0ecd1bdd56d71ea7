"""The price list agrees with what init and one step really allocate."""

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
    scalars = sum(
        leaf.nbytes for leaf in jax.tree.leaves(grads) if jnp.ndim(leaf) == 0
    )  # decay
    costs = rl.summary(PARAMS, SPEC)
    assert costs.total.gradient_bytes == nbytes(grads) - scalars
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


def test_a_single_leaf():
    costs = rl.summary(jax.ShapeDtypeStruct((512, 6), "float32"), 2)
    state = rl.raclora(0.1, 2, key=0).init(jnp.ones((512, 6)))
    assert costs.total.state_bytes + costs.total.sketch_bytes == nbytes(state)
    assert "(leaf)" in str(costs)


def test_a_spec_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="wins no leaf"):
        rl.summary(PARAMS, rl.Spec(4, rules=[*SPEC.rules, rl.Rule("nothing")]))
