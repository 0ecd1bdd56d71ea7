"""Rules and views: what happens to each leaf is decided once, from shapes alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import raclora_jax as rl
from raclora_jax._core.spec import as_spec


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def plan_of(spec, *sizes, path="kernel"):
    return rl.plan(spec, {path: shape(*sizes)})[path]


# name: (shape, rule fields, rows, cols, batch, side, sketch shape, factor shape)
VIEWS = {
    "matrix": ((6, 10), {}, (0,), (1,), (), "left", (2, 6), (2, 10)),
    "query: (embed, heads, head_dim)": (
        (12, 4, 5),
        {"rows": 0},
        (0,),
        (1, 2),
        (),
        "left",
        (2, 12),
        (2, 4, 5),
    ),
    "out: (heads, head_dim, embed)": (
        (4, 5, 12),
        {"rows": (0, 1)},
        (0, 1),
        (2,),
        (),
        "right",
        (2, 12),
        (2, 4, 5),
    ),
    "scanned over axis 0": (
        (3, 9, 7),
        {"batch": 0},
        (1,),
        (2,),
        (0,),
        "right",
        (3, 2, 7),
        (3, 2, 9),
    ),
    "scanned over axis 1": (
        (9, 3, 7),
        {"batch": 1},
        (0,),
        (2,),
        (1,),
        "right",
        (3, 2, 7),
        (3, 2, 9),
    ),
    "scanned query": (
        (3, 12, 4, 5),
        {"batch": 0, "rows": 1},
        (1,),
        (2, 3),
        (0,),
        "left",
        (3, 2, 12),
        (3, 2, 4, 5),
    ),
    "layers of experts": (
        (3, 4, 8, 7),
        {"batch": (0, 1)},
        (2,),
        (3,),
        (0, 1),
        "right",
        (3, 4, 2, 7),
        (3, 4, 2, 8),
    ),
    "convolution": (
        (3, 2, 5, 11),
        {"rows": (0, 1, 2)},
        (0, 1, 2),
        (3,),
        (),
        "right",
        (2, 11),
        (2, 3, 2, 5),
    ),
    "embedding: (vocabulary, embed)": (
        (50, 8),
        {"rows": 0},
        (0,),
        (1,),
        (),
        "right",
        (2, 8),
        (2, 50),
    ),
    "rows after columns": (
        (6, 10),
        {"rows": -1},
        (1,),
        (0,),
        (),
        "right",
        (2, 6),
        (2, 10),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    sizes, fields, rows, cols, batch, side, sketch_shape, factor_shape = VIEWS[name]
    rules = [rl.Rule("kernel", **fields)] if fields else []
    spec = rl.Spec(2, side="smaller", rules=rules)
    plan = plan_of(spec, *sizes)
    assert (plan.mode, plan.rows, plan.cols, plan.batch) == ("lowrank", rows, cols, batch)
    assert (plan.side, plan.sketch_shape, plan.factor_shape) == (
        side,
        sketch_shape,
        factor_shape,
    )
    assert plan.dim == np.prod(sketch_shape[len(batch) + 1 :])
    assert plan.lam == 2 / plan.dim
    assert plan.assumed_view == (not fields)
    # The algebra agrees with the shapes, and is that of every matrix in the stack.
    G = jax.random.normal(jax.random.key(0), sizes)
    S = rl.sample_sketch({"kernel": G}, spec, key=1)["kernel"]
    F = rl.project({"kernel": G}, {"kernel": S}, spec)["kernel"].value
    D = rl.lift({"kernel": F}, {"kernel": S}, {"kernel": G}, spec)["kernel"]
    assert (S.shape, F.shape, D.shape) == (sketch_shape, factor_shape, sizes)
    order = (*batch, *plan.sketched_axes, *plan.kept_axes)
    count = int(np.prod(plan.batch_shape))
    dense = np.transpose(np.asarray(G), order).reshape(count, plan.dim, -1)
    basis = np.asarray(S).reshape(count, 2, plan.dim)
    lifted = np.transpose(np.asarray(D), order).reshape(count, plan.dim, -1)
    for W, U, delta in zip(dense, basis, lifted, strict=True):
        np.testing.assert_allclose(delta, U.T @ U @ W, rtol=0, atol=1e-5)


def test_the_left_sketch_of_the_paper_is_the_right_side_of_a_kernel():
    """The paper draws B and trains A of a (out, in) weight W0 + (alpha / r) B A.

    A JAX kernel is its transpose (in, out): B then spans the columns of the kernel.
    """
    n_in, n_out, rank, alpha = 7, 5, 2, 6.0
    spec = rl.Spec(rank, alpha=alpha, side="right")
    kernel = {"kernel": jnp.zeros((n_in, n_out))}
    S = rl.sample_sketch(kernel, spec, key=0)
    F = jax.random.normal(jax.random.key(1), (rank, n_in))
    B = np.asarray(S["kernel"], np.float64).T
    A = np.asarray(F, np.float64)
    assert B.shape == (n_out, rank)
    paper = alpha / rank * B @ A
    ours = rl.lift({"kernel": F}, S, kernel, spec)["kernel"]
    np.testing.assert_allclose(ours, paper.T, rtol=0, atol=1e-5)
    # Eq. 3 in the paper: W <- W - gamma H_B grad, with H_B = B (B^T B)^+ B^T, and
    # gamma = learning rate * scaling^2.
    rate, G = 0.1, np.random.default_rng(0).normal(size=(n_in, n_out))
    projector = B @ np.linalg.pinv(B.T @ B) @ B.T
    want = -rate * (alpha / rank) ** 2 * projector @ G.T
    tx = rl.raclora(rate, spec, inner=optax.identity(), key=0)
    grads = {"kernel": jnp.asarray(G, jnp.float32)}
    updates, _ = tx.update(grads, tx.init(kernel), kernel)
    np.testing.assert_allclose(updates["kernel"], want.T, rtol=0, atol=1e-5)
    # The other side is the paper's right sketch: A drawn, B trained.
    left = rl.Spec(rank, side="left")
    assert rl.sample_sketch(kernel, left, key=0)["kernel"].shape == (rank, n_in)


@pytest.mark.parametrize(
    ("sizes", "side", "want"),
    [
        ((9, 5), "smaller", "right"),
        ((5, 9), "smaller", "left"),
        ((7, 7), "smaller", "left"),
        ((48, 3), "auto", "left"),
        ((49, 3), "auto", "right"),
        ((3, 49), "auto", "left"),
        ((9, 5), "left", "left"),
        ((5, 9), "right", "right"),
    ],
)
def test_sides(sizes, side, want):
    """The smaller of both, or the rows up to 16 times the columns, or as told."""
    assert plan_of(rl.Spec(2, side=side), *sizes).side == want
    other = "right" if side != "right" else "left"
    by_rule = rl.Spec(2, side=other, rules=[rl.Rule("kernel", side=side)])
    assert plan_of(by_rule, *sizes).side == want


def test_what_is_no_matrix_is_trained_in_full_or_frozen():
    """Biases and norms; depthwise and grouped convolutions by one rule."""
    rules = [
        rl.Rule(r".*/(depthwise|grouped)/kernel", mode="dense"),
        rl.Rule(r".*/conv/kernel", rows=(0, 1, 2)),
    ]
    params = {
        "block": {
            "depthwise": {"kernel": shape(3, 3, 1, 16)},
            "grouped": {"kernel": shape(3, 3, 4, 16)},
            "conv": {"kernel": shape(3, 3, 8, 16), "bias": shape(16)},
            "norm": {"scale": shape(16)},
        },
        "temperature": shape(),
    }
    for rest in ("dense", "frozen"):
        plans = rl.plan(rl.Spec(2, rules=rules, rest=rest), params)
        assert list(plans) == [
            "block/conv/bias",
            "block/conv/kernel",
            "block/depthwise/kernel",
            "block/grouped/kernel",
            "block/norm/scale",
            "temperature",
        ]
        modes = [plan.mode for plan in plans.values()]
        assert modes == [rest, "lowrank", "dense", "dense", rest, rest]
        assert plans["block/norm/scale"].reason == "not a matrix"


def test_scaling():
    assert plan_of(rl.Spec(4), 9, 7).scaling == 1.0
    assert plan_of(rl.Spec(4, alpha=6), 9, 7).scaling == 1.5
    rule = rl.Rule("kernel", rank=3)
    assert plan_of(rl.Spec(4, rules=[rule]), 9, 7).scaling == 1.0
    assert plan_of(rl.Spec(4, alpha=6, rules=[rule]), 9, 7).scaling == 2.0
    rule = rl.Rule("kernel", alpha=np.float32(12.0))
    assert plan_of(rl.Spec(4, alpha=6, rules=[rule]), 9, 7).scaling == 3.0


def test_the_first_rule_that_matches_the_whole_path_wins():
    params = {
        name: {"kernel": shape(9, 7), "bias": shape(7)} for name in ("body", "head")
    }
    rules = [
        rl.Rule("head/kernel", rank=3, sketch="coordinate"),
        rl.Rule(".*kernel", rank=5, side="left"),
        rl.Rule("(?i:BODY)/bias", mode="frozen"),
    ]
    plans = rl.plan(rl.Spec(2, side="smaller", rules=rules), params)
    found = {p: (x.mode, x.rank, x.side, x.law) for p, x in plans.items()}
    assert found == {
        "body/bias": ("frozen", 0, "", ""),
        "body/kernel": ("lowrank", 5, "left", "orthonormal"),
        "head/bias": ("dense", 0, "", ""),
        "head/kernel": ("lowrank", 3, "right", "coordinate"),
    }
    # "kernel" alone is part of the path, not the whole.
    with pytest.raises(ValueError, match=r"'kernel'.*wins no leaf"):
        rl.plan(rl.Spec(2, rules=[rl.Rule("kernel", mode="frozen")]), params)


def test_a_leaf_too_small_for_the_rank_is_trained_in_full_and_says_why():
    params = {"big": shape(9, 7), "small": shape(9, 4)}
    plans = rl.plan(4, params)
    assert [plans[path].mode for path in params] == ["lowrank", "dense"]
    assert plans["small"].reason == "rank 4 >= sketched side 4"
    # The sketched side decides, not the smaller one.
    plans = rl.plan(rl.Spec(4, side="left"), params)
    assert [plan.mode for plan in plans.values()] == ["lowrank", "lowrank"]


def test_a_one_leaf_tree_and_a_frozen_model():
    assert list(rl.plan(2, shape(9, 7))) == [""]
    spec = rl.Spec(2, rules=[rl.Rule(".*", mode="frozen")])
    plans = rl.plan(spec, {"steps": shape(3, dtype="int32"), "w": shape(9, 7)})
    assert {plan.mode for plan in plans.values()} == {"frozen"}
    assert rl.plan(spec, {}) == {}


def test_a_partial_tree_lets_rules_rest():
    """Under optax.masked and optax.partition the other leaves are MaskedNodes."""
    rules = [rl.Rule("head/.*", mode="dense"), rl.Rule("body/kernel", rank=3)]
    spec = rl.Spec(2, rules=rules)
    body = {"kernel": shape(9, 7)}
    partial = {"body": body, "head": optax.MaskedNode()}
    assert rl.plan(spec, partial)["body/kernel"].rank == 3
    with pytest.raises(ValueError, match=r"'head/\.\*'.*wins no leaf"):
        rl.plan(spec, {"body": body})
    # Sketches are those of the whole tree.
    whole = {"body": {"kernel": jnp.ones((9, 7))}, "head": {"kernel": jnp.ones((8, 6))}}
    half = {"body": whole["body"], "head": optax.MaskedNode()}
    one = rl.sample_sketch(whole, spec, key=0)["body"]["kernel"]
    two = rl.sample_sketch(half, spec, key=0)["body"]["kernel"]
    np.testing.assert_array_equal(one, two)


FULL = rl.Spec(
    8,
    alpha=16.0,
    side="left",
    sketch="gaussian_raw",
    resample_every=7,
    rounding="master",
    cache=False,
    rest="frozen",
    rules=[
        rl.Rule("a/.*", rank=4, alpha=2.0, side="right", sketch="rademacher"),
        rl.Rule(r"b/\d+/(q|k)", rows=(0, -1), batch=1),
        rl.Rule(r"ünïcode\\.", mode="frozen"),
    ],
)


def test_a_spec_is_plain_data():
    same = dataclasses.replace(FULL, rules=list(FULL.rules))
    assert same == FULL
    assert hash(same) == hash(FULL)
    assert len({FULL, same, rl.Spec(8)}) == 2
    for spec in (FULL, rl.Spec(8), rl.Spec(np.int64(8), alpha=np.float32(0.5))):
        back = rl.Spec.from_json(spec.to_json())
        assert back == spec
        assert hash(back) == hash(spec)
        # Nothing in the text is of this library or of Python.
        assert json.loads(spec.to_json())["rank"] == 8
    assert rl.Spec.from_json('{"rank": 8}') == rl.Spec(8)
    assert as_spec(8) == as_spec(np.int32(8)) == as_spec(rl.Spec(8)) == rl.Spec(8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.rank = 4
    assert rl.Rule("x", rows=[1, 0], batch=[2]) == rl.Rule("x", rows=(1, 0), batch=2)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"rules": 1, "rank": 2}'])
def test_json_that_is_no_spec_is_refused(text):
    with pytest.raises((ValueError, TypeError)):
        rl.Spec.from_json(text)


def test_json_of_another_version_is_refused():
    with pytest.raises(TypeError, match="power"):
        rl.Spec.from_json('{"rank": 2, "power": 3}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 4),
        ("side", "right"),
        ("rounding", "nearest"),
        ("rest", "dense"),
        ("rules", ()),
        # It keeps numbers of rows where the others keep arrays.
        ("sketch", "block"),
    ],
)
def test_a_chain_goes_on_with_its_own_spec_only(field, value):
    FULL.check_resumes(FULL)
    FULL.check_resumes(dataclasses.replace(FULL, cache=True))
    law = {"alpha": 3.0, "sketch": "rademacher", "resample_every": 8}
    rules = [dataclasses.replace(r, alpha=2.0, sketch="rademacher") for r in FULL.rules]
    FULL.check_resumes(dataclasses.replace(FULL, **law, rules=rules))
    other = dataclasses.replace(FULL, **{field: value})
    message = f"{field}=.*{field}=.*tx.init"
    with pytest.raises(ValueError, match=message):
        other.check_resumes(FULL)


def test_an_int_is_a_spec():
    W = {"kernel": jnp.ones((9, 7))}
    one, two = rl.raclora(0.1, 3, key=0), rl.raclora(0.1, rl.Spec(3), key=0)
    first, second = (tx.update(W, tx.init(W), W)[0]["kernel"] for tx in (one, two))
    np.testing.assert_array_equal(first, second)
