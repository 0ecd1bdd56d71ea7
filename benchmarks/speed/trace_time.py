"""What a step costs before it runs: tracing and lowering, beside plain JAX.

Every repeat builds its functions anew, so no cache of traced functions answers. The
steps are whole: gradient, optimizer, apply. Two programs are compiled too: the step of
the 4-layer decoder, and the adapter form's gradient on 24 leaves without a cache.

    python -m benchmarks.speed.trace_time [--quick]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import raclora_jax as rl
from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method

METHODS: dict[str, Callable[[Model], Method]] = {
    "full AdamW": rivals.adamw,
    "ours": rivals.ours,
    "LoRA": rivals.lora,
    "qwix LoRA": rivals.qwix_lora,
}


def all_models(quick: bool) -> list[Model]:
    """Decoders of two depths in two forms, and the nnx encoder."""
    sizes = models.TINY if quick else {"layers": 12}
    shallow = [] if quick else [models.decoder(), models.decoder(scan=True, remat=True)]
    return [
        *shallow,
        models.decoder(**sizes),
        models.decoder(**sizes, scan=True, remat=True),
        models.encoder(**sizes),
    ]


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds of CPU: other processes do not count."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def once(model: Model, make: Callable[[Model], Method]) -> tuple[float, float, float]:
    """Seconds to build, trace and lower one new step."""
    method, building = clocked(lambda: make(model))
    state = jax.eval_shape(method.init, jax.random.key(0))
    _, batch = model.shapes()
    step = jax.jit(method.step, donate_argnums=0)
    traced, tracing = clocked(lambda: step.trace(state, batch))
    _, lowering = clocked(traced.lower)
    return building, tracing, lowering


def measure(model: Model, repeats: int) -> list[dict]:
    """Medians per method, the first repeat, which fills JAX's own caches, left out."""
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in METHODS}
    for _ in range(repeats + 1):
        for name, make in METHODS.items():
            spent[name].append(once(model, make))
    middle = {name: np.median(times[1:], axis=0) for name, times in spent.items()}
    plain = middle["full AdamW"]
    return [
        {
            "model": model.name,
            "method": name,
            "build_seconds": float(seconds[0]),
            "trace_seconds": float(seconds[1]),
            "lower_seconds": float(seconds[2]),
            "trace_over_plain": float(seconds[1] / plain[1]),
            "lower_over_plain": float(seconds[2] / plain[2]),
            "both_over_plain": float(sum(seconds[1:]) / sum(plain[1:])),
        }
        for name, seconds in middle.items()
    ]


def adapter_without_cache(leaves: int) -> Any:
    """The adapter form's loss and gradient on a stack of layers, lowered."""
    spec = rl.Spec(rivals.RANK, cache=False)
    params = {
        f"layer_{i:02}": jax.ShapeDtypeStruct((256, 256), "float32")
        for i in range(leaves)
    }
    x = jax.ShapeDtypeStruct((64, 256), "float32")

    def loss(params: Any, x: Any) -> Any:
        for kernel in params.values():
            x = jax.nn.gelu(x @ kernel)
        return jax.numpy.mean(x**2)

    factors, chain = jax.eval_shape(lambda p: rl.init_adapter(p, spec, key=0), params)
    step = jax.jit(jax.value_and_grad(rl.adapted(loss, spec)))
    return step.lower(factors, params, chain, x)


def decoder_step(quick: bool) -> Any:
    """The whole step of the 4-layer decoder, lowered."""
    model = models.decoder(**(models.TINY if quick else {}))
    method = rivals.ours(model)
    state = jax.eval_shape(method.init, jax.random.key(0))
    return jax.jit(method.step, donate_argnums=0).lower(state, model.shapes()[1])


def compiled(name: str, lower: Callable[[], Any]) -> dict:
    """CPU seconds to lower and to compile one program, and its lines as lowered."""
    lowered, lowering = clocked(lower)
    _, compiling = clocked(lowered.compile)
    return {
        "model": name,
        "method": "ours",
        "lower_seconds": lowering,
        "compile_seconds": compiling,
        "lines": lowered.as_text().count("\n"),
    }


def main() -> None:
    """Measures every model, writes rows, prints the table."""
    options = timing.arguments(__doc__, __file__)
    repeats = 1 if options.quick else 7
    results = [r for m in all_models(options.quick) for r in measure(m, repeats)]
    leaves = 4 if options.quick else 24
    results += [
        compiled("decoder step", lambda: decoder_step(options.quick)),
        compiled(f"adapter, {leaves} leaves", lambda: adapter_without_cache(leaves)),
    ]
    timing.finish(options, "speed.trace_time", results, repeats=repeats, rank=rivals.RANK)


if __name__ == "__main__":
    main()
