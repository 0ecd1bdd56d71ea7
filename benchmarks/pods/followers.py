"""Followers: bytes a step for 7B shapes, and copies of the weights that stay equal.

The bytes are the library's own count of what a message holds. The runs are of 1,000 steps
over 40 links: the trainer's weights are on a mesh of (4, 2) devices or on one, and one
follower is on either. Each message has digests of all weights, so that a follower whose
bits differ stops there.

    python -m benchmarks.pods.followers
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

import raclora_jax as rl
from benchmarks.pods import pod_steps
from benchmarks.shared import rows

STEPS, LINK = 1000, 25
RANK, PART = 16, 16
KEY = 3
MESH = {
    "stack": PartitionSpec(None, "a", "b"),
    "up": PartitionSpec("a", "b"),
    "down": PartitionSpec(None, ("a", "b")),
    "bias": PartitionSpec("b"),
}


def byte_rows() -> list[dict[str, Any]]:
    """Bytes that a step of 7B sends, by what is sent."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), auto, devices=jax.devices()[:1])
    model = pod_steps.llama(pod_steps.LLAMA["7B"], 1, 512, mesh)
    params, batch = model.shapes()
    leaves = jax.tree.leaves(params)
    full = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    spec = rl.trace_spec(model.loss, params, batch, rank=RANK, side="smaller")
    plans = [plan for plan in rl.plan(spec, params).values() if plan.adapted]
    pairs = 0
    for plan in plans:
        stack = plan.size_of(plan.batch)
        pairs += stack * RANK * (plan.size_of(plan.rows) + plan.size_of(plan.cols))
    # Of all matrices the shorter side is that of the residual stream.
    (dim,) = {plan.dim for plan in plans}
    blocks = rl.trace_spec(
        model.loss,
        params,
        batch,
        rank=dim // PART,
        side="smaller",
        sketch="block",
        alpha="dim",
    )
    sent = {"full weights, bfloat16": full, "LoRA r16, bfloat16": 2 * pairs}
    for name, own in ((f"r{RANK}", spec), (f"blocks of dim / {PART}", blocks)):
        for numbers in ("bfloat16", "int8"):
            found = rl.follow.message_bytes(params, own, numbers=numbers)
            sent[f"RAC-LoRA {name}, {numbers}"] = found
    return [
        {"study": "bytes, 7B", "method": name, "bytes": count, "part": full / count}
        for name, count in sent.items()
    ]


def loss_fn(params: Any, x: Array) -> Array:
    """How far a small model with stacked layers is from ones."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def layer(x: Array, own: Array) -> tuple[Array, None]:
        return x + jnp.tanh(x @ own), None

    x, _ = jax.lax.scan(layer, x, wide["stack"])
    y = jnp.tanh(x @ wide["up"] + wide["bias"]) @ wide["down"]
    return jnp.mean((y - 1) ** 2)


def base_params(dtype: str) -> Any:
    """Weights from a seed."""
    shapes = {"stack": (4, 32, 32), "up": (32, 96), "down": (96, 24), "bias": (96,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: (0.2 * jax.random.normal(key, shape)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def on_mesh(params: Any) -> Any:
    """The weights on a mesh of (4, 2) devices."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), kinds)
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, MESH[name]))
        for name, leaf in params.items()
    }


def run(
    dtype: str, numbers: str, spread: bool, steps: int, law: str = "orthonormal"
) -> dict[str, Any]:
    """A trainer and two followers, and whether they were equal after every step."""
    base = base_params(dtype)
    batch = jax.random.normal(jax.random.key(1), (16, 32))
    rank = 16 if law == "orthonormal" else 8
    spec = rl.trace_spec(loss_fn, base, batch, rank=rank, resample_every=LINK, sketch=law)
    tx = rl.raclora(1e-3, spec, weight_decay=0.01, key=KEY)
    grad_fn = rl.value_and_grad(loss_fn, spec)

    @jax.jit
    def step_fn(params: Any, opt_state: Any, batch: Array) -> tuple[Any, Any, Array]:
        loss, grads = grad_fn(params, opt_state, batch)
        return *tx.update(grads, opt_state, params), loss

    params = on_mesh(base) if spread else base
    opt_state, position = tx.init(params), rl.follow.start(params, key=KEY)
    followers = [(base, position), (on_mesh(base), position)]
    equal, sent, losses = 0, 0, []
    spent = {"encode": 0.0, "apply": 0.0}
    for at in range(steps):
        batch = jax.random.normal(jax.random.key(at), (16, 32))
        updates, opt_state, loss = step_fn(params, opt_state, batch)
        jax.block_until_ready(updates)
        start = time.perf_counter()
        message = rl.follow.encode(
            params, updates, opt_state, position, numbers=numbers, digest_every=1
        )
        spent["encode"] += time.perf_counter() - start
        # A follower takes a message in only where its weights have the digests of it.
        followers = [rl.follow.apply(*at_one(one, message)) for one in followers]
        start = time.perf_counter()
        params, position = rl.follow.apply(params, message, position)
        jax.block_until_ready(params)
        spent["apply"] += time.perf_counter() - start
        equal += all(_same(params, one) for one, _ in followers)
        sent += len(message)
        losses.append(float(loss))
    place = "(4, 2)" if spread else "one device"
    return {
        "study": "steps",
        "method": f"{dtype}, {numbers}, {law}, trainer on {place}",
        "steps": steps,
        "links": int(opt_state.link) + 1,
        "equal": equal,
        "bytes_a_step": sent / steps,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(base)),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        **{f"{name}_ms": 1e3 * seconds / steps for name, seconds in spent.items()},
    }


def at_one(follower: tuple[Any, Any], message: bytes) -> tuple[Any, bytes, Any]:
    """The arguments of ``apply`` for a follower."""
    return follower[0], message, follower[1]


def _same(one: Any, other: Any) -> bool:
    return all(
        one[name].dtype == other[name].dtype
        and jax.device_get(one[name]).tobytes() == jax.device_get(other[name]).tobytes()
        for name in one
    )


def main() -> None:
    """Counts, runs, writes the rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a look, no rows")
    parser.add_argument("--out", default=rows.folder(__file__) / "followers.json")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    found = byte_rows()
    for row in found:
        print(json.dumps(row), flush=True)
    steps = 30 if options.quick else STEPS
    for dtype in ("float32", "bfloat16"):
        for numbers in ("float32", "int8"):
            for spread in (True, False):
                law = "block" if spread and numbers == "int8" else "orthonormal"
                row = run(dtype, numbers, spread, steps, law)
                print(json.dumps(row), flush=True)
                found.append(row)
    if not options.quick:
        settings = {"steps": STEPS, "link": LINK, "mesh": [4, 2], "seeds": [0]}
        program = "python -m benchmarks.pods.followers"
        rows.save(options.out, program, found, **settings)


if __name__ == "__main__":
    main()
