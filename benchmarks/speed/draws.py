"""What a new link costs: seconds to compile the draw of its sketches, and to draw them.

python -m benchmarks.speed.draws [--quick]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import raclora_jax as rl
from benchmarks.shared import rivals, timing
from benchmarks.shared.models import Model
from benchmarks.speed.trace_time import all_models, staged

LAWS: dict[str, dict[str, Any]] = {
    "orthonormal, rank 8": {},
    "orthonormal, rank 8, left": {"side": "left"},
    "orthonormal, rank 64": {"rank": 64, "side": "left"},
    "block, rank 64": {"rank": 64, "side": "left", "sketch": "block"},
    "coordinate, rank 64": {"rank": 64, "side": "left", "sketch": "coordinate"},
    "rademacher, rank 8": {"sketch": "rademacher"},
}


def measure(model: Model, name: str, repeats: int) -> dict[str, Any]:
    """The row of a law on a model."""
    params, _ = model.shapes()
    spec = rivals.spec_of(model, **LAWS[name])

    def draw(key: Any, link: Any) -> Any:
        return rl.sample_sketch(params, spec, key=key, link=link)

    key, link = jax.random.key(0), jnp.zeros((), jnp.int32)
    seconds = min(staged(draw, key, link)["compile_seconds"] for _ in range(repeats))
    run = jax.jit(draw).lower(key, link).compile()
    spent = []
    for _ in range(5 * repeats):
        begun = time.perf_counter()
        jax.block_until_ready(run(key, link))
        spent.append(1e3 * (time.perf_counter() - begun))
    return {
        "model": model.name,
        "law": name,
        "compile_seconds": round(seconds, 3),
        "milliseconds": round(statistics.median(spent), 2),
    }


def main() -> None:
    """Measures every law on every model, writes rows, prints the table."""
    options = timing.arguments(__doc__, __file__)
    repeats = 1 if options.quick else 3
    rows = [
        measure(model, law, repeats)
        for model in all_models(options.quick)
        for law in LAWS
        if "64" not in law or model.name.startswith("decoder")
    ]
    timing.finish(options, "speed.draws", rows)


if __name__ == "__main__":
    main()
