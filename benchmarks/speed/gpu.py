"""A Llama of 1.1 billion bfloat16 weights on one accelerator, against every rival.

Steps on 8 x 2048 tokens with and without rematerialisation; then the deepest such model
that each method could train on the card, by the compiler's count of memory. LoRA by
PEFT is measured beside them where PyTorch, transformers and peft are installed.

Every study writes its own rows as soon as it is done: a card is often lent for minutes.

    python -m benchmarks.speed.gpu [--quick]
        [--studies peft,steps,steps_remat,parts,deepest]
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

import raclora_jax as rl
from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method
from benchmarks.shared.timing import Compiled

SIZES = {
    "width": 2048,
    "layers": 22,
    "heads": 32,
    "kv_heads": 4,
    "hidden": 5632,
    "vocab": 32_000,
    "sequences": 8,
    "length": 2048,
}
TINY = {
    "width": 64,
    "layers": 1,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 96,
    "vocab": 256,
    "sequences": 2,
    "length": 32,
}
Maker = Callable[[Model], Method]
# A CPU has no limit of its own: the quick run pretends one.
PRETENDED_LIMIT = 4 * timing.MIB
FILLED = 0.95  # of the card's memory, by the compiler's count


def all_methods(width: int) -> list[Maker]:
    """Ours and its rivals; the stateless step on blocks is ranked by the width."""
    stateless = {
        "side": "left",
        "sketch": "block",
        "alpha": "dim",
        "inner": rl.orthogonal(),
    }
    blocks: list[Maker] = [
        functools.partial(
            rivals.ours, name=f"block, dim / {part}", rank=width // part, **stateless
        )
        for part in (8, 4)
    ]
    return [
        rivals.floor,
        rivals.adamw,
        rivals.ours,
        functools.partial(rivals.ours, name="ours, left", side="left"),
        *blocks,
        rivals.lora,
        functools.partial(rivals.lora, layout="rank last"),
        rivals.qwix_lora,
    ]


def llama(sizes: dict[str, int], *, remat: bool) -> Model:
    """The model, with the fused attention of the device."""
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return models.llama(**sizes, scan=True, remat=remat, attention=attention)


def memory_limit() -> int:
    """Bytes the device lets JAX use."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", PRETENDED_LIMIT)


def study_steps(model: Model, makers: list[Maker], **times: int) -> list[dict]:
    """Every method that fits beside the states of the others, in one race."""
    entries = []
    for make in makers:
        entries.append(Compiled.of(make(model), model))
        print(entries[-1].method.name, entries[-1].row(), flush=True)
    held = sum(entry.held for entry in entries)
    limit = memory_limit() if jax.default_backend() != "cpu" else float("inf")
    fit = [entry for entry in entries if held - entry.held + entry.peak <= limit]
    raced = timing.race(model, fit, **times)
    unfit = [entry.row() | {"fits": False} for entry in entries if entry not in fit]
    return [{"model": model.name} | row for row in [*raced, *unfit]]


def study_peft(sizes: dict[str, Any], steps: int, *, remat: bool) -> list[dict]:
    """The rows of ``benchmarks.speed.peft_lora``; none where PyTorch is not installed."""
    wanted = {**sizes, "remat": remat, "rank": rivals.RANK, "steps": steps}
    command = [sys.executable, "-m", "benchmarks.speed.peft_lora", json.dumps(wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"method": "PEFT LoRA", "error": f"exit status {done.returncode}"}]
    name = f"llama {sizes['layers']}x{sizes['width']}" + ", remat" * remat
    return [{"model": name} | row for row in json.loads(done.stdout)]


def deepest(make: Maker, sizes: dict[str, int], limit: int) -> dict:
    """The most layers whose compiled step fits, with remat.

    The peak of a scanned model grows by the same for every layer: two compilations give
    the line, and the answer is compiled to confirm it.
    """

    def compiled(layers: int) -> Compiled:
        model = llama({**sizes, "layers": layers}, remat=True)
        return Compiled.of(make(model), model)

    few, many = 2 * sizes["layers"], 4 * sizes["layers"]  # XLA unrolls a loop of one
    first, second = compiled(few), compiled(many)
    slope = (second.peak - first.peak) / (many - few)
    layers = max(1, int(few + (limit - first.peak) / slope))
    entry = compiled(layers)
    while entry.peak > limit and layers > 1:
        layers = max(1, layers - math.ceil((entry.peak - limit) / slope))
        entry = compiled(layers)
    shapes, _ = llama({**sizes, "layers": layers}, remat=True).shapes()
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    size = {
        "layers": layers,
        "billion_weights": count / 1e9,
        "limit_mib": limit / timing.MIB,
    }
    return entry.row() | size


def parts(model: Model, **options: Any) -> list[Method]:
    """Our step, cut after the gradient and after the update: what each part costs."""
    whole = rivals.ours(model, **options)
    spec = rivals.spec_of(model, **options)
    grad_fn = rl.value_and_grad(model.loss, spec)
    tx = rl.raclora(rivals.RATE, spec, key=0)

    def to_gradient(state: Any, batch: models.Batch) -> Any:
        params, opt_state = state
        loss, grads = grad_fn(params, opt_state, batch)
        return (params, opt_state), (loss, grads)

    def to_update(state: Any, batch: models.Batch) -> Any:
        (params, opt_state), (loss, grads) = to_gradient(state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (params, opt_state), (loss, updates)

    def init(key: Any) -> Any:
        params = model.init(key)
        return params, tx.init(params)

    return [
        rivals.floor(model),
        Method("gradient", init, to_gradient),
        Method("gradient, update", init, to_update),
        whole._replace(name="gradient, update, apply"),
    ]


def main() -> None:
    """Runs the studies, PyTorch first, and writes the rows of each."""
    parser = timing.parser(__doc__)
    parser.add_argument("--studies", default="peft,steps,steps_remat,parts,deepest")
    options = timing.parse(parser, __file__)
    quick = options.quick
    sizes = TINY if quick else SIZES
    times = {"rounds": 2, "runs": 1} if quick else {"rounds": 5, "runs": 5}
    remats = (True,) if quick else (True, False)
    makers = all_methods(sizes["width"])

    def peft() -> list[dict]:
        count = times["rounds"] * times["runs"]
        return [row for remat in remats for row in study_peft(sizes, count, remat=remat)]

    def parts_of_a_step() -> list[dict]:
        model = llama(sizes, remat=True)
        return timing.compare(model, parts(model, side="left"), **times)

    studies = {
        "peft": peft,
        "steps": lambda: study_steps(llama(sizes, remat=False), makers, **times),
        "steps_remat": lambda: study_steps(llama(sizes, remat=True), makers, **times),
        "parts": parts_of_a_step,
        "deepest": lambda: [
            deepest(make, sizes, int(FILLED * memory_limit())) for make in makers
        ],
    }
    for name in options.studies.split(","):
        results = studies[name]()
        settings = {"sizes": sizes, "dtype": "bfloat16", **times}
        timing.finish(options, "speed.gpu", results, name=f"gpu_{name}", **settings)


if __name__ == "__main__":
    main()
