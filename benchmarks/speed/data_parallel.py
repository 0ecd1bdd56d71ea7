"""What data parallelism sends and gradient accumulation holds, by rank.

Steps of the 512-wide decoder compiled for eight devices with replicated weights, each
with an eighth of the batch: MiB that the all-reduces of a step carry, over those of full
fine-tuning. And the same steps for one device with four micro-batches a step: MiB that
stay on the device between micro-batches, the compiled peak beside it. Nothing runs.

    python -m benchmarks.speed.data_parallel [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from benchmarks.shared import hlo, models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method
from benchmarks.speed import laws

DEVICES = 8
MICRO_BATCHES = 4
MIB = 2**20


def all_methods(model: Model, dim: int, every: int) -> Iterator[tuple[str, Method]]:
    """Full fine-tuning, LoRA, ours; their rules wait for ``every`` gradients."""

    def waiting(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        if every == 1:
            return rule
        return optax.MultiSteps(rule, every).gradient_transformation()

    adamw = waiting(optax.adamw(rivals.RATE))
    yield "full AdamW", rivals.trained_by("full AdamW", model, adamw)
    adam = waiting(optax.scale_by_adam())
    name = f"ours, rank {rivals.RANK}, Adam"
    yield name, rivals.ours(model, name, side="left", inner=adam)
    for fraction in laws.FRACTIONS:
        for law in ("orthonormal", "block"):
            name = f"{law}, dim / {fraction}, no moments"
            options = {"rank": dim // fraction, "sketch": law}
            rule = waiting(rl.orthogonal())
            yield name, laws.stateless(model, name, **options, inner=rule)


def traffic(model: Model, method: Method) -> dict[str, Any]:
    """Bytes of the collectives of one step on eight devices."""
    mesh = jax.make_mesh((DEVICES,), ("data",), (AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def on(shapes: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )

    state = jax.eval_shape(method.init, jax.random.key(0))
    batch = jax.eval_shape(model.batch, jax.random.key(0))
    out = jax.tree.map(lambda _: whole, jax.eval_shape(method.step, state, batch))
    step = jax.jit(method.step, donate_argnums=0, out_shardings=out)
    program = step.lower(on(state, whole), on(batch, rows)).compile().as_text()
    found = hlo.collective_bytes(program)
    return {f"{kind.replace('-', '_')}_mib": n / MIB for kind, n in found.items()}


def accumulation(model: Model, method: Method) -> dict[str, Any]:
    """Bytes that wait for the last micro-batch, and the peak of a micro-step."""
    compiled = timing.Compiled.of(method, model).row()
    state = jax.eval_shape(method.init, jax.random.key(0))
    waiting = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "acc_grads" in jax.tree_util.keystr(path)
    ]
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in waiting)
    return {"waiting_mib": held / MIB, "peak_mib": compiled["peak_mib"]}


def study(
    model: Model, dim: int, name: str, every: int, measure: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row per method."""
    for method, made in all_methods(model, dim, every):
        row = {"study": name, "model": model.name, "method": method}
        yield row | measure(model, made)


def main() -> None:
    """Compiles everything, writes rows, prints the table."""
    options = timing.arguments(__doc__, __file__)
    chex.set_n_cpu_devices(DEVICES)
    sizes, dim = (models.TINY, 64) if options.quick else ({}, 512)
    sizes = sizes | {"sequences": DEVICES}
    model = models.decoder(**sizes, scan=True, remat=True)
    rows = [
        *study(model, dim, "data parallel", 1, traffic),
        *study(model, dim, "accumulation", MICRO_BATCHES, accumulation),
    ]
    full = rows[0]["all_reduce_mib"]
    for row in rows:
        if "all_reduce_mib" in row:
            row["full_over_own"] = full / row["all_reduce_mib"]
    timing.finish(options, "speed.data_parallel", rows, devices=DEVICES, dtype="float32")


if __name__ == "__main__":
    main()
