"""Which side to sketch: time and peak of every choice, beside LoRA.

A left sketch meets a layer's input and frees it; a right one meets the cotangent.

    python -m benchmarks.speed.sides [--quick]
"""

from __future__ import annotations

from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model

SIDES = ("left", "right", "smaller", "auto")


def all_models(quick: bool) -> list[Model]:
    """The decoder in three forms, a wide one, and the convolutional net."""
    if quick:
        return [models.decoder(**models.TINY)]
    return [
        models.decoder(),
        models.decoder(scan=True),
        models.decoder(scan=True, remat=True),
        models.decoder(width=1024),
        models.conv_net(),
    ]


def measure(model: Model, **times: int) -> list[dict]:
    """The floor, ours with every choice of side, LoRA."""
    sides = [rivals.ours(model, f"ours, {s}", side=s) for s in SIDES]
    methods = [rivals.floor(model), *sides, rivals.lora(model)]
    return timing.compare(model, methods, **times)


def main() -> None:
    """Measures every model, writes rows, prints the table."""
    options = timing.arguments(__doc__, __file__)
    times = {"rounds": 1, "runs": 1} if options.quick else {"rounds": 2, "runs": 5}
    results = [r for m in all_models(options.quick) for r in measure(m, **times)]
    timing.finish(options, "speed.sides", results, rank=rivals.RANK, dtype="float32")


if __name__ == "__main__":
    main()
