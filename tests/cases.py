"""The ways a loss can use its weights, one named case each.

A case says what the loss is, how its leaves are read as matrices, and which of them the
gradient in factor coordinates may hand back to dense-then-project, and for which
primitive. Every leaf called ``w``, ``v`` or ``e`` is adapted; sizes leave room for a rank
of 3 on either side.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl

ADAPTED = ("w", "v", "e")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The shape of a leaf, and its dtype where it is not that of the run."""

    shape: tuple[int, ...]
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss.

    ``views`` holds the ``rows`` and ``batch`` of each leaf that needs them. ``falls``
    names the leaves that must fall back, with a regular expression for the primitive;
    those in ``may`` are free to. The rest must not.
    """

    name: str
    loss: Callable[..., Any]
    params: dict[str, Leaf]
    args: tuple[Any, ...] = ()
    views: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    falls: dict[str, str] = dataclasses.field(default_factory=dict)
    may: tuple[str, ...] = ()
    has_aux: bool = False
    tolerance: float = 0.0

    def spec(self, rank: int, side: str, sketch: str = "gaussian_raw") -> rl.Spec:
        """The spec of a run: alpha makes the scaling count, and S S^T is no projector."""
        rules = [rl.Rule(path, **view) for path, view in self.views.items()]
        settings = {"sketch": sketch, "resample_every": 7}
        return rl.Spec(rank, alpha=2.0, side=side, rules=rules, **settings)

    def inputs(self) -> tuple[dict[str, jax.Array], tuple[Any, ...]]:
        """Weights and arguments, in the widest dtype that is enabled."""
        params = {}
        for path, leaf in self.params.items():
            value = normal(zlib.crc32(f"{self.name}/{path}".encode()), *leaf.shape)
            params[path] = jnp.asarray(0.4 * value, leaf.dtype)
        return params, jax.tree.map(jnp.asarray, self.args)


CASES: dict[str, Case] = {}


def add(name: str, params: dict[str, Any], loss: Callable, *args: Any, **more: Any):
    """Puts a case on the table; a leaf may be a bare shape."""
    assert name not in CASES, name
    leaves = {p: x if isinstance(x, Leaf) else Leaf(x) for p, x in params.items()}
    CASES[name] = Case(name, loss, leaves, args, **more)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def total(y: jax.Array) -> jax.Array:
    """A scalar that no entry of ``y`` enters linearly."""
    return jnp.sum(jnp.sin(y))


def block(h, w):
    """One layer, as the body of a scan."""
    return jnp.tanh(h @ w), None


# Rows of data, and weights: 8 in, 10 out.
X = normal(1, 6, 8)
W, SQUARE, STACK = (8, 10), (8, 8), (3, 8, 8)
TOKENS = np.array([[0, 3, 3, 10, 7], [1, 0, 2, 9, 3], [4, 4, 4, 5, 6], [8, 1, 1, 2, 0]])
TOKENS = TOKENS.astype(np.int32)
TABLE = (11, 8)
LAYERS = {"w": {"batch": 0}}

# --- Contractions -----------------------------------------------------------------------

add(
    "dot, two layers",
    {"w": W, "v": (10, 8)},
    lambda p, x: total(jnp.tanh(x @ p["w"]) @ p["v"]),
    X,
)
add("dot, leaf on the left", {"w": (10, 8)}, lambda p, x: total(p["w"] @ x.T), X)
add(
    "dot, leaf on the left, rows last",
    {"w": (10, 8)},
    lambda p, x: total(p["w"] @ x.T),
    X,
    views={"w": {"rows": 1}},
)
add("dot, transposed", {"w": (10, 8)}, lambda p, x: total(x @ p["w"].T), X)
add("dot with a vector", {"w": W}, lambda p, x: total(x[0] @ p["w"]), X)
add(
    "dot, one tree of one use each side",
    {"w": SQUARE},
    lambda p, x: total(p["w"] @ jnp.tanh(x @ p["w"]).T),
    X,
)
add(
    "dot, one leaf three times",
    {"w": SQUARE},
    lambda p, x: total(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) + x @ p["w"].T),
    X,
)
add(
    "dot, precision and accumulation named",
    {"w": W},
    lambda p, x: total(
        lax.dot_general(
            p["w"],
            x,
            (((0,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=x.dtype,
        )
    ),
    X,
)
add(
    "bilinear form",
    {"w": W},
    lambda p, x, y: total(jnp.einsum("bi,ij,bj->b", x, p["w"], y)),
    X,
    normal(2, 6, 10),
)
add(
    "dot over every axis",
    {"w": W},
    lambda p, m: jnp.sin(jnp.einsum("ij,ij->", p["w"], m)),
    normal(2, 8, 10),
)
add(
    "dot over no axis",
    {"w": W},
    lambda p, x: total(jnp.einsum("b,ij->bij", x[:, 0], p["w"])),
    X,
)
add(
    "dot, a row axis as batch",
    {"w": W},
    lambda p, x: total(jnp.einsum("bd,dk->bdk", x, p["w"])),
    X,
)
HEADS = normal(5, 2, 3, 2, 3)
add(
    "several contracted and free axes",
    {"w": (2, 3, 4, 5)},
    lambda p, x: total(jnp.einsum("bthd,hdke->btke", x, p["w"])),
    HEADS,
    views={"w": {"rows": (0, 1)}},
)
add(
    "several axes, permuted",
    {"w": (4, 2, 5, 3)},
    lambda p, x: total(jnp.einsum("bthd,khed->btke", x, p["w"])),
    HEADS,
    views={"w": {"rows": (1, 3)}},
)
for rows in ((0, 3), (2, 3), (0,)):
    add(
        f"view unlike the contraction, rows {rows}",
        {"w": (4, 4, 4, 5)},
        lambda p, x: total(jnp.einsum("bthd,hdke->btke", x, p["w"])),
        normal(6, 2, 3, 4, 4),
        views={"w": {"rows": rows}},
    )
add(
    "view unlike the contraction, a batch axis contracted",
    {"w": (3, 8, 7)},
    lambda p, x: total(jnp.einsum("thd,hdf->tf", x, p["w"])),
    normal(7, 5, 3, 8),
    views=LAYERS,
)
add(
    "view unlike the contraction, a batch axis free",
    {"w": (3, 8, 7)},
    lambda p, x: total(jnp.einsum("td,hdf->thf", x, p["w"])),
    normal(7, 5, 8),
    views=LAYERS,
)
add(
    "experts, etd,edf->etf",
    {"w": (3, 8, 7)},
    lambda p, x: total(jnp.einsum("etd,edf->etf", x, p["w"])),
    normal(7, 3, 5, 8),
    views=LAYERS,
)
add(
    "experts, gecd,edf->gecf",
    {"w": (3, 8, 7)},
    lambda p, x: total(jnp.einsum("gecd,edf->gecf", x, p["w"])),
    normal(7, 2, 3, 5, 8),
    views=LAYERS,
)
add(
    "experts, btd,edf->btef",
    {"w": (3, 8, 7)},
    lambda p, x: total(jnp.einsum("btd,edf->btef", x, p["w"])),
    normal(7, 2, 5, 8),
    views=LAYERS,
)
add(
    "experts, batch axis last",
    {"w": (8, 7, 3)},
    lambda p, x: total(jnp.einsum("etd,dfe->fet", x, p["w"])),
    normal(7, 3, 5, 8),
    views={"w": {"batch": 2}},
)


def routed(p, x):
    """Two of three experts by their gate, all three computed."""
    gates = jax.nn.softmax(x @ p["gate"])
    best, chosen = lax.top_k(gates, 2)
    share = jnp.einsum("tk,tke->te", best, jax.nn.one_hot(chosen, 3, dtype=x.dtype))
    hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", x, p["w"]))
    return total(jnp.einsum("tef,efd,te->td", hidden, p["v"], share))


add(
    "experts with a gate",
    {"w": (3, 8, 7), "v": (3, 7, 8), "gate": (8, 3)},
    routed,
    X,
    views={"w": {"batch": 0}, "v": {"batch": 0}, "gate": {"mode": "dense"}},
)
add(
    "ragged_dot",
    {"w": (3, 8, 7)},
    lambda p, x, sizes: total(lax.ragged_dot(x, p["w"], sizes)),
    normal(7, 9, 8),
    np.array([2, 4, 3], np.int32),
    views=LAYERS,
)
add(
    "ragged_dot, an empty group and rows left over",
    {"w": (3, 8, 7)},
    lambda p, x, sizes: total(jnp.tanh(lax.ragged_dot(x, p["w"], sizes))),
    normal(7, 9, 8),
    np.array([5, 0, 2], np.int32),
    views=LAYERS,
)
add(
    "leaf times leaf",
    {"w": W, "v": (10, 8)},
    lambda p: total(p["v"] @ p["w"]),
)
add(
    "leaf times leaf times data",
    {"w": W, "v": (10, 8)},
    lambda p, x: total(x @ (p["w"] @ p["v"])),
    X,
)
add(
    "leaf times leaf, scaled, in a stack",
    {"w": (3, 8, 7), "v": (3, 7, 8), "s": Leaf(())},
    lambda p, x: (
        total(
            jnp.einsum(
                "ehd,edf->ehf", p["v"].swapaxes(1, 2) * p["s"], 0.5 * p["v"] @ p["w"]
            )
        )
        + p["s"]
    ),
    X,
    views={"w": {"batch": 0}, "v": {"batch": 0}},
    may=("w", "v"),
)
add(
    "ragged_dot, axes merged",
    {"w": (3, 2, 5, 8)},
    lambda p, x, sizes: total(
        lax.ragged_dot(x, p["w"].transpose(0, 3, 1, 2).reshape(3, 8, 10), sizes)
    ),
    normal(7, 9, 8),
    np.array([2, 4, 3], np.int32),
    views={"w": {"batch": 0, "rows": 3}},
)
add(
    "leaf times its transpose",
    {"w": W},
    lambda p, x: total(x @ (p["w"] @ p["w"].T)),
    X,
)
add("NumPy constants", {"w": W}, lambda p: total(np.ones((3, 8)) @ p["w"]))

# --- Shapes and scalars -----------------------------------------------------------------

add(
    "reshape, columns merged",
    {"w": (8, 3, 4)},
    lambda p, x: total(x @ p["w"].reshape(8, 12)),
    X,
    views={"w": {"rows": 0}},
)
add(
    "reshape, rows merged",
    {"w": (2, 4, 5)},
    lambda p, x: total(x @ p["w"].reshape(8, 5)),
    X,
    views={"w": {"rows": (0, 1)}},
)
add(
    "reshape, columns split",
    {"w": (8, 12)},
    lambda p, x: total(jnp.einsum("bd,dhk->hbk", x, p["w"].reshape(8, 3, 4))),
    X,
)
add(
    "reshape, rows split",
    {"w": (8, 12)},
    lambda p, x: total(
        jnp.einsum("bhk,hkd->bd", x.reshape(6, 2, 4), p["w"].reshape(2, 4, 12))
    ),
    X,
)
add(
    "reshape after a transpose",
    {"w": (3, 8, 4)},
    lambda p, x: total(x @ p["w"].transpose(1, 0, 2).reshape(8, 12)),
    X,
    views={"w": {"rows": 1}},
)
add(
    "reshape across rows and columns",
    {"w": W},
    lambda p, x: total(x[:, :4] @ p["w"].reshape(4, 20)),
    X,
)
add(
    "reshape that flattens",
    {"w": W},
    lambda p, x: jnp.sin(jnp.dot(p["w"].ravel(), x.ravel())),
    normal(2, 8, 10),
)
add(
    "reshape across layers and rows",
    {"w": (2, 4, 7)},
    lambda p, x: total(x @ p["w"].reshape(8, 7)),
    X,
    views=LAYERS,
)
add(
    "transpose of many axes",
    {"w": (4, 2, 5, 3)},
    lambda p, x: total(jnp.einsum("bthd,hdke->btke", x, p["w"].transpose(1, 3, 0, 2))),
    HEADS,
    views={"w": {"rows": (1, 3)}},
)
add(
    "squeeze",
    {"w": (8, 1, 10)},
    lambda p, x: total(x @ jnp.squeeze(p["w"], 1)),
    X,
    views={"w": {"rows": 0}},
)
add(
    "expand",
    {"w": W},
    lambda p, x: total(jnp.einsum("bd,dok->bok", x, jnp.expand_dims(p["w"], 1))),
    X,
)
add(
    "broadcast",
    {"w": W},
    lambda p, x: total(
        jnp.einsum("btd,bdn->btn", x, jnp.broadcast_to(p["w"][None], (2, *W)))
    ),
    normal(7, 2, 5, 8),
)
add("slice of columns", {"w": W}, lambda p, x: total(x @ p["w"][:, 2:7]), X)
add("slice of rows", {"w": W}, lambda p, x: total(x[:, 2:7] @ p["w"][2:7]), X)
add("slice with a stride", {"w": W}, lambda p, x: total(x[:, ::2] @ p["w"][::2, 1::3]), X)
add(
    "slices that overlap",
    {"w": W},
    lambda p, x: total((x @ p["w"][:, :6]) * (x @ p["w"][:, 4:])),
    X,
)
add("one column", {"w": W}, lambda p, x: total(x @ p["w"][:, 3]), X)
add("one row", {"w": W}, lambda p, x: total(x @ p["w"] + p["w"][2]), X, may=("w",))
add(
    "split into query, key and value",
    {"w": (8, 15)},
    lambda p, x: total(
        functools.reduce(jnp.multiply, [x @ k for k in jnp.split(p["w"], 3, axis=1)])
    ),
    X,
)
add(
    "dynamic slice of columns",
    {"w": W},
    lambda p, x, start: total(x @ lax.dynamic_slice(p["w"], (0 * start, start), (8, 4))),
    X,
    np.int32(5),
)
add(
    "dynamic slice of rows, clamped",
    {"w": W},
    lambda p, x, start: total(
        x[:, :4] @ lax.dynamic_slice_in_dim(p["w"], start, 4, axis=0)
    ),
    X,
    np.int32(7),
)
add(
    "layers by a static index",
    {"w": (3, 8, 7)},
    lambda p, x: total(x @ p["w"][1] + x @ p["w"][-1]),
    X,
    views=LAYERS,
)
add(
    "layers unpacked",
    {"w": STACK},
    lambda p, x: total(functools.reduce(lambda h, w: jnp.tanh(h @ w), p["w"], x)),
    X,
    views=LAYERS,
)
add(
    "layers by two indices",
    {"w": (2, 3, 8, 7)},
    lambda p, x: total(x @ p["w"][1, 2] + x @ p["w"][0][1]),
    X,
    views={"w": {"batch": (0, 1)}},
)
add(
    "layers by a traced index in a scan",
    {"w": STACK},
    lambda p, x: total(
        lax.scan(lambda h, i: (jnp.tanh(h @ p["w"][i]), None), x, jnp.arange(3))[0]
    ),
    X,
    views=LAYERS,
)
add(
    "layers by dynamic_index_in_dim",
    {"w": (8, 3, 7)},
    lambda p, x, i: total(x @ lax.dynamic_index_in_dim(p["w"], i, 1, keepdims=False)),
    X,
    np.int32(1),
    views={"w": {"batch": 1}},
)
add(
    "some layers",
    {"w": STACK},
    lambda p, x: total(lax.scan(block, x, p["w"][1:])[0]),
    X,
    views=LAYERS,
)
add(
    "convert down and up",
    {"w": W},
    lambda p, x: total(x.astype(jnp.float32) @ p["w"].astype(jnp.float32)).astype(
        x.dtype
    ),
    X,
    tolerance=1e-6,
)
add(
    "convert, weights narrower than the run",
    {"w": Leaf(W, "float32")},
    lambda p, x: total(x @ p["w"].astype(x.dtype)),
    X,
    tolerance=1e-6,
)
add(
    "weights in bfloat16, computed wider",
    {"w": Leaf(W, "bfloat16")},
    lambda p, x: total(x.astype(jnp.float32) @ p["w"].astype(jnp.float32)),
    X,
    tolerance=2e-2,
)
add(
    "weights and computation in bfloat16",
    {"w": Leaf(W, "bfloat16")},
    lambda p, x: total((x.astype(jnp.bfloat16) @ p["w"]).astype(jnp.float32)),
    X,
    tolerance=2e-2,
)
add("negate", {"w": W}, lambda p, x: total(x @ -p["w"]), X)
add("scale by constants", {"w": W}, lambda p, x: total(x @ (-(0.3 * p["w"]) / 2.0)), X)
add(
    "scale by a trained scalar",
    {"w": W, "scale": ()},
    lambda p, x: total(x @ (p["scale"] * p["w"])),
    X,
)
add(
    "divide by a trained scalar",
    {"w": W, "scale": ()},
    lambda p, x: total(x @ (p["w"] / (2 + p["scale"]))),
    X,
)
add(
    "scale by a trained scalar of shape (1, 1)",
    {"w": W, "scale": (1, 1)},
    lambda p, x: total(x @ (p["w"] * p["scale"])),
    X,
    views={"scale": {"mode": "dense"}},
)
add(
    "scale by a scalar of the activations",
    {"w": W, "v": SQUARE},
    lambda p, x: total(x @ (p["w"] * jnp.mean(jnp.tanh(x @ p["v"])))),
    X,
)
add(
    "scale by a trained scalar, in a scan",
    {"w": STACK, "scale": (3,)},
    lambda p, x: total(
        lax.scan(
            lambda h, z: (jnp.tanh(h @ (z[0] * z[1])), None), x, (p["w"], p["scale"])
        )[0]
    ),
    X,
    views=LAYERS,
)
add(
    "scale the embedding",
    {"e": TABLE, "scale": ()},
    lambda p, t: total((p["e"] * jnp.sqrt(8.0) * p["scale"])[t]),
    TOKENS,
)
add(
    "scale by one of its own entries",
    {"w": W},
    lambda p, x: total(x @ (p["w"] * p["w"][0, 0])),
    X,
    may=("w",),
)
add(
    "scale every column",
    {"w": W, "scale": (10,)},
    lambda p, x: total(x @ (p["w"] * p["scale"])),
    X,
    may=("w",),
)
add(
    "named and constrained",
    {"w": W},
    lambda p, x: total(x @ checkpoint_name(lax.optimization_barrier(p["w"]), "kernel")),
    X,
)
add(
    "copied",
    {"w": W},
    lambda p, x: total(x @ jnp.array(p["w"], copy=True)),
    X,
)


def constrained(p, x):
    sharding = NamedSharding(mesh(), PartitionSpec("d", "t"))
    return total(x @ lax.with_sharding_constraint(p["w"], sharding))


add("with a sharding constraint", {"w": W}, constrained, X)

# --- Embeddings -------------------------------------------------------------------------

add("embedding by take", {"e": TABLE}, lambda p, t: total(jnp.take(p["e"], t, 0)), TOKENS)
add("embedding by index", {"e": TABLE}, lambda p, t: total(p["e"][t]), TOKENS)
add(
    "embedding by negative index",
    {"e": TABLE},
    lambda p, t: total(p["e"][t]),
    TOKENS - 11,
)
add(
    "embedding by one-hot",
    {"e": TABLE},
    lambda p, t: total(jax.nn.one_hot(t, 11, dtype=p["e"].dtype) @ p["e"]),
    TOKENS,
)
add(
    "embedding filled where out of range",
    {"e": TABLE},
    lambda p, t: total(jnp.take(p["e"], t, axis=0, mode="fill", fill_value=0.5)),
    TOKENS + 4,
)
add(
    "embedding clipped where out of range",
    {"e": TABLE},
    lambda p, t: total(jnp.take(p["e"], t, axis=0, mode="clip")),
    TOKENS + 4,
)
add(
    "embedding with a promise",
    {"e": TABLE},
    lambda p, t: total(p["e"].at[t].get(mode="promise_in_bounds")),
    TOKENS,
)
add(
    "embedding of one token",
    {"e": TABLE},
    lambda p, t: total(jnp.tanh(p["e"][t[0, 1]] * p["e"][4])),
    TOKENS,
    may=("e",),
)
add(
    "embedding transposed before the lookup",
    {"e": (8, 11)},
    lambda p, t: total(p["e"].T[t]),
    TOKENS,
    views={"e": {"rows": 1}},
)
add(
    "embedding along its last axis",
    {"e": (8, 11)},
    lambda p, t: total(jnp.take(p["e"], t, axis=1)),
    TOKENS,
)
add(
    "embedding with two feature axes",
    {"e": (11, 2, 4)},
    lambda p, t: total(p["e"][t]),
    TOKENS,
    views={"e": {"rows": 0}},
)
add(
    "embedding in scanned chunks",
    {"e": TABLE},
    lambda p, t: lax.scan(lambda s, row: (s + total(p["e"][row]), None), 0.0, t)[0],
    TOKENS,
)
add(
    "embedding under vmap of the tokens",
    {"e": TABLE},
    lambda p, t: total(jax.vmap(jax.vmap(lambda i: p["e"][i]))(t)),
    TOKENS,
)
add(
    "embedding under vmap of the table",
    {"e": (4, 11, 8)},
    lambda p, t: total(jax.vmap(lambda e, t: e[t])(p["e"], t)),
    TOKENS,
    views={"e": {"batch": 0}},
    may=("e",),
)
add(
    "embedding, cells picked one by one",
    {"e": TABLE},
    lambda p, t: total(p["e"][t, t % 8]),
    TOKENS,
    may=("e",),
)
add(
    "embedding tied to the head",
    {"e": TABLE},
    lambda p, t: total(jnp.tanh(p["e"][t]) @ p["e"].T),
    TOKENS,
)
add(
    "embedding looked up and squared",
    {"e": TABLE},
    lambda p, t: total(p["e"][t]) + total(p["e"] * p["e"]),
    TOKENS,
    falls={"e": "mul|square|integer_pow"},
)

# --- Convolutions -----------------------------------------------------------------------

IMAGE, KERNEL, NHWC = normal(11, 2, 7, 7, 4), (3, 3, 4, 6), ("NHWC", "HWIO", "NHWC")
CONV = {"w": {"rows": (0, 1, 2)}}


def convolve(strides=(1, 1), padding="SAME", layout=NHWC, **fields):
    def loss(p, x):
        y = lax.conv_general_dilated(
            x, p["w"], strides, padding, dimension_numbers=layout, **fields
        )
        return total(y)

    return loss


add("convolution", {"w": KERNEL}, convolve(), IMAGE, views=CONV)
add(
    "convolution, strided and dilated",
    {"w": KERNEL},
    convolve((2, 2), "VALID", rhs_dilation=(2, 1)),
    IMAGE,
    views=CONV,
)
add(
    "convolution, padded by hand",
    {"w": KERNEL},
    convolve((2, 1), ((3, 0), (1, 2))),
    IMAGE,
    views=CONV,
)
add(
    "convolution, negative padding",
    {"w": KERNEL},
    convolve((1, 1), ((-1, 2), (0, -1))),
    IMAGE,
    views=CONV,
)
add(
    "convolution, dilated input",
    {"w": KERNEL},
    convolve((1, 1), ((1, 0), (2, 1)), lhs_dilation=(2, 1)),
    IMAGE,
    views=CONV,
)
add(
    "convolution, channels first",
    {"w": (6, 4, 3, 3)},
    convolve((2, 1), "SAME", ("NCHW", "OIHW", "NCHW")),
    np.moveaxis(IMAGE, -1, 1),
    views={"w": {"rows": (1, 2, 3)}},
)
add(
    "convolution, one by one",
    {"w": (1, 1, 4, 6)},
    convolve((2, 2)),
    IMAGE,
    views=CONV,
)
add(
    "convolution in one dimension",
    {"w": (3, 4, 6)},
    convolve((1,), "SAME", ("NWC", "WIO", "NWC")),
    normal(11, 2, 7, 4),
    views={"w": {"rows": (0, 1)}},
)
add(
    "convolution, view unlike it",
    {"w": KERNEL},
    convolve(),
    IMAGE,
    views={"w": {"rows": (0, 1)}},
    may=("w",),
)
add(
    "convolution, batch axis in the view",
    {"w": KERNEL},
    convolve(),
    IMAGE,
    views={"w": {"batch": (0, 1), "rows": 2}},
    may=("w",),
)
add(
    "convolution, grouped",
    {"w": (3, 3, 2, 6)},
    convolve(feature_group_count=2),
    IMAGE,
    views=CONV,
    falls={"w": "conv_general_dilated"},
)
add(
    "convolution, batch in groups",
    {"w": KERNEL},
    convolve(batch_group_count=2),
    IMAGE,
    views=CONV,
    may=("w",),
)
add(
    "convolution transposed",
    {"w": KERNEL},
    lambda p, x: total(lax.conv_transpose(x, p["w"], (2, 2), "SAME")),
    IMAGE,
    views=CONV,
)
add(
    "convolution transposed, kernel flipped",
    {"w": (3, 3, 6, 4)},
    lambda p, x: total(
        lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=True)
    ),
    IMAGE,
    views={"w": {"rows": (0, 1, 3)}},
    may=("w",),
)
add(
    "convolution under vmap",
    {"w": KERNEL},
    lambda p, x: total(
        jax.vmap(
            lambda x: lax.conv_general_dilated(
                x[None], p["w"], (1, 1), "SAME", dimension_numbers=NHWC
            )
        )(x)
    ),
    IMAGE,
    views=CONV,
)
add(
    "convolution, kernel under vmap",
    {"w": (2, *KERNEL)},
    lambda p, x: total(
        jax.vmap(
            lambda x, w: lax.conv_general_dilated(
                x[None], w, (1, 1), "SAME", dimension_numbers=NHWC
            )
        )(x, p["w"])
    ),
    IMAGE,
    views={"w": {"batch": 0, "rows": (1, 2, 3)}},
    may=("w",),
)

# --- Loops and branches -----------------------------------------------------------------

add(
    "scan over layers",
    {"w": STACK},
    lambda p, x: total(lax.scan(block, x, p["w"])[0]),
    X,
    views=LAYERS,
)
add(
    "scan over one layer",
    {"w": (1, 8, 8)},
    lambda p, x: total(lax.scan(block, x, p["w"])[0]),
    X,
    views=LAYERS,
)
add(
    "scan backwards, unrolled",
    {"w": STACK},
    lambda p, x: total(lax.scan(block, x, p["w"], reverse=True, unroll=2)[0]),
    X,
    views=LAYERS,
)
add(
    "scan over layers with norms",
    {"w": STACK, "scale": (3, 8), "bias": (3, 8)},
    lambda p, x: total(
        lax.scan(
            lambda h, q: (jnp.tanh((h * q["scale"]) @ q["w"] + q["bias"]), None), x, p
        )[0]
    ),
    X,
    views=LAYERS | {"scale": {"mode": "dense"}, "bias": {"mode": "dense"}},
)
add(
    "scan over layers, axis in the middle",
    {"w": (8, 3, 8)},
    lambda p, x: total(lax.scan(block, x, jnp.moveaxis(p["w"], 1, 0))[0]),
    X,
    views={"w": {"batch": 1}},
)
add(
    "scan over layers that also gives outputs",
    {"w": STACK, "v": SQUARE},
    lambda p, x: total(
        lax.scan(lambda h, w: (jnp.tanh(h @ w), h @ p["v"]), x, p["w"])[1]
    ),
    X,
    views=LAYERS,
)
add(
    "scan in a scan",
    {"w": (2, 3, 8, 8)},
    lambda p, x: total(lax.scan(lambda h, w: lax.scan(block, h, w), x, p["w"])[0]),
    X,
    views={"w": {"batch": (0, 1)}},
)
add(
    "scan over rows",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(lambda h, w: (h + jnp.outer(h[:, 0], w), None), x, p["w"])[0]
    ),
    X,
    falls={"w": "scan"},
)
add(
    "scan over contracted rows",
    {"w": (2, 8, 7)},
    lambda p, x: total(
        lax.scan(lambda s, z: (s + z[0] @ z[1], None), jnp.zeros(7), (x, p["w"]))[0]
    ),
    normal(7, 2, 8),
    views={"w": {"rows": (0, 1)}},
    may=("w",),
)
add(
    "scan with the leaf as a constant",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=4)[0]
    ),
    X,
)
add(
    "scan with the leaf in an unchanged carry",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), None, 4
        )[0][0]
    ),
    X,
)
add(
    "scan with a leaf in a carry that shrinks",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.5 * c[1]), None), (x, p["w"]), None, 3
        )[0][0]
    ),
    X,
    may=("w",),
)
add(
    "scan with a leaf in a carry that turns",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1].T), None), (x, p["w"]), None, 3
        )[0][0]
    ),
    X,
    may=("w",),
)
add(
    "scan with two leaves that change places",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x: total(
        lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[2], c[1]), None),
            (x, p["w"], p["v"]),
            None,
            3,
        )[0][0]
    ),
    X,
    may=ADAPTED,
)
add(
    "scan whose carry ends as the loss sees it",
    {"w": SQUARE},
    lambda p, x: total(
        (lambda c: c[0] @ c[1])(
            lax.scan(
                lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), None, 2
            )[0]
        )
    ),
    X,
)
add(
    "scan that stacks the leaf",
    {"w": SQUARE},
    lambda p, x: total(x @ lax.scan(lambda c, _: (c, p["w"]), 0.0, None, 2)[1]),
    X,
    may=("w",),
)
add(
    "scan whose carry takes the leaf up",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), p["w"]), None),
            (x, jnp.eye(8)),
            None,
            3,
        )[0][0]
    ),
    X,
    may=("w",),
)
add(
    "scan with the leaf as constant and as layers",
    {"w": STACK},
    lambda p, x: total(
        lax.scan(lambda h, w: (jnp.tanh(h @ w) + h @ p["w"][0], None), x, p["w"])[0]
    ),
    X,
    views=LAYERS,
)
add(
    "map over data",
    {"w": W},
    lambda p, x: total(lax.map(lambda row: jnp.tanh(row @ p["w"]), x)),
    X,
)
add(
    "cumulative sums and sorts of activations",
    {"w": SQUARE},
    lambda p, x: total(
        lax.associative_scan(jnp.add, jnp.sort(x @ p["w"])) + jnp.cumsum(x @ p["w"], 0)
    ),
    X,
)
add(
    "fori_loop",
    {"w": SQUARE},
    lambda p, x: total(lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x)),
    X,
)
add(
    "fori_loop over layers",
    {"w": STACK},
    lambda p, x: total(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)),
    X,
    views=LAYERS,
)


def settled(p, x):
    """A fixed point found without a gradient, and one step with it."""

    def goes_on(state):
        return (state[0] < 9) & (jnp.sum(state[1] @ p["w"]) < 1e3)

    def step(state):
        return state[0] + 1, jnp.tanh(state[1] @ p["w"] + x)

    _, h = lax.while_loop(goes_on, step, (0, x))
    return total(lax.stop_gradient(h) @ p["w"])


add("while under stop_gradient", {"w": SQUARE}, settled, X)
add(
    "while that the loss looks at only",
    {"w": SQUARE},
    lambda p, x: total(
        (x @ p["w"])
        * lax.stop_gradient(
            lax.while_loop(lambda c: c < 3.0, lambda c: 2 * c, 0.3 + 0 * x[0, 0])
        )
    ),
    X,
)
add(
    "cond, the leaf in both branches",
    {"w": SQUARE},
    lambda p, x: total(
        lax.cond(
            x[0, 0] > 0, lambda x, w: x @ w, lambda x, w: jnp.tanh(x @ w.T), x, p["w"]
        )
    ),
    X,
)
add(
    "cond, closed over in one branch, not taken",
    {"w": SQUARE},
    lambda p, x: total(
        lax.cond(x[0, 0] > 100, lambda x: x @ p["w"], lambda x: 2 * x, x) + x @ p["w"]
    ),
    X,
)
add(
    "cond, closed over in one branch, taken",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x: total(
        lax.cond(x[0, 0] < 100, lambda x: x @ p["w"], lambda x: 2 * x @ p["v"], x)
    ),
    X,
)
add(
    "cond in a scan",
    {"w": STACK},
    lambda p, x: total(
        lax.scan(
            lambda h, w: (
                lax.cond(h[0, 0] > 0, lambda: jnp.tanh(h @ w), lambda: h @ w),
                None,
            ),
            x,
            p["w"],
        )[0]
    ),
    X,
    views=LAYERS,
)
add(
    "switch between layers",
    {"w": STACK},
    lambda p, x, i: total(
        lax.switch(i, [lambda x, k=k: jnp.tanh(x @ p["w"][k]) for k in range(3)], x)
    ),
    X,
    np.int32(1),
    views=LAYERS,
)
add(
    "switch that returns a leaf",
    {"w": SQUARE},
    lambda p, x, i: total(x @ lax.switch(i, [lambda w: w, lambda w: w.T], p["w"])),
    X,
    np.int32(1),
    falls={"w": "cond"},
)
add(
    "cond that returns one of two leaves",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x: total(x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"])),
    X,
    falls={"w": "cond", "v": "cond"},
)
add(
    "cond under vmap",
    {"w": SQUARE},
    lambda p, x: total(
        jax.vmap(lambda r: lax.cond(r[0] > 0, lambda: r @ p["w"], lambda: jnp.sin(r)))(x)
    ),
    X,
    may=("w",),
)

# --- Rematerialisation ------------------------------------------------------------------

POLICIES = {
    "none": None,
    "nothing": "nothing_saveable",
    "everything": "everything_saveable",
    "dots": "dots_saveable",
    "dots without batch": "dots_with_no_batch_dims_saveable",
}


def policy_of(name):
    return name and getattr(jax.checkpoint_policies, name)


for label, policy in POLICIES.items():
    add(
        f"remat in a scan, policy {label}",
        {"w": STACK},
        lambda p, x, policy=policy: total(
            lax.scan(jax.checkpoint(block, policy=policy_of(policy)), x, p["w"])[0]
        ),
        X,
        views=LAYERS,
    )
add(
    "remat, closed over, used twice",
    {"w": SQUARE},
    lambda p, x: total(
        jax.checkpoint(
            lambda x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]),
            policy=jax.checkpoint_policies.dots_saveable,
        )(x)
    ),
    X,
)


def remat_with_names(p, x):
    def layers(x, w):
        return checkpoint_name(jnp.tanh(x @ w), "hidden") @ w

    policy = jax.checkpoint_policies.save_only_these_names("hidden")
    return total(jax.checkpoint(layers, policy=policy)(x, p["w"]))


add("remat that saves names", {"w": SQUARE}, remat_with_names, X)
add(
    "remat without a barrier to common subexpressions",
    {"w": SQUARE},
    lambda p, x: total(
        jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]), prevent_cse=False)(x)
    ),
    X,
)
add(
    "remat in remat, around a scan",
    {"w": STACK},
    lambda p, x: total(
        jax.checkpoint(lambda x, w: lax.scan(jax.checkpoint(block), x, w)[0])(x, p["w"])
    ),
    X,
    views=LAYERS,
)
add(
    "remat that returns a leaf",
    {"w": SQUARE},
    lambda p, x: total(
        (lambda h, w: h @ w)(*jax.checkpoint(lambda x, w: (jnp.sin(x), w))(x, p["w"]))
    ),
    X,
)
add(
    "remat in remat that returns a leaf",
    {"w": SQUARE},
    lambda p, x: total(
        (lambda h, w: h @ w)(
            *jax.checkpoint(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w)))(x, p["w"])
        )
    ),
    X,
)


def layer_handed_on(h, w):
    return jnp.tanh(h @ w), w


for label, one in (
    ("", layer_handed_on),
    (", under remat", jax.checkpoint(layer_handed_on)),
    (", under jit and remat", jax.jit(jax.checkpoint(layer_handed_on))),
):
    add(
        f"scan that hands its layers on{label}",
        {"w": STACK},
        lambda p, x, one=one: total(lax.scan(block, *lax.scan(one, x, p["w"]))[0]),
        X,
        views=LAYERS,
    )
add(
    "scan in remat, layers handed on",
    {"w": STACK},
    lambda p, x: total(
        lax.scan(
            block,
            *jax.checkpoint(lambda x, w: lax.scan(layer_handed_on, x, w))(x, p["w"]),
        )[0]
    ),
    X,
    views=LAYERS,
)
add(
    "loop under remat whose carry is a leaf",
    {"w": SQUARE},
    lambda p, x: total(
        lax.fori_loop(
            0, 3, lambda _, carry: jax.checkpoint(layer_handed_on)(*carry), (x, p["w"])
        )[0]
    ),
    X,
)
add(
    "cond that hands a leaf on",
    {"w": SQUARE},
    lambda p, x: total(
        (lambda h, w: h @ w)(
            *lax.cond(
                x[0, 0] > 0,
                layer_handed_on,
                lambda h, w: (jnp.sin(h @ w), w),
                x,
                p["w"],
            )
        )
    ),
    X,
)
add(
    "cond that hands one of two leaves on",
    {"v": SQUARE, "w": SQUARE},
    lambda p, x: total(
        x @ lax.cond(x[0, 0] > 0, lambda v, w: v, lambda v, w: w, p["v"], p["w"])
    ),
    X,
    falls={"v": "cond", "w": "cond"},
)

add(
    "a scaled stack in a scan",
    {"w": STACK, "s": ()},
    lambda p, x: total(lax.scan(block, x, p["s"] * p["w"])[0]),
    X,
    views=LAYERS,
)
add(
    "a leaf moved to another memory",
    {"w": SQUARE},
    lambda p, x: total(x @ jax.device_put(p["w"], jax.devices()[0])),
    X,
)
add(
    "a derivative inside of a remat of a scan",
    {"w": STACK},
    lambda p, x: total(
        jax.grad(
            lambda x: total(jax.checkpoint(lambda x: lax.scan(block, x, p["w"])[0])(x))
        )(x)
    ),
    X,
    views=LAYERS,
)

# --- Vectorising, and derivatives inside the loss ---------------------------------------

add(
    "vmap over data",
    {"w": W},
    lambda p, x: total(jax.vmap(lambda x: jnp.tanh(x @ p["w"]))(x)),
    X,
)
add(
    "vmap over data, leaf on the left",
    {"w": (10, 8)},
    lambda p, x: total(jax.vmap(lambda x: p["w"] @ x, out_axes=1)(x)),
    X,
)
add(
    "vmap over the leaf, axis 0",
    {"w": (3, 8, 7)},
    lambda p, x: total(jax.vmap(lambda w: x @ w)(p["w"])),
    X,
    views=LAYERS,
)
add(
    "vmap over the leaf, axis 1, and data",
    {"w": (8, 3, 7)},
    lambda p, x: total(jax.vmap(lambda w, x: x @ w, in_axes=(1, 0))(p["w"], x)),
    normal(7, 3, 5, 8),
    views={"w": {"batch": 1}},
)
add(
    "vmap over the leaf, a scan inside",
    {"w": (2, 3, 8, 8)},
    lambda p, x: total(jax.vmap(lambda w: lax.scan(block, x, w)[0])(p["w"])),
    X,
    views={"w": {"batch": (0, 1)}},
)
add(
    "gradient with respect to the input",
    {"w": SQUARE},
    lambda p, x: total(jax.vmap(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]))))(x)),
    X,
)
add(
    "Laplacian of a network",
    {"w": (4, 8), "v": (8, 5)},
    lambda p, x: total(
        jax.vmap(
            lambda x: jnp.trace(
                jax.hessian(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))(x)
            )
        )(x)
    ),
    X[:3, :4],
)
add(
    "Hessian",
    {"w": SQUARE},
    lambda p, x: total(jax.hessian(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x[0])),
    X,
)
add(
    "forward derivative",
    {"w": W},
    lambda p, x: total(
        jnp.stack(jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (jnp.cos(x),)))
    ),
    X,
)
add(
    "gradient through a scan with respect to the input",
    {"w": STACK},
    lambda p, x: total(jax.grad(lambda x: total(lax.scan(block, x, p["w"])[0]))(x)),
    X,
    views=LAYERS,
)
add(
    "a step on the leaf inside",
    {"w": W},
    lambda p, x: total(
        x @ (p["w"] - 0.1 * jax.grad(lambda w: total(jnp.tanh(x @ w)))(p["w"]))
    ),
    X,
)
add(
    "stop_gradient of the leaf",
    {"w": W},
    lambda p, x: total(x @ lax.stop_gradient(p["w"])) + total(jnp.tanh(x @ p["w"])),
    X,
)
add(
    "stop_gradient of what a trained scale makes of the leaf",
    {"w": SQUARE, "s": ()},
    lambda p, x: total(
        x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"] / p["s"]) * p["s"] - p["w"]))
    ),
    X,
)
add(
    "stop_gradient of one of two leaves",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x: (
        total(jnp.tanh(x @ lax.stop_gradient(p["v"])) @ p["w"]) + total(x @ p["v"])
    ),
    X,
)
add(
    "stop_gradient of activations",
    {"w": SQUARE},
    lambda p, x: total(lax.stop_gradient(jnp.tanh(x @ p["w"])) @ p["w"]),
    X,
)

# --- Rules of the user's own ------------------------------------------------------------


@jax.custom_vjp
def louder(x):
    """sin, with three times its gradient."""
    return jnp.sin(x)


louder.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped(x, bound):
    """The identity, its gradient clipped."""
    return x


clipped.defvjp(
    lambda x, bound: (x, None), lambda bound, _, g: (jnp.clip(g, -bound, bound),)
)


@jax.custom_vjp
def product(x, w):
    """x @ w, with twice the gradient for x and thrice for w."""
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda res, g: (2 * g @ res[1].T, 3 * res[0].T @ g)
)


@jax.custom_jvp
def slanted(x, w):
    """x @ w, with twice the derivative in x and five times in w."""
    return x @ w


@slanted.defjvp
def _slanted_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * dx @ w + 5 * x @ dw


add("custom_vjp on activations", {"w": SQUARE}, lambda p, x: total(louder(x @ p["w"])), X)
add(
    "custom_vjp with a static argument",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x: total(clipped(jnp.tanh(x @ p["w"]), 0.2) @ p["v"]),
    X,
)
add(
    "custom_vjp on activations in a scan",
    {"w": STACK},
    lambda p, x: total(lax.scan(lambda h, w: (louder(h @ w), None), x, p["w"])[0]),
    X,
    views=LAYERS,
)
add(
    "custom_vjp under vmap",
    {"w": SQUARE},
    lambda p, x: total(jax.vmap(lambda r: louder(r @ p["w"]))(x)),
    X,
)
add(
    "custom_vjp takes a leaf",
    {"w": SQUARE},
    lambda p, x: total(product(x, p["w"])),
    X,
    falls={"w": "custom_vjp"},
)
add(
    "custom_vjp takes a leaf in a scan",
    {"w": STACK},
    lambda p, x: total(
        lax.scan(lambda h, w: (jnp.tanh(product(h, w)), None), x, p["w"])[0]
    ),
    X,
    views=LAYERS,
    falls={"w": "custom_vjp"},
)
add(
    "custom_jvp takes a leaf",
    {"w": SQUARE},
    lambda p, x: total(slanted(x, p["w"])),
    X,
    falls={"w": "custom_jvp"},
)
add(
    "custom_jvp takes a leaf under remat",
    {"w": SQUARE},
    lambda p, x: total(jax.checkpoint(slanted)(x, p["w"])),
    X,
    falls={"w": "custom_jvp"},
)
add(
    "activation functions",
    {"w": SQUARE},
    lambda p, x: (
        total(jax.nn.relu(x @ p["w"]))
        + jnp.sum(jax.nn.logsumexp(x @ p["w"], axis=-1))
        + total(jax.nn.softmax(x @ p["w"]) * jax.nn.gelu(x @ p["w"]))
        + jnp.sum(jax.nn.log_softmax(jax.nn.silu(x @ p["w"]))[:, 0])
    ),
    X,
)
add(
    "an activation function of the leaf",
    {"w": SQUARE},
    lambda p, x: total(x @ jax.nn.relu(p["w"])),
    X,
    falls={"w": "custom_jvp|max|jit"},
)
add(
    "attention by jax.nn",
    {"w": STACK},
    lambda p, x: total(
        jax.nn.dot_product_attention(
            *[(x @ p["w"][i]).reshape(2, 3, 2, 4) for i in range(3)], is_causal=True
        )
    ),
    X,
    views=LAYERS,
    tolerance=1e-6,
)
add(
    "a linear solve on activations",
    {"w": SQUARE},
    lambda p, x: total(
        jnp.linalg.solve(10 * jnp.eye(6) + (x @ p["w"]) @ x.T, jnp.tanh(x @ p["w"]))
    ),
    X,
)
add(
    "complex activations",
    {"w": SQUARE},
    lambda p, x: total(jnp.abs(jnp.fft.rfft(x @ p["w"]))),
    X,
)
add(
    "complex data",
    {"w": W},
    lambda p, x: total(jnp.abs((x + 1j * jnp.cos(x)) @ p["w"])),
    X,
    may=("w",),
)
add(
    "dropout",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x, words: total(
        jnp.where(
            jax.random.bernoulli(jax.random.wrap_key_data(words), 0.7, x.shape),
            jnp.tanh(x @ p["w"]) / 0.7,
            0.0,
        )
        @ p["v"]
    ),
    X,
    np.array([0, 5], np.uint32),
)


def watched(p, x):
    y = x @ p["w"]
    jax.debug.callback(lambda _: None, y)
    return total(y)


add("a debug callback", {"w": W}, watched, X)

# --- Functions called from the loss -----------------------------------------------------


@jax.jit
def jitted_layer(x, w):
    return jnp.tanh(x @ w)


@jax.jit
def turned(w):
    return w.T


add("jit inside", {"w": SQUARE}, lambda p, x: total(jitted_layer(x, p["w"])), X)
add(
    "jit called with different leaves",
    {"w": SQUARE, "v": SQUARE, "e": SQUARE},
    lambda p, x: total(
        jitted_layer(jitted_layer(jitted_layer(x, p["w"]), p["v"]), p["e"])
    ),
    X,
)
add(
    "jit called with a leaf, then with data",
    {"w": SQUARE},
    lambda p, x: total(jitted_layer(jitted_layer(x, p["w"]), x.T @ x)),
    X,
)
add(
    "jit called with one leaf in two ways",
    {"w": SQUARE},
    lambda p, x: total(jitted_layer(jitted_layer(x, p["w"]), p["w"].T)),
    X,
)
add(
    "jit that takes a leaf in both places",
    {"w": SQUARE, "v": SQUARE},
    lambda p, x: total(jitted_layer(x, p["w"]) @ jitted_layer(p["v"], x.T)),
    X,
)
add(
    "jit that returns a leaf",
    {"w": SQUARE},
    lambda p, x: total(x @ turned(p["w"])),
    X,
)
add(
    "jit in jit, closed over",
    {"w": SQUARE},
    lambda p, x: total(jax.jit(lambda x: jitted_layer(x, p["w"]) @ p["w"])(x)),
    X,
)
add(
    "jit in a scan with different leaves",
    {"w": STACK, "v": STACK},
    lambda p, x: total(
        lax.scan(
            lambda h, q: (jitted_layer(jitted_layer(h, q["w"]), q["v"]), None), x, p
        )[0]
    ),
    X,
    views=LAYERS | {"v": {"batch": 0}},
)

# --- shard_map --------------------------------------------------------------------------


def mesh():
    return jax.make_mesh(
        (2, 2), ("d", "t"), (AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )


def sharded(body, in_specs, out_specs, check_vma):
    """The sum over a body that runs on each shard of (data, weights)."""

    def loss(p, x):
        mapped = jax.shard_map(
            body,
            mesh=mesh(),
            in_specs=tuple(PartitionSpec(*spec) for spec in in_specs),
            out_specs=PartitionSpec(*out_specs),
            check_vma=check_vma,
        )
        return total(mapped(x, p["w"]))

    return loss


def gathered(x, w):
    return jnp.tanh(x @ lax.all_gather(w, "d", axis=0, tiled=True))


def gathered_layers(x, w):
    """A stack whose rows are sharded, gathered layer by layer."""

    def layer(h, w):
        return jnp.tanh(h @ lax.all_gather(w, "d", axis=0, tiled=True)), None

    return lax.scan(layer, x, w)[0]


for check in (True, False):
    how = f"check_vma {check}"
    add(
        f"shard_map, data parallel, {how}",
        {"w": SQUARE},
        sharded(lambda x, w: jnp.tanh(x @ w), (("d",), ()), ("d",), check),
        X,
    )
    add(
        f"shard_map, data parallel, mean inside, {how}",
        {"w": SQUARE},
        sharded(lambda x, w: lax.pmean(total(x @ w), "d"), (("d",), ()), (), check),
        X,
    )
    add(
        f"shard_map, rows and psum, {how}",
        {"w": SQUARE},
        sharded(lambda x, w: lax.psum(x @ w, "t"), (("d", "t"), ("t",)), ("d",), check),
        X,
    )
    add(
        f"shard_map, columns, {how}",
        {"w": SQUARE},
        sharded(lambda x, w: x @ w, (("d",), (None, "t")), ("d", "t"), check),
        X,
    )
    add(
        f"shard_map, rows gathered, {how}",
        {"w": SQUARE},
        sharded(gathered, (("d",), ("d",)), ("d",), check),
        X,
    )
    add(
        f"shard_map, rows of layers gathered in a scan, {how}",
        {"w": STACK},
        sharded(gathered_layers, (("d",), (None, "d")), ("d",), check),
        X,
        views=LAYERS,
    )
    add(
        f"shard_map, experts, {how}",
        {"w": (4, 8, 7)},
        sharded(
            lambda x, w: jnp.einsum("etd,edf->etf", x, w),
            (("d",), ("d",)),
            ("d",),
            check,
        ),
        normal(7, 4, 5, 8),
        views=LAYERS,
    )
    add(
        f"shard_map, remat inside, {how}",
        {"w": SQUARE},
        sharded(
            jax.checkpoint(lambda x, w: jnp.tanh(x @ w) @ w), (("d",), ()), ("d",), check
        ),
        X,
    )

# --- Sums with arrays, leaves side by side ----------------------------------------------

add("one more than a leaf", {"w": W}, lambda p, x: total(x @ (1 + p["w"])), X)
add(
    "one more than a leaf, under scan",
    {"w": STACK, "b": SQUARE},
    lambda p, x: total(
        lax.scan(lambda h, w: block(h, (1 + w) - p["b"] * 0.3 - 0.1), x, p["w"])[0]
    ),
    X,
    views=LAYERS | {"b": {"mode": "dense"}},
)
add(
    "one more than half a leaf, and one less a leaf",
    {"w": SQUARE},
    lambda p, x: total(jnp.tanh(x @ (1 + 0.5 * p["w"])) @ (1 - 2 * p["w"].T)),
    X,
)
add(
    "a leaf and the product of two others",
    {"w": W, "a": (8, 2), "b": (2, 10), "s": Leaf(())},
    lambda p, x: total(x @ (p["s"] * p["w"] + p["a"] @ p["b"])) + total(p["w"] - x[0, 0]),
    X,
    views={"a": {"mode": "dense"}, "b": {"mode": "dense"}},
    falls={"w": "sin"},
)
add(
    "rounded, with the derivative of the leaf",
    {"w": W},
    lambda p, x: total(
        x @ (p["w"] + lax.stop_gradient(jnp.round(4 * p["w"]) / 4 - p["w"]))
    ),
    X,
)
add(
    "positions added to tokens",
    {"w": SQUARE, "v": (1, 5, 8)},
    lambda p, x: total((x + p["v"]) @ p["w"]),
    normal(13, 2, 5, 8),
    views={"v": {"rows": (0, 1)}},
    falls={"v": "add"},
)


add(
    "a token before every sequence",
    {"w": SQUARE, "v": (1, 4, 8)},
    lambda p, x: total(
        jnp.concatenate([jnp.broadcast_to(p["v"], (2, 4, 8)), x], 1) @ p["w"]
    ),
    normal(13, 2, 5, 8),
    views={"v": {"rows": (0, 1)}},
    falls={"v": "concatenate"},
)


def stream(p, x):
    """What a leaf was added to goes on, past every operation without a rule."""
    h = x + p["v"]
    for _ in range(2):
        h += jnp.tanh(h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) @ p["w"])
    return total(h @ p["w"])


add(
    "positions added to tokens, one sequence",
    {"w": SQUARE, "v": (5, 8)},
    stream,
    normal(13, 5, 8),
    falls={"v": "integer_pow|square|mul"},
)
add(
    "two leaves concatenated",
    {"w": W, "v": (8, 5)},
    lambda p, x: total(x @ jnp.concatenate([p["w"], p["v"]], axis=1)),
    X,
)
add(
    "leaves concatenated, transposed, scaled, with an array",
    {"w": W, "v": (8, 5)},
    lambda p, x: total(
        jnp.concatenate([0.5 * p["w"].T, x, -p["v"].T, p["w"].T + 1]).astype(x.dtype)
        @ x.T
    ),
    X,
)
add(
    "leaves concatenated along what is summed",
    {"w": (8, 10), "v": (6, 10)},
    lambda p, x, y: total(jnp.concatenate([p["v"], x, p["w"]]).T @ y),
    X @ normal(14, 8, 10),
    normal(15, 20, 3),
)
add(
    "leaves concatenated, with heads",
    {"w": (8, 2, 3), "v": (8, 4, 3)},
    lambda p, x: total(
        jnp.einsum("td,dhk->htk", x, jnp.concatenate([p["w"], p["v"]], axis=1))
    ),
    X,
    views={"w": {"rows": 0}, "v": {"rows": 0}},
)
add(
    "stacks concatenated along what is stacked",
    {"w": (3, 8, 7), "v": (2, 8, 7)},
    lambda p, x: total(jnp.einsum("etd,edf->etf", x, jnp.concatenate([p["w"], p["v"]]))),
    normal(7, 5, 4, 8),
    views={"w": {"batch": 0}, "v": {"batch": 0}},
    falls={"w": "dot_general", "v": "dot_general"},
)
add(
    "concatenated inside jit, remat and scan",
    {"w": STACK, "v": (8, 4)},
    lambda p, x: total(
        lax.scan(
            jax.checkpoint(
                jax.jit(lambda h, w: block(h, jnp.concatenate([w[:, :4], p["v"]], 1)))
            ),
            x,
            p["w"],
        )[0]
    ),
    X,
    views=LAYERS,
)
add(
    "concatenated before remat, and a loop that carries it",
    {"w": (8, 5), "v": (8, 3)},
    lambda p, x: total(
        jax.checkpoint(lambda x, k: lax.scan(lambda h, _: block(h, k), x, None, 3)[0])(
            x, jnp.concatenate([p["w"], p["v"]], 1)
        )
    ),
    X,
)
add(
    "concatenated to be scanned",
    {"w": STACK, "v": (2, 8, 8)},
    lambda p, x: total(lax.scan(block, x, jnp.concatenate([p["w"], p["v"]]))[0]),
    X,
    views=LAYERS | {"v": {"batch": 0}},
    falls={"w": "scan", "v": "scan"},
)

# --- Models as people write them --------------------------------------------------------

before = {*CASES}


def add_recurrent(name, cell):
    """Puts a recurrent network of Flax on the table, every leaf by its path."""
    model, x = nn.RNN(cell), normal(16, 2, 4, 8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.float32(x))["params"]
    start = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)

    def loss(p, x):
        variables = {"params": unflatten_dict(p, sep="/")}
        carry = jax.tree.map(lambda c: c.astype(x.dtype), start)
        return total(model.apply(variables, x, initial_carry=carry))

    leaves = flatten_dict(shapes, sep="/").items()
    add(name, {path: leaf.shape for path, leaf in leaves}, loss, x)


add_recurrent("LSTM of linen", nn.OptimizedLSTMCell(6, parent=None))
add_recurrent("LSTM of linen, each gate by itself", nn.LSTMCell(6, parent=None))
add_recurrent("GRU of linen", nn.GRUCell(6, parent=None))


def standardised(p, x):
    """A residual network's convolution with its kernel standardised, as BiT has it."""
    mean, var = jnp.mean(p["w"], (0, 1, 2)), jnp.var(p["w"], (0, 1, 2))
    kernel = (p["w"] - mean) / jnp.sqrt(var + 1e-5)
    return convolve((2, 2))({"w": kernel}, x)


add(
    "convolution with a standardised kernel",
    {"w": KERNEL},
    standardised,
    IMAGE,
    views=CONV,
    falls={"w": "reduce_sum"},
)


def mixture(p, x, sizes):
    """Experts as Gemma's, the two branches of a gate kept in one leaf."""
    gate = lax.ragged_dot(x, p["w"].transpose(0, 3, 1, 2).reshape(3, 8, 10), sizes)
    hidden = jax.nn.gelu(gate[:, :5]) * gate[:, 5:]
    return total(lax.ragged_dot(hidden, p["v"], sizes))


add(
    "experts with a merged gate",
    {"w": (3, 2, 5, 8), "v": (3, 5, 8)},
    mixture,
    normal(7, 9, 8),
    np.array([2, 4, 3], np.int32),
    views={"w": {"batch": 0, "rows": 3}, "v": {"batch": 0}},
)
add(
    "learned queries",
    {"probe": (4, 8), "w": SQUARE, "v": SQUARE, "e": SQUARE},
    lambda p, x: total(
        jax.nn.softmax((p["probe"] @ p["w"]) @ (x @ p["v"]).T) @ (x @ p["e"])
    ),
    X,
    views={"probe": {"rows": 1}},
)


def normalised(p, x):
    """Layers with norms that scale by one more than a leaf, under scan."""

    def layer(h, leaves):
        scale, w = leaves
        normed = h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
        return h + jnp.tanh(normed * (1 + scale) @ w), None

    return total(lax.scan(layer, x, (p["scale"], p["w"]))[0])


add(
    "norms that scale by one more",
    {"scale": (3, 8), "w": STACK},
    normalised,
    X,
    views=LAYERS | {"scale": {"mode": "dense"}},
)
MODELS = [name for name in CASES if name not in before]

# --- Uses without a rule: exact all the same --------------------------------------------

add(
    "two leaves side by side in a lookup",
    {"e": TABLE, "v": TABLE},
    lambda p, t: total(jnp.concatenate([p["e"], p["v"]], axis=1)[t]),
    TOKENS,
    falls={"e": "gather", "v": "gather"},
)
add(
    "two leaves stacked",
    {"w": W, "v": W},
    lambda p, x: total(x @ jnp.stack([p["w"], p["v"]])),
    X,
    falls={"w": "concatenate|stack", "v": "concatenate|stack"},
)
add(
    "two leaves added",
    {"w": W, "v": W},
    lambda p, x: total(x @ (p["w"] + p["v"])),
    X,
    may=ADAPTED,
)
add(
    "weight norm",
    {"w": W, "scale": (10,)},
    lambda p, x: total(
        x @ (p["scale"] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))
    ),
    X,
    falls={"w": "mul|div|integer_pow|square"},
)
add(
    "the loss decays the leaf",
    {"w": W},
    lambda p, x: total(x @ p["w"]) + 0.1 * jnp.sum(p["w"] ** 2),
    X,
    falls={"w": "integer_pow|square|mul"},
)
add(
    "the loss decays the layers of a scan",
    {"w": STACK},
    lambda p, x: total(lax.scan(block, x, p["w"])[0]) + 0.1 * jnp.sum(p["w"] ** 2),
    X,
    views=LAYERS,
    falls={"w": "integer_pow|square|mul"},
)
add(
    "one entry",
    {"w": W},
    lambda p, x: total(x @ p["w"]) * jnp.cos(p["w"][0, 0]),
    X,
    may=("w",),
)
add(
    "the sum of a leaf",
    {"w": W},
    lambda p, x: total(x @ p["w"]) * jnp.sum(p["w"]),
    X,
    falls={"w": "reduce_sum"},
)
add(
    "above a floor",
    {"w": W},
    lambda p, x: total(x @ jnp.maximum(p["w"], -0.1)),
    X,
    falls={"w": "max"},
)
add(
    "one more than a leaf, its square",
    {"w": W},
    lambda p, x: total(x @ (1 + p["w"] ** 2)),
    X,
    falls={"w": "integer_pow|square"},
)
add(
    "masked",
    {"w": W},
    lambda p, x: total(x @ jnp.where(np.arange(80).reshape(W) % 3 > 0, p["w"], 0.0)),
    X,
    falls={"w": "select_n|jit"},
)
add(
    "padded",
    {"w": W},
    lambda p, x: total(x @ jnp.pad(p["w"], ((0, 0), (1, 2)))),
    X,
    may=("w",),
)
add("reversed", {"w": W}, lambda p, x: total(x @ p["w"][::-1]), X, may=("w",))
add(
    "updated in place",
    {"w": W},
    lambda p, x: total(x @ p["w"].at[2, 3:5].set(0.5)),
    X,
    falls={"w": "scatter|dynamic_update_slice"},
)
add(
    "a fast use and a slow one in a scan",
    {"w": SQUARE},
    lambda p, x: total(
        lax.scan(
            lambda h, _: (jnp.tanh(h @ p["w"]) + jnp.sin(p["w"])[:6], None), x, None, 3
        )[0]
    ),
    X,
    falls={"w": "sin"},
)
add(
    "a slow use in one branch",
    {"w": SQUARE},
    lambda p, x: total(
        lax.cond(x[0, 0] < 9, lambda: x @ jnp.sin(p["w"]), lambda: x @ p["w"])
    ),
    X,
    falls={"w": "sin"},
)
add(
    "a slow use under shard_map",
    {"w": SQUARE},
    sharded(lambda x, w: jnp.tanh(x @ jnp.sin(w)), (("d",), ()), ("d",), True),
    X,
    falls={"w": "sin|shard_map"},
)
add(
    "a slow use of half the leaf",
    {"w": W},
    lambda p, x: total(x @ p["w"]) + total(jnp.sin(p["w"][:, :5])),
    X,
    falls={"w": "sin"},
)

# --- Outputs beside the loss ------------------------------------------------------------


def with_aux(p, x):
    y = jnp.tanh(x @ p["w"])
    return total(y @ p["v"]), {"mean": jnp.mean(y), "count": jnp.int32(3), "y": y}


add("aux", {"w": SQUARE, "v": SQUARE}, with_aux, X, has_aux=True)
add(
    "aux that holds a leaf",
    {"w": W},
    lambda p, x: (
        total(x @ p["w"]),
        {"w": p["w"], "turned": p["w"].T, "twice": jnp.concatenate([p["w"], p["w"]])},
    ),
    X,
    has_aux=True,
)

# --- Turned round -----------------------------------------------------------------------

add(
    "rows and layers turned round",
    {"w": (3, 8, 7)},
    lambda p, x: sum(total(x @ w[::-1]) * i for i, w in enumerate(p["w"][::-1], 1)),
    X,
    views=LAYERS,
)
add(
    "a merged axis turned round",
    {"w": (2, 4, 7)},
    lambda p, x: total(x @ p["w"].reshape(8, 7)[::-1]),
    X,
    views={"w": {"rows": (0, 1)}},
)
