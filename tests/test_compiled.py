"""What the compiled step holds: no gradient of a weight, and few operations beyond."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import repeat
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from benchmarks.shared import hlo
from raclora_jax import methods

# Numbers that cannot be taken for one another: 7 sequences of 20 tokens.
BATCH, LENGTH, VOCABULARY, WIDTH, HEADS, SIZE, HIDDEN, LAYERS = (
    7,
    20,
    91,
    48,
    4,
    11,
    125,
    3,
)
RANK = 5


def shapes(width=WIDTH, heads=HEADS, size=SIZE, hidden=HIDDEN, vocabulary=VOCABULARY):
    """The leaves of one layer, and those around the layers."""
    layer = {
        "norm": (width,),
        "query": (width, heads, size),
        "key": (width, heads, size),
        "value": (width, heads, size),
        "out": (heads, size, width),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    return layer, {"table": (vocabulary, width), "norm": (width,)}


def tree(scanned, layers=LAYERS, **sizes):
    """The weights as shapes, their layers stacked or in a list."""
    layer, around = shapes(**sizes)
    if scanned:
        stack = {name: (layers, *shape) for name, shape in layer.items()}
    else:
        stack = [layer] * layers
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        around | {"layers": stack},
        is_leaf=lambda node: isinstance(node, tuple),
    )


def rms(h, scale):
    return h * scale * lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


def layer(h, p):
    z = rms(h, p["norm"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", z, p[n]) for n in ("query", "key", "value"))
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = jnp.where(np.tri(h.shape[1], dtype=bool), scores, -1e9)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    h = h + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
    return h + jax.nn.gelu(h @ p["up"]) @ p["down"], None


def after_embedding(h, params, targets):
    """Everything behind the lookup; the head is the table."""
    if isinstance(params["layers"], dict):
        h, _ = lax.scan(layer, h, params["layers"])
    else:
        for p in params["layers"]:
            h, _ = layer(h, p)
    logits = rms(h, params["norm"]) @ params["table"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def decoder(params, tokens):
    h = params["table"][tokens[:, :-1]]
    return after_embedding(h, params, tokens[:, 1:])


def spec_of(scanned, side, rank=RANK):
    prefix, batch = ("layers", 0) if scanned else (r"layers/\d+", ())
    first = 1 if scanned else 0
    rules = [
        rl.Rule(f"{prefix}/norm", mode="dense"),
        rl.Rule(f"{prefix}/(query|key|value)", batch=batch, rows=first),
        rl.Rule(f"{prefix}/out", batch=batch, rows=(first, first + 1)),
        rl.Rule(f"{prefix}/(up|down)", batch=batch, rows=first),
    ]
    # Whitening is slow to compile, and one side shows it.
    sketch = "orthonormal" if side == "left" else "gaussian_raw"
    return rl.Spec(rank, side=side, sketch=sketch, rules=rules)


def tokens_of(batch=BATCH, length=LENGTH):
    return jax.ShapeDtypeStruct((batch, length + 1), "int32")


def text_of(step, *args):
    return jax.jit(step).lower(*args).compile().as_text()


def factor_step(spec, tx):
    def step(params, state, tokens):
        loss, grads = rl.value_and_grad(decoder, spec)(params, state, tokens)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state, loss

    return step


def dense_step(tx):
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(decoder)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def adapted_shapes(params, spec):
    plans = rl.plan(spec, params)
    return {p: plan.shape for p, plan in plans.items() if plan.mode == "lowrank"}


@pytest.mark.parametrize(
    ("scanned", "side"),
    [(False, "right"), (True, "left"), repeat(False, "left"), repeat(True, "right")],
)
def test_no_weight_gradient_in_a_whole_step(scanned, side):
    params, spec = tree(scanned), spec_of(scanned, side)
    tx = rl.raclora(1e-3, spec, weight_decay=0.01, key=0)
    state = jax.eval_shape(tx.init, params)
    text = text_of(factor_step(spec, tx), params, state, tokens_of())
    leaves = adapted_shapes(params, spec)
    assert len(leaves) == 1 + 6 * (1 if scanned else LAYERS)
    assert hlo.weight_gradients(text, leaves, RANK) == []
    assert len(hlo.products(text)) > 2 * len(leaves)


@pytest.mark.parametrize("scanned", [False, True])
def test_lora_forms_no_gradient_of_a_weight_either(scanned):
    """The rival of the tables is as careful as ours."""
    params, spec = tree(scanned), spec_of(scanned, "left")
    method = methods.lora(1e-3, spec, key=0)
    state = jax.eval_shape(method.init, params)
    text = text_of(lambda s, tokens: method.step(s, decoder, tokens), state, tokens_of())
    assert hlo.weight_gradients(text, adapted_shapes(params, spec), RANK) == []


@pytest.mark.parametrize(
    ("scanned", "form"), [(False, "adamw"), (True, "adamw"), (True, "dense")]
)
def test_the_plain_gradient_is_found_out(scanned, form):
    """The positive control: every adapted leaf, by AdamW and by the dense form."""
    params, spec = tree(scanned), spec_of(scanned, "left")
    tx = optax.adamw(1e-3) if form == "adamw" else rl.raclora(1e-3, spec, key=0)
    state = jax.eval_shape(tx.init, params)
    text = text_of(dense_step(tx), params, state, tokens_of())
    leaves = adapted_shapes(params, spec)
    found = hlo.weight_gradients(text, leaves, RANK)
    assert {path for paths, _ in found for path in paths.split(", ")} == {*leaves}
    assert len(found) >= len(leaves)


def test_a_fallback_is_found_out():
    """What the library itself forms in full is seen by the same eyes."""
    params = {"w": jax.ShapeDtypeStruct((WIDTH, HIDDEN), "float32")}
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), "float32")
    tx = rl.raclora(1e-3, RANK, key=0)
    state = jax.eval_shape(tx.init, params)

    def text(loss):
        grad_fn = rl.value_and_grad(loss, RANK)
        return text_of(lambda *args: grad_fn(*args)[1], params, state, x)

    leaves = {"w": (WIDTH, HIDDEN)}
    fast = text(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
    assert hlo.weight_gradients(fast, leaves, RANK) == []
    with pytest.warns(UserWarning, match="'w'"):
        slow = text(lambda p, x: jnp.sum(jnp.sin(x @ jnp.sin(p["w"]))))
    assert len(hlo.weight_gradients(slow, leaves, RANK)) == 1


def test_operations_are_those_of_the_floor():
    """No method that trains through the network does less than the frozen model."""
    sizes = {"width": 512, "heads": 8, "size": 64, "hidden": 2048, "vocabulary": 4096}
    params, tokens = tree(False, 2, **sizes), tokens_of(4, 256)
    spec = spec_of(False, "left", rank=8)
    state = jax.eval_shape(rl.raclora(1e-3, spec, key=0).init, params)
    hidden = jax.ShapeDtypeStruct((4, 256, 512), "float32")
    targets = jax.ShapeDtypeStruct((4, 256), "int32")

    def flops(function, *args):
        lowered = jax.jit(function).lower(*args)
        return lowered.compile().cost_analysis()["flops"]

    floor = flops(jax.value_and_grad(after_embedding), hidden, params, targets)
    ours = flops(rl.value_and_grad(decoder, spec), params, state, tokens)
    full = flops(jax.value_and_grad(decoder), params, tokens)
    assert floor < ours < 1.02 * floor
    assert full > 1.4 * floor  # 1.5, but for attention


def test_data_parallel_traffic_is_of_the_size_of_the_factors():
    """What eight devices sum in a step is what the spec says is trained."""
    params, spec = tree(True), spec_of(True, "left")
    tx = rl.raclora(1e-3, spec, key=0)
    state = jax.eval_shape(tx.init, params)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree, sharding):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def traffic(step):
        args = placed(params, whole), placed(state, whole), placed(tokens_of(8), rows)
        outputs = jax.tree.map(lambda _: whole, jax.eval_shape(step, *args))
        jitted = jax.jit(step, out_shardings=outputs)
        return sum(hlo.collective_bytes(jitted.lower(*args).compile().as_text()).values())

    costs = rl.summary(params, spec)
    ours, dense = traffic(factor_step(spec, tx)), traffic(dense_step(tx))
    assert ours >= costs.total.traffic_bytes
    assert ours < 1.1 * costs.total.traffic_bytes
    assert dense > 0.9 * costs.full.traffic_bytes


# --- The reader itself ------------------------------------------------------------------

LIBRARY_CALLS = """\
HloModule jit_step, entry_computation_layout={()->f32[]}

%region_0.4 (arg: (s32[], f32[64,48])) -> (s32[], f32[64,48]) {
  %x = f32[96,64]{1,0} parameter(0)
  %y = f32[96,48]{1,0} parameter(1)
  %gemm.1 = (f32[64,48]{1,0}, s8[1024]{0}) custom-call(%x, %y), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
  ROOT %all-reduce = f32[64,48]{1,0} all-reduce(%gw), channel_id=1, to_apply=%add
}

ENTRY %main.1 () -> f32[] {
  %a = bf16[3,16,8]{2,1,0} parameter(0)
  %b = bf16[3,8,5]{2,1,0} parameter(1)
  %m = bf16[3,16,5]{2,1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul"
  %g = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%c), dimensions={0}
  %d = f32[16,4]{1,0} all-gather-done(%g)
  %w = (s32[], f32[64,48]{1,0}) while(%t), condition=%cond, body=%region_0.4, \
backend_config={"known_trip_count":{"n":"12"}}
}
"""


@pytest.mark.smoke
def test_library_calls_and_loops_are_read():
    found = {p.kind: p for p in hlo.products(LIBRARY_CALLS)}
    gemm, matmul = found["__cublas$gemm"], found["__onednn$matmul"]
    assert (gemm.shape, gemm.contracted, gemm.trips) == ((64, 48), 96, 12)
    assert (matmul.shape, matmul.contracted, matmul.trips) == ((3, 16, 5), 8, 1)
    assert matmul.flops == 2 * 3 * 16 * 8 * 5
    leaves = {"kernel": (48, 64)}
    assert [path for path, _ in hlo.weight_gradients(LIBRARY_CALLS, leaves, 8)] == [
        "kernel"
    ]
    assert hlo.weight_gradients(LIBRARY_CALLS, leaves, 96) == []
    assert hlo.collective_bytes(LIBRARY_CALLS) == {
        "all-reduce": 12 * 64 * 48 * 4,
        "all-gather": 16 * 4 * 4,
    }


def test_convolutions_are_read():
    def loss(w, x):
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.sum(jnp.sin(y))

    w, x = jnp.ones((3, 3, 6, 10)), jnp.ones((4, 14, 14, 6))
    forward = hlo.products(text_of(loss, w, x))
    assert [(p.shape, p.contracted) for p in forward] == [((4, 14, 14, 10), 54)]
    leaves = {"w": w.shape}
    assert hlo.weight_gradients(text_of(loss, w, x), leaves, RANK) == []
    found = hlo.weight_gradients(text_of(jax.grad(loss), w, x), leaves, RANK)
    assert [(path, p.contracted) for path, p in found] == [("w", 4 * 14 * 14)]


def test_a_scan_multiplies():
    def loss(ws, x):
        return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0])

    ws, x = jnp.ones((LAYERS, 32, 32)), jnp.ones((9, 32))
    (one,) = hlo.products(text_of(loss, ws, x))
    assert (one.shape, one.contracted, one.trips) == ((9, 32), 32, LAYERS)
    assert one.flops == LAYERS * 2 * 9 * 32 * 32
