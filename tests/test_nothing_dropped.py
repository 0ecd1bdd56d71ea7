"""``trace_spec`` loses sight of no leaf in silence."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import fallbacks
from jax import lax

import raclora_jax as rl

pytestmark = pytest.mark.smoke

X = jax.ShapeDtypeStruct((6, 8), "float32")
SQUARE = jax.ShapeDtypeStruct((8, 8), "float32")
IMAGE = jax.ShapeDtypeStruct((2, 7, 7, 4), "float32")
W, V = (jax.ShapeDtypeStruct((8, n), "float32") for n in (10, 4))
ROWS = {"w": ((0,), ()), "v": ((0,), ())}


def traced(fn, params, *args, **fields):
    """What a plan says of every leaf's view; nothing may be warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = rl.trace_spec(fn, params, *args, rank=2, **fields)
    plans = rl.plan(spec, params)
    return {
        path: (plan.rows, plan.batch) if plan.mode == "lowrank" else plan.mode
        for path, plan in plans.items()
    }


def conv(x, w):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions)


def standard(w):
    mean, var = jnp.mean(w, (0, 1, 2)), jnp.var(w, (0, 1, 2))
    return (w - mean) * lax.rsqrt(var + 1e-5)


def gating(w, x):
    """Experts with two branches side by side, as (experts, 2, hidden, features)."""
    merged = w.transpose(0, 3, 1, 2).reshape(w.shape[0], w.shape[3], -1)
    return lax.ragged_dot(x, merged, jnp.array([2, 1, 3]))


MADE = {
    "side by side": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
    "padded": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))) + jnp.sum(x @ p["v"]),
    "maps": lambda p, x: x @ jnp.sin(1 + p["w"]) + jnp.sum(x @ jnp.maximum(p["v"], 0)),
    "masked": lambda p, x: (
        x @ jnp.where(jnp.arange(10) > 3, p["w"], 0) + jnp.sum(x @ jnp.triu(p["v"]))
    ),
    "norms of columns": lambda p, x: (
        x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)) + jnp.sum(x @ p["v"])
    ),
    "one leaf times another": lambda p, x: x @ (p["w"].T @ p["v"] @ p["v"].T).T,
    "cumulative, under jit and remat": lambda p, x: jax.checkpoint(
        jax.jit(lambda w, v: x @ jnp.cumsum(w, 0) + jnp.sum(x @ jnp.flip(v, 1)))
    )(p["w"], p["v"]),
    "in a branch": lambda p, x: lax.cond(
        x[0, 0] > 0,
        lambda: x @ jnp.tanh(p["w"]),
        lambda: jnp.sum(x @ jax.nn.relu(p["v"])) + jnp.zeros((6, 10)),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_matrix_made_of_leaves(name):
    assert traced(lambda p, x: jnp.sum(MADE[name](p, x)), {"w": W, "v": V}, X) == ROWS


def test_a_standardised_kernel():
    params = {"w": jax.ShapeDtypeStruct((3, 3, 4, 6), "float32")}
    views = traced(lambda p, x: conv(x, standard(p["w"])), params, IMAGE)
    assert views == {"w": ((0, 1, 2), ())}


def test_axes_merged_for_a_ragged_product():
    params = {"w": jax.ShapeDtypeStruct((3, 2, 5, 8), "float32")}
    views = traced(lambda p, x: gating(p["w"], x), params, X)
    assert views == {"w": ((3,), (0,))}


def test_a_learned_query():
    def loss(p, x):
        return jax.nn.softmax((p["probe"] @ p["q"]) @ (x @ p["k"]).T) @ x

    params = {"probe": jax.ShapeDtypeStruct((3, 8), "float32"), "q": SQUARE, "k": SQUARE}
    views = traced(loss, params, X)
    assert views == {"probe": ((1,), ()), "q": ((0,), ()), "k": ((0,), ())}


def test_leaves_stacked_for_a_scan():
    def loss(p, x):
        stack = jnp.stack([p["w"], p["v"]])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    assert traced(loss, {"w": SQUARE, "v": SQUARE}, X) == ROWS


def test_linen_lstm():
    model = nn.RNN(nn.OptimizedLSTMCell(5))
    x = jnp.ones((2, 4, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    views = traced(lambda p, x: jnp.sum(model.apply({"params": p}, x)), params, x)
    kernels = [view for path, view in views.items() if path.endswith("kernel")]
    assert kernels == [((0,), ())] * 8
    # And nothing is left out where the rest is frozen.
    frozen = traced(
        lambda p, x: jnp.sum(model.apply({"params": p}, x)), params, x, rest="frozen"
    )
    assert {k: v for k, v in frozen.items() if v != "frozen"} == {
        k: v for k, v in views.items() if k.endswith("kernel")
    }


def test_what_is_no_array_is_named():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 3, 8, 2, key=jax.random.key(0))
    with pytest.raises(TypeError, match="'activation' must be an array"):
        rl.trace_spec(lambda m, x: jnp.sum(jax.vmap(m)(x)), model, X, rank=2)


def test_what_data_enters_is_no_matrix():
    """Scales, positions and prefixes go through the layer behind them as activations."""

    def loss(p, x):
        h = jnp.concatenate([p["prefix"], x * (1 + p["scale"]) + p["position"]])
        return jnp.sum(jnp.tanh(h) @ p["w"])

    shapes = {"prefix": (2, 8), "scale": (1, 8), "position": (6, 8), "w": (8, 10)}
    params = {k: jax.ShapeDtypeStruct(shape, "float32") for k, shape in shapes.items()}
    expected = dict.fromkeys(shapes, "dense") | {"w": ((0,), ())}
    assert traced(loss, params, X) == expected
    # So does what the function closes over, where it takes nothing else.
    x = jnp.ones((6, 8))
    assert traced(lambda p: loss(p, x), params) == expected


# --- Literals beside a leaf -------------------------------------------------------------

ARRAYS = {"w": jnp.ones((8, 10)) / 9}
STACK = {"w": jnp.ones((3, 8, 8)) / 9}


def shifted(h, w):
    return jnp.tanh(h @ (1 + w)), None


LITERALS = {
    "one more": (lambda p, x: jnp.sum(x @ (p["w"] + 1)), ARRAYS, {}),
    "above zero": (lambda p, x: jnp.sum(x @ jnp.maximum(p["w"], 0)), ARRAYS, {}),
    "to a power": (lambda p, x: jnp.sum(x @ (2 - p["w"] ** 1.5)), ARRAYS, {}),
    "one more, under scan": (
        lambda p, x: jnp.sum(lax.scan(shifted, x, p["w"])[0]),
        STACK,
        {"rules": [rl.Rule("w", batch=0)]},
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_a_literal_beside_a_leaf(name):
    """A literal is no input of an operation, in tracing nor in either gradient."""
    loss, params, fields = LITERALS[name]
    x, spec = jnp.ones((6, 8)), rl.Spec(2, **fields)
    assert traced(loss, params, x) == {"w": ((0,), ())} | (
        {"w": ((1,), (0,))} if fields else {}
    )
    dense = jax.grad(loss)(params, x)
    want = rl.project(dense, rl.sample_sketch(params, spec, key=0), spec)
    state = rl.raclora(0.1, spec, key=0).init(params)
    got, _ = fallbacks(rl.grad(loss, spec), params, state, x)
    np.testing.assert_allclose(got["w"].value, want["w"].value, rtol=1e-5)
    factors, chain = rl.init_adapter(params, spec, key=0)
    got, _ = fallbacks(jax.grad(rl.adapted(loss, spec)), factors, params, chain, x)
    np.testing.assert_allclose(got["w"], want["w"].value, rtol=1e-5)


# --- What cannot be read ----------------------------------------------------------------


def scrambled(p, x):
    return jnp.sum(x @ p["w"]) + jnp.sum(x @ p["deep/v"].reshape(8, 6))


SCRAMBLED = {"w": W, "deep/v": jax.ShapeDtypeStruct((6, 8), "float32")}


def test_a_use_that_cannot_be_read_is_said():
    def trace(**fields):
        return rl.trace_spec(scrambled, SCRAMBLED, X, rank=2, **fields)

    spec, messages = fallbacks(trace)
    assert len(messages) == 1
    for piece in ("'deep/v'", "reshape", "Rule('deep/v', rows=(0,))"):
        assert piece in messages[0]
    assert rl.plan(spec, SCRAMBLED)["deep/v"].mode == "dense"
    rules = [rl.Rule("deep/v", rows=(0,))]
    spec, messages = fallbacks(lambda: trace(rules=rules))
    assert messages == []
    assert rl.plan(spec, SCRAMBLED)["deep/v"].mode == "lowrank"


def test_a_matrix_is_not_frozen_unseen():
    with pytest.raises(ValueError, match=r"'deep/v' in reshape.*mode='frozen'"):
        rl.trace_spec(scrambled, SCRAMBLED, X, rank=2, rest="frozen")
    rules = [rl.Rule("deep/v", mode="frozen")]
    rl.trace_spec(scrambled, SCRAMBLED, X, rank=2, rest="frozen", rules=rules)


def test_nothing_left_to_adapt():
    params = {"scale": jax.ShapeDtypeStruct((6, 8), "float32")}
    with pytest.raises(ValueError, match="no leaf is left to adapt"):
        rl.trace_spec(lambda p, x: jnp.sum(p["scale"] * x), params, X, rank=2)
