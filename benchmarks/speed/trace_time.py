"""What a step costs before it runs: tracing, lowering and compiling, beside plain JAX.

Every repeat starts with JAX's caches empty, as a program does. The steps are whole:
gradient, optimizer, apply. Beside them the adapter form's gradient on 24 leaves without a
cache.

    python -m benchmarks.speed.trace_time [--quick]
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

import raclora_jax as rl
from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method

PARTS = ("trace_seconds", "lower_seconds", "compile_seconds")


def stateless(model: Model, make: Callable[..., Method], law: str) -> Method:
    """Rank an eighth of the width, the orthogonal rule and no state."""
    rank = 8 if model.name.startswith("conv") else 64
    options = {"side": "left", "alpha": "dim", "inner": rl.orthogonal()}
    return make(model, rank=rank, sketch=law, **options)


METHODS: dict[str, Callable[[Model], Method]] = {
    "full AdamW": rivals.adamw,
    "floor": rivals.floor,
    "LoRA": rivals.lora,
    "LoRA, merged": rivals.merged_lora,
    "qwix LoRA": rivals.qwix_lora,
    "ours": rivals.ours,
    **{
        f"ours, {law}": functools.partial(rivals.ours, sketch=law)
        for law in ("rademacher", "coordinate", "block")
    },
    "ours, no cache": functools.partial(rivals.ours, cache=False),
    "ours, fused": functools.partial(rivals.fused, inner=None),
    "block, dim / 8": functools.partial(stateless, make=rivals.ours, law="block"),
    "orthonormal, dim / 8": functools.partial(
        stateless, make=rivals.ours, law="orthonormal"
    ),
    "fused block, dim / 8": functools.partial(stateless, make=rivals.fused, law="block"),
}


def all_models(quick: bool) -> list[Model]:
    """The models of ``step_time``, and decoders of twelve layers."""
    if quick:
        return [models.decoder(**models.TINY)]
    return [
        models.decoder(),
        models.decoder(scan=True, remat=True),
        models.decoder(layers=12),
        models.decoder(layers=12, scan=True, remat=True),
        models.conv_net(),
        models.encoder(),
        models.mlp(),
    ]


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds of CPU: other processes do not count."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def staged(function: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    """Seconds to trace, lower and compile a function, and its size as lowered."""
    jax.clear_caches()
    step = jax.jit(function, **options)
    traced, tracing = clocked(lambda: step.trace(*args))
    lowered, lowering = clocked(traced.lower)
    _, compiling = clocked(lowered.compile)
    seconds = {
        "trace_seconds": tracing,
        "lower_seconds": lowering,
        "compile_seconds": compiling,
    }
    return seconds | {"lines": lowered.as_text().count("\n")}


def whole_step(model: Model, make: Callable[[Model], Method]) -> dict[str, Any]:
    """``staged`` of a method's step."""
    method = make(model)
    state = jax.eval_shape(method.init, jax.random.key(0))
    return staged(method.step, state, model.shapes()[1], donate_argnums=0)


def row(name: str, method: str, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """The least seconds of CPU of each part: what disturbs a run only adds to them."""
    least = {part: min(one[part] for one in repeats) for part in PARTS}
    return {
        "model": name,
        "method": method,
        **{part: round(seconds, 3) for part, seconds in least.items()},
        "lines": repeats[0]["lines"],
    }


def over_plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one model, with their ratios to full AdamW."""
    plain = next(one for one in rows if one["method"] == "full AdamW")

    def ratio(one: dict[str, Any], *parts: str) -> float:
        own, its = (sum(r[part] for part in parts) for r in (one, plain))
        return round(own / its, 3)

    return [
        one
        | {
            "staged_over_plain": ratio(one, *PARTS[:2]),
            "compile_over_plain": ratio(one, PARTS[2]),
        }
        for one in rows
    ]


def measure(model: Model, repeats: int) -> list[dict[str, Any]]:
    """A row per method, the repeats in turn."""
    spent: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, make in METHODS.items():
            spent[name].append(whole_step(model, make))
    return over_plain([row(model.name, name, found) for name, found in spent.items()])


def adapter_without_cache(leaves: int) -> dict[str, Any]:
    """``staged`` of the adapter form's loss and gradient on a stack of layers."""
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
    step = jax.value_and_grad(rl.adapted(loss, spec))
    return staged(step, factors, params, chain, x)


def main() -> None:
    """Measures every model, writes rows, prints the table."""
    options = timing.arguments(__doc__, __file__)
    repeats = 1 if options.quick else 2
    leaves = 4 if options.quick else 24
    results: list[dict[str, Any]] = []
    for model in all_models(options.quick):
        results += measure(model, repeats)
        # After every model: a run cut short keeps what it has.
        timing.finish(options, "speed.trace_time", results, rank=rivals.RANK)
    adapters = [adapter_without_cache(leaves) for _ in range(repeats)]
    results.append(row(f"adapter, {leaves} leaves", "ours", adapters))
    timing.finish(options, "speed.trace_time", results, rank=rivals.RANK)


if __name__ == "__main__":
    main()
