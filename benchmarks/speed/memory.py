"""Compiled peak memory of every method, against the floor and its optimizer state.

Nothing runs: the compiler's buffer assignment has the numbers. ``above_mib`` is the peak
less that of the floor and the optimizer state, which no method of its kind can save.

    python -m benchmarks.speed.memory [--quick]
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

from matplotlib.figure import Figure

from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method

METHODS: list[Callable[[Model], Method]] = [
    rivals.floor,
    rivals.adamw,
    rivals.ours,
    functools.partial(rivals.ours, name="ours, left", side="left"),
    functools.partial(rivals.ours, name="ours, no cache", cache=False),
    rivals.dense_form,
    rivals.lora,
    rivals.merged_lora,
    rivals.qwix_lora,
    rivals.galore,
]


def all_models(quick: bool) -> list[Model]:
    """Decoders in their three forms, and one of every other kind."""
    sizes = models.TINY if quick else {}
    decoders = [
        models.decoder(**sizes, scan=scan, remat=remat)
        for scan, remat in ((False, False), (True, False), (True, True))
    ]
    if quick:
        return decoders[-1:]
    return [*decoders, models.conv_net(), models.encoder(), models.mlp()]


def measure(model: Model) -> list[dict]:
    """One row per method."""
    rows = [timing.Compiled.of(make(model), model).row() for make in METHODS]
    floor = rows[0]["peak_mib"]
    return [
        {"model": model.name}
        | row
        | {
            "over_floor": row["peak_mib"] / floor,
            "above_mib": row["peak_mib"] - floor - row["optimizer_mib"],
        }
        for row in rows
    ]


def draw(results: list[dict], path: pathlib.Path) -> None:
    """Peaks over the floor's, a group of bars per model."""
    names = list(dict.fromkeys(row["model"] for row in results))
    figure = Figure(figsize=(10, 4), layout="constrained")
    panel = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in results))
    height = 0.85 / len(methods)
    for place, method in enumerate(methods):
        rows = [row for row in results if row["method"] == method]
        at = [names.index(row["model"]) + place * height for row in rows]
        panel.bar(at, [row["over_floor"] for row in rows], height, label=method)
    panel.set_xticks([i + 0.4 for i in range(len(names))], names, fontsize=8)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_ylabel("compiled peak / floor")
    panel.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Compiles everything, writes rows and a figure, prints the table."""
    options = timing.arguments(__doc__, __file__)
    results = [row for model in all_models(options.quick) for row in measure(model)]
    timing.finish(options, "speed.memory", results, rank=rivals.RANK, dtype="float32")
    if options.out is not None:
        draw(results, options.out / "memory.png")


if __name__ == "__main__":
    main()
