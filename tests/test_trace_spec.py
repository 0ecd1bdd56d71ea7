"""Views read off a model are those that its author would write down."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import raclora_jax as rl
from raclora_jax.flax import to_tree

pytestmark = pytest.mark.smoke

RANK = 2


def views(spec, params):
    """``{path: (mode, rows, cols, batch)}``: what a plan says of a leaf's view."""
    plans = rl.plan(spec, params)
    return {p: (x.mode, x.rows, x.cols, x.batch) for p, x in plans.items()}


def assert_traced(fn, params, *args, rules=(), **fields):
    """The traced spec plans every leaf as the rules written by hand do."""
    by_hand = rl.Spec(RANK, rules=rules, **fields)
    traced = rl.trace_spec(fn, params, *args, rank=RANK, **fields)
    assert views(traced, params) == views(by_hand, params)
    assert not any(
        plan.assumed_view
        for plan in rl.plan(traced, params).values()
        if plan.mode == "lowrank"
    )
    # Plain data, and the same spec from shapes alone.
    assert rl.Spec.from_json(traced.to_json()) == traced
    shapes = jax.eval_shape(lambda *trees: trees, params, *args)
    assert rl.trace_spec(fn, *shapes, rank=RANK, **fields) == traced
    return traced


def linen(model, *args):
    """A loss of the params of a linen model, and their shapes."""
    params = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    return lambda params, *args: jnp.sum(model.apply({"params": params}, *args)), params


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


TOKENS = jnp.zeros((3, 5), jnp.int32)


# --- By hand ----------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((6, 8), "float32")
BATCHED = jax.ShapeDtypeStruct((2, 5, 3, 4), "float32")
ROUTED = jax.ShapeDtypeStruct((3, 5, 8), "float32")
IMAGE = jax.ShapeDtypeStruct((2, 7, 7, 4), "float32")


def layer(h, w):
    return jnp.tanh(h @ w), None


# name: (loss, shape of the leaf w, argument, fields of the rule by hand)
USES = {
    "x @ w": (lambda p, x: x @ p["w"], (8, 10), X, {"rows": 0}),
    "w @ x": (lambda p, x: p["w"] @ x.T, (10, 8), X, {"rows": 1}),
    "transposed": (lambda p, x: x @ p["w"].T, (10, 8), X, {"rows": 1}),
    "both ways": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (8, 10), X, {"rows": 0}),
    "the other way first": (
        lambda p, x: jnp.tanh(x @ p["w"].T) @ p["w"],
        (10, 8),
        X,
        {"rows": 0},
    ),
    "several axes": (
        lambda p, x: jnp.einsum("bthd,hdke->btke", x, p["w"]),
        (3, 4, 5, 6),
        BATCHED,
        {"rows": (0, 1)},
    ),
    "several axes, permuted": (
        lambda p, x: jnp.einsum("bthd,khed->btke", x, p["w"]),
        (5, 3, 6, 4),
        BATCHED,
        {"rows": (1, 3)},
    ),
    "flattened": (
        lambda p, x: x @ p["w"].reshape(8, 15),
        (8, 3, 5),
        X,
        {"rows": 0},
    ),
    "rows flattened": (
        lambda p, x: x @ p["w"].reshape(8, 5),
        (2, 4, 5),
        X,
        {"rows": (0, 1)},
    ),
    "experts": (
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]),
        (3, 8, 7),
        ROUTED,
        {"batch": 0},
    ),
    "ragged experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1, 3])),
        (3, 8, 7),
        X,
        {"batch": 0},
    ),
    "vmap over the leaf and data": (
        lambda p, x: jax.vmap(lambda w, x: x @ w, in_axes=(1, 0))(p["w"], x),
        (8, 3, 7),
        ROUTED,
        {"batch": 1},
    ),
    "scan over layers": (
        lambda p, x: lax.scan(layer, x, p["w"])[0],
        (3, 8, 8),
        X,
        {"batch": 0},
    ),
    "scan in a scan": (
        lambda p, x: lax.scan(lambda h, w: lax.scan(layer, h, w), x, p["w"])[0],
        (2, 3, 8, 8),
        X,
        {"batch": (0, 1)},
    ),
    "scan over layers under remat": (
        lambda p, x: lax.scan(jax.checkpoint(layer), x, p["w"])[0],
        (3, 8, 8),
        X,
        {"batch": 0},
    ),
    "layers by index": (
        lambda p, x: x @ p["w"][0] + x @ p["w"][2],
        (3, 8, 7),
        X,
        {"batch": 0},
    ),
    "layers by a traced index": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x),
        (3, 8, 8),
        X,
        {"batch": 0},
    ),
    "constant of a scan": (
        lambda p, x: lax.scan(lambda h, _: layer(h, p["w"]), x, None, 3)[0],
        (8, 8),
        X,
        {"rows": 0},
    ),
    "in one branch": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"].T, lambda: x),
        (8, 8),
        X,
        {"rows": 1},
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 3, 4, 6),
        IMAGE,
        {"rows": (0, 1, 2)},
    ),
    "convolution, channels first": (
        lambda p, x: lax.conv(x.transpose(0, 3, 1, 2), p["w"], (1, 1), "SAME"),
        (6, 4, 3, 3),
        IMAGE,
        {"rows": (1, 2, 3)},
    ),
    "convolution in groups": (
        lambda p, x: lax.conv_general_dilated(
            x,
            p["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ),
        (3, 3, 2, 6),
        IMAGE,
        {"mode": "dense"},
    ),
    "embedding": (lambda p, x: p["w"][x], (11, 8), TOKENS, {"rows": 0}),
    "embedding and head": (
        lambda p, x: jnp.tanh(p["w"][x]) @ p["w"].T,
        (11, 8),
        TOKENS,
        {"rows": 0},
    ),
    "embedding, features first": (
        lambda p, x: jnp.take(p["w"], x, axis=1),
        (8, 11),
        TOKENS,
        {"rows": 1},
    ),
    "embedding with two feature axes": (
        lambda p, x: p["w"][x],
        (11, 2, 4),
        TOKENS,
        {"rows": 0},
    ),
    "added": (lambda p, x: x + p["w"], (6, 8), X, {"mode": "dense"}),
    "multiplied": (lambda p, x: x * p["w"], (6, 8), X, {"mode": "dense"}),
    "positions": (lambda p, x: x + p["w"][:6], (9, 8), X, {"mode": "dense"}),
    "norms of layers": (
        lambda p, x: lax.scan(lambda h, g: (jnp.tanh(h * g), None), x, p["w"])[0],
        (3, 8),
        X,
        {"mode": "dense"},
    ),
    "one more than the norms of layers": (
        lambda p, x: lax.scan(lambda h, g: (jnp.tanh(h * (1 + g)), None), x, p["w"])[0],
        (3, 8),
        X,
        {"mode": "dense"},
    ),
    "decayed by the loss": (
        lambda p, x: jnp.sum(x @ p["w"].T) + jnp.sum(p["w"] ** 2),
        (10, 8),
        X,
        {"rows": 1},
    ),
    "weight norm": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
        (8, 10),
        X,
        None,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_uses(name):
    fn, shape, x, fields = USES[name]
    # Another leaf keeps the tree from being all dense.
    params = {
        "w": jax.ShapeDtypeStruct(shape, "float32"),
        "other": jax.ShapeDtypeStruct((12, 9), "float32"),
    }

    def loss(p, x):
        return jnp.sum(fn(p, x)) + jnp.sum(jnp.ones((2, 12)) @ p["other"])

    if fields is None:  # The product is of the leaf no more; what matters is no crash.
        views(rl.trace_spec(loss, params, x, rank=RANK), params)
        return
    rules = [rl.Rule("w", **fields), rl.Rule("other", rows=0)]
    assert_traced(loss, params, x, rules=rules)


def test_the_tree_is_one_leaf():
    W = jax.ShapeDtypeStruct((10, 8), "float32")
    assert_traced(lambda W, x: x @ W.T, W, X, rules=[rl.Rule("", rows=1)])


def test_nothing_runs():
    """Weights that would not fit in memory, and a loss of shapes alone."""
    huge = {"w": jax.ShapeDtypeStruct((10**6, 10**6), "bfloat16")}
    x = jax.ShapeDtypeStruct((10**6, 10**6), "bfloat16")
    spec = rl.trace_spec(lambda p, x: jnp.sum(p["w"] @ x), huge, x, rank=8)
    assert views(spec, huge) == {"w": ("lowrank", (1,), (0,), ())}


# --- Models -----------------------------------------------------------------------------


def test_linen_attention_convolution_and_embedding():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens, image):
            embed = nn.Embed(11, 8, name="embed")
            h = embed(tokens) + nn.Embed(7, 8, name="positions")(jnp.arange(5))
            h = nn.MultiHeadDotProductAttention(2, qkv_features=12, name="attention")(h)
            h = nn.LayerNorm(name="norm")(h)
            pair = nn.DenseGeneral((2, 4), name="split")(h)
            h = nn.DenseGeneral(8, axis=(-2, -1), name="join")(pair)
            stacked = nn.DenseGeneral(5, batch_dims=(0,), name="each")
            h = h + jnp.sum(stacked(h.transpose(1, 0, 2)))
            z = nn.Conv(6, (3, 3), name="conv")(image)
            z = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(z)
            z = nn.ConvTranspose(4, (2, 2), (2, 2), name="up")(z)
            return embed.attend(h).sum() + z.sum()

    model, image = Model(), normal(2, 7, 7, 3)
    loss, params = linen(model, TOKENS, image)
    rules = [
        rl.Rule("attention/(query|key|value)/kernel", rows=0),
        rl.Rule("attention/out/kernel", rows=(0, 1)),
        rl.Rule("attention/.*/bias", mode="dense"),
        rl.Rule("split/kernel", rows=0),
        rl.Rule("split/bias", mode="dense"),
        rl.Rule("join/kernel", rows=(0, 1)),
        rl.Rule("each/kernel", batch=0),
        rl.Rule("each/bias", mode="dense"),
        rl.Rule("(conv|up)/kernel", rows=(0, 1, 2)),
        rl.Rule("depthwise/kernel", mode="dense"),
    ]
    assert_traced(loss, params, TOKENS, image, rules=rules)


def test_linen_head_alone():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            return nn.Embed(11, 8, name="embed").attend(h)

    loss, params = linen(Model(), normal(3, 8))
    rules = [rl.Rule("embed/embedding", rows=1)]
    assert_traced(loss, params, normal(3, 8), rules=rules)


class Block(nn.Module):
    """One layer of a transformer."""

    @nn.compact
    def __call__(self, h, _=None):
        z = nn.LayerNorm(name="norm")(h)
        h = h + nn.MultiHeadDotProductAttention(2, name="attention")(z)
        z = nn.Dense(16, name="up")(nn.RMSNorm(name="second")(h))
        return h + nn.Dense(8, name="down")(nn.gelu(z)), None


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_linen_scan(axis, remat):
    """The layer axis is a stack wherever it stands; norms and biases are no matrices."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            block = nn.remat(Block, prevent_cse=False) if remat else Block
            scanned = nn.scan(
                block,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=3,
            )
            return scanned(name="layers")(h, None)[0]

    loss, params = linen(Model(), normal(2, 5, 8))
    first = 1 - axis  # of the first two axes, the one that is not the layers'
    rules = [
        rl.Rule(".*/(query|key|value)/kernel", batch=axis, rows=first),
        rl.Rule(".*/attention/out/kernel", batch=axis, rows=(first, 2)),
        rl.Rule(".*/(up|down)/kernel", batch=axis),
        rl.Rule(".*/(scale|bias)", mode="dense"),
    ]
    traced = assert_traced(loss, params, normal(2, 5, 8), rules=rules)
    norm = rl.plan(traced, params)["layers/norm/scale"]
    assert (norm.shape, norm.mode) == ((8, 3) if axis else (3, 8), "dense")


def test_linen_unscanned_and_vmapped():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, h):
            for index in range(2):
                h, _ = Block(name=f"block_{index}")(h)
            heads = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return heads(4, name="heads")(jnp.stack([h, jnp.sin(h), jnp.cos(h)]))

    loss, params = linen(Model(), normal(2, 5, 8))
    rules = [
        rl.Rule(".*/(query|key|value)/kernel", rows=0),
        rl.Rule(".*/attention/out/kernel", rows=(0, 1)),
        rl.Rule(".*/attention/.*/bias", mode="dense"),
        rl.Rule("heads/kernel", batch=0),
        rl.Rule("heads/bias", mode="dense"),
    ]
    assert_traced(loss, params, normal(2, 5, 8), rules=rules)


def test_nnx_rebuilt_inside_the_loss():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
            self.head = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, tokens):
            h = self.norm(self.attention(self.embed(tokens)))
            return self.head(self.conv(h))

    params, restore = to_tree(Model(nnx.Rngs(0)))
    rules = [
        rl.Rule("attention/(query|key|value)/kernel", rows=0),
        rl.Rule("attention/out/kernel", rows=(0, 1)),
        rl.Rule("attention/.*/bias", mode="dense"),
        rl.Rule("conv/kernel", rows=(0, 1)),
    ]
    assert_traced(lambda p, t: jnp.sum(restore(p)(t)), params, TOKENS, rules=rules)


def test_nnx_scan_over_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    params, restore = to_tree(make(jax.random.split(jax.random.key(0), 3)))

    def loss(params, x):
        layers = nnx.scan(
            lambda h, layer: jnp.tanh(layer(h)),
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
        )
        return jnp.sum(layers(x, restore(params)))

    rules = [rl.Rule("kernel", batch=0), rl.Rule("bias", mode="dense")]
    assert_traced(loss, params, normal(2, 8), rules=rules)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 5, 7, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params, x):
        return jnp.sum(jax.vmap(eqx.combine(params, static))(x))

    # Equinox stores (out, in).
    rules = [rl.Rule("layers/.*/weight", rows=1)]
    by_hand = rl.Spec(RANK, rules=rules)
    traced = rl.trace_spec(loss, params, normal(3, 8), rank=RANK)
    assert views(traced, params) == views(by_hand, params)
    assert len(views(traced, params)) == 6


def test_a_plain_function_of_nested_dicts():
    """As Haiku keeps its parameters, two levels deep."""
    sizes = {"mlp/~/linear_0": (8, 12), "mlp/~/linear_1": (12, 5)}
    params = {
        name: {"w": jnp.ones(shape), "b": jnp.zeros(shape[1:])}
        for name, shape in sizes.items()
    }

    def apply(params, x):
        for module in params.values():
            x = jnp.tanh(x @ module["w"] + module["b"])
        return x

    rules = [rl.Rule(".*/w", rows=0)]
    assert_traced(apply, params, normal(3, 8), rules=rules)


# --- What the user may add, and what is refused -----------------------------------------

PARAMS = {
    "query": jax.ShapeDtypeStruct((8, 3, 4), "float32"),
    "norms": jax.ShapeDtypeStruct((2, 8), "float32"),
    "bias": jax.ShapeDtypeStruct((4,), "float32"),
}


def use(params, x):
    h = x * params["norms"][0] * params["norms"][1]
    return jnp.einsum("bd,dhk->bhk", h, params["query"]) + params["bias"]


def test_the_rest_is_the_users_to_choose():
    """What is no matrix joins the rest, whichever that is."""
    for rest in ("dense", "frozen"):
        spec = rl.trace_spec(use, PARAMS, X, rank=RANK, rest=rest)
        plans = rl.plan(spec, PARAMS)
        assert {p: plan.mode for p, plan in plans.items()} == {
            "query": "lowrank",
            "norms": rest,
            "bias": rest,
        }


def test_fields_and_rules_of_the_user_stay():
    rules = [
        rl.Rule("que.*", rank=3, side="left", sketch="coordinate"),
        rl.Rule("bias", mode="frozen"),
    ]
    fields = {"alpha": 4.0, "resample_every": 7, "cache": False}
    spec = rl.trace_spec(use, PARAMS, X, rank=RANK, rules=rules, **fields)
    assert spec.rank == RANK
    assert {name: getattr(spec, name) for name in fields} == fields
    plans = rl.plan(spec, PARAMS)
    query = plans["query"]
    assert (query.rows, query.cols, query.rank, query.side) == ((0,), (1, 2), 3, "left")
    assert query.law == "coordinate"
    assert plans["bias"].mode == "frozen"
    # A view that a rule names is the user's, whatever the model does.
    rules = [rl.Rule("query", rows=(0, 1))]
    spec = rl.trace_spec(use, PARAMS, X, rank=RANK, rules=rules)
    assert rl.plan(spec, PARAMS)["query"].rows == (0, 1)
    with pytest.raises(ValueError, match=r"'tail'.*wins no leaf"):
        rl.trace_spec(use, PARAMS, X, rank=RANK, rules=[rl.Rule("tail", rank=3)])


def test_a_table_that_is_looked_up_takes_its_smaller_side():
    """By use and not by shape; what the user says of a side stays."""
    params = {name: jax.ShapeDtypeStruct((80, 16), "float32") for name in ("up", "table")}
    ids = jax.ShapeDtypeStruct((5,), "int32")

    def fn(params, ids):
        return jnp.sum(params["table"][ids]) + jnp.sum(jnp.ones((3, 80)) @ params["up"])

    def sides(**fields):
        spec = rl.trace_spec(fn, params, ids, rank=RANK, **fields)
        return {path: plan.side for path, plan in rl.plan(spec, params).items()}

    assert sides() == {"table": "right", "up": "left"}
    assert sides(side="left") == {"table": "left", "up": "left"}
    said = [rl.Rule("table", side="left"), rl.Rule("up", side="auto")]
    assert sides(rules=said, side="right") == {"table": "left", "up": "left"}


def test_a_leaf_that_is_never_used():
    params = PARAMS | {"spare": jax.ShapeDtypeStruct((5, 6), "float32")}
    with pytest.raises(ValueError, match="'spare'"):
        rl.trace_spec(use, params, X, rank=RANK)
    frozen = [rl.Rule("spare", mode="frozen")]
    spec = rl.trace_spec(use, params, X, rank=RANK, rules=frozen)
    assert rl.plan(spec, params)["spare"].mode == "frozen"


def test_integers_must_be_frozen():
    params = PARAMS | {"steps": jax.ShapeDtypeStruct((), "int32")}

    def loss(params, x):
        return use(params, x) * params["steps"]

    with pytest.raises(ValueError, match=r"'steps'.*int32"):
        rl.trace_spec(loss, params, X, rank=RANK)
    frozen = [rl.Rule("steps", mode="frozen")]
    rl.trace_spec(loss, params, X, rank=RANK, rules=frozen)


def test_a_rank_that_does_not_fit():
    with pytest.raises(ValueError, match="rank 12"):
        rl.trace_spec(use, PARAMS, X, rank=12)
    with pytest.raises(TypeError, match="rank"):
        rl.trace_spec(use, PARAMS, X)


def test_the_traced_spec_trains():
    """What is traced is what value_and_grad wants: one call and no fallback."""
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), PARAMS)
    spec = rl.trace_spec(use, params, X, rank=RANK)
    state = rl.raclora(0.1, spec, key=0).init(params)
    loss = functools.partial(lambda p, x: jnp.sum(jnp.sin(use(p, x))))
    _, grads = rl.value_and_grad(loss, spec)(params, state, normal(6, 8))
    assert isinstance(grads["query"], rl.Factor)
    assert grads["norms"].shape == (2, 8)
    assert dataclasses.replace(spec) == spec


def test_a_drawn_side_for_every_leaf_leaves_norms_alone():
    params = {"w": jnp.ones((3, 8, 8)), "scale": jnp.ones((3, 8))}

    def loss(params, x):
        def layer(h, p):
            return jnp.tanh(h @ p["w"]) * p["scale"], None

        return jnp.sum(jax.lax.scan(layer, x, params)[0])

    rules = [rl.Rule(".*", side=0.5)]
    spec = rl.trace_spec(loss, params, normal(2, 8), rank=2, rules=rules)
    modes = {row.path: row.mode for row in rl.summary(params, spec).rows}
    assert modes == {"w": "lowrank", "scale": "dense"}
