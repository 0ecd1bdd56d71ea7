"""What rank costs: sketches that are arrays against blocks, without optimizer state.

Whole steps with ``inner=orthogonal()`` and a left sketch at fractions of the width, a new
sketch every 25 steps or every step, over the floor of ``step_time``;
with them the compiled peak and the bytes of optimizer state.

    python -m benchmarks.speed.laws [--quick]
"""

from __future__ import annotations

from typing import Any

import raclora_jax as rl
from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method

FRACTIONS = (16, 8, 4)


def all_models(quick: bool) -> list[tuple[Model, int]]:
    """The models, and the size of the side that their ranks are fractions of."""
    if quick:
        return [(models.decoder(**models.TINY, scan=True, remat=True), 64)]
    return [
        (models.decoder(), 512),
        (models.decoder(scan=True, remat=True), 512),
        (models.decoder(width=1024), 1024),
        (models.encoder(), 512),
        (models.conv_net(), 9 * 64),
        (models.mlp(), 1024),
    ]


def stateless(model: Model, name: str, **options: Any) -> Method:
    """Ours with the orthogonalised step on the rows."""
    options = {"side": "left", "inner": rl.orthogonal(), "alpha": "dim"} | options
    return rivals.ours(model, name, **options)


def all_methods(model: Model, dim: int) -> list[Method]:
    """The floor, its rivals, and each law at each rank."""
    methods = [rivals.floor(model), rivals.adamw(model), rivals.lora(model)]
    for fraction in FRACTIONS:
        rank = dim // fraction
        for law in ("orthonormal", "block"):
            name = f"{law}, dim / {fraction}"
            methods.append(stateless(model, name, rank=rank, sketch=law))
        name = f"block, dim / {fraction}, a new one every step"
        every = {"sketch": "block", "resample_every": 1}
        methods.append(stateless(model, name, rank=rank, **every))
    half = {"rank": dim // 2, "sketch": "block"}
    return [*methods, stateless(model, "block, dim / 2", **half)]


def main() -> None:
    """Measures every model, writes rows, prints the table."""
    options = timing.arguments(__doc__, __file__)
    times = {"rounds": 2, "runs": 1} if options.quick else {"rounds": 2, "runs": 5}
    results = []
    for model, dim in all_models(options.quick):
        rows = timing.compare(model, all_methods(model, dim), **times)
        floor = rows[0]["peak_mib"]
        results += [row | {"peak_over_floor": row["peak_mib"] / floor} for row in rows]
        # After every model: a run cut short keeps what it has.
        timing.finish(options, "speed.laws", results, dtype="float32")


if __name__ == "__main__":
    main()
