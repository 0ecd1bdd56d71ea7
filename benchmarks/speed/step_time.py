"""Whole training steps against the floor: models, options of ours, ranks.

Every number is a ratio within one interleaved run: see
``benchmarks.shared.timing.race``. The floor is the gradient of the activations alone,
which no method that trains through the network can undercut.

    python -m benchmarks.speed.step_time [--quick]
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method

RANKS = (4, 8, 16, 32, 64)
# What a spec may say beside the defaults; the two links show what a new one costs.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "side left": {"side": "left"},
    "side right": {"side": "right"},
    "rademacher": {"sketch": "rademacher"},
    "coordinate": {"sketch": "coordinate"},
    "gaussian_raw": {"sketch": "gaussian_raw"},
    "no cache": {"cache": False},
    "rest frozen": {"rest": "frozen"},
    "no new link": {"resample_every": 1_000_000},
    "a new link every step": {"resample_every": 1},
}


def all_models(quick: bool) -> list[Model]:
    """The models of the first study."""
    if quick:
        return [
            models.decoder(**models.TINY, scan=True, remat=True),
            models.conv_net(width=16, stages=1, side=16, samples=4),
            models.mlp(width=64, layers=2, samples=64),
        ]
    return [
        models.decoder(),
        models.decoder(scan=True),
        models.decoder(scan=True, remat=True),
        models.decoder(width=1024),
        models.conv_net(),
        models.encoder(),
        models.mlp(),
    ]


def all_methods(model: Model, more: bool) -> list[Method]:
    """The methods on one model, the floor first; ``more`` adds the slow ones."""
    makers: list[Callable[[Model], Method]] = [
        rivals.floor,
        rivals.adamw,
        rivals.ours,
        rivals.lora,
        rivals.qwix_lora,
    ]
    if more:
        makers += [
            lambda model: rivals.ours(model, "ours, left", side="left"),
            lambda model: rivals.lora(model, "rank last"),
            rivals.merged_lora,
            rivals.dense_form,
            rivals.galore,
        ]
    return [make(model) for make in makers]


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds what ours takes of each rival's time, from the ratios to the floor."""
    ours = next(row["over_floor"] for row in rows if row["method"] == "ours")
    return [row | {"ours_over_this": ours / row["over_floor"]} for row in rows]


def study_models(quick: bool, **times: int) -> list[dict]:
    """Every method on the first model, the fast ones on all."""
    results = []
    for index, model in enumerate(all_models(quick)):
        methods = all_methods(model, more=index == 0 and not quick)
        results += with_ratios(timing.compare(model, methods, **times))
    return results


def study_options(model: Model, quick: bool, **times: int) -> list[dict]:
    """Ours under the options of a spec."""
    names = [*OPTIONS][-1:] if quick else [*OPTIONS]
    entries = [rivals.ours(model, name, **OPTIONS[name]) for name in names]
    return timing.compare(model, [rivals.floor(model), *entries], **times)


def study_ranks(model: Model, quick: bool, **times: int) -> list[dict]:
    """Ours at growing rank: time and FLOPs over those of the smallest."""
    ranks = RANKS[:2] if quick else RANKS
    entries = [rivals.ours(model, f"rank {rank}", rank=rank) for rank in ranks]
    rows = timing.compare(model, [rivals.floor(model), *entries], **times)
    least = rows[1]
    return [
        row
        | {
            "time_over_least_rank": row["over_floor"] / least["over_floor"],
            "flops_over_least_rank": row["gflops"] / least["gflops"],
        }
        for row in rows
    ]


def draw(results: list[dict], path: pathlib.Path) -> None:
    """One panel per model: a bar per method, the floor as a line at 1."""
    names = list(dict.fromkeys(row["model"] for row in results))
    figure = Figure(figsize=(10, 2.2 * -(-len(names) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False, sharex=True).flat
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        rows = [r for r in results if r["model"] == name and r["method"] != "floor"]
        lengths = np.array([row["over_floor"] for row in rows])
        ends = np.array([row["over_floor_range"] for row in rows]).T
        colours = ["tab:red" if r["method"] == "ours" else "tab:gray" for r in rows]
        panel.barh(range(len(rows)), lengths, color=colours)
        spread = np.abs(ends - lengths)
        panel.errorbar(lengths, range(len(rows)), xerr=spread, fmt="none", color="black")
        panel.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=8)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("step / floor", fontsize=8)
    figure.savefig(path, dpi=100)


def run(options: argparse.Namespace) -> list[dict]:
    """All three studies; each row says which it belongs to."""
    times = {"rounds": 2, "runs": 1} if options.quick else {"rounds": 2, "runs": 5}
    model = models.decoder(**(models.TINY if options.quick else {}))
    studies = {
        "models": study_models(options.quick, **times),
        "options": study_options(model, options.quick, **times),
        "ranks": study_ranks(model, options.quick, **times),
    }
    return [{"study": name} | row for name, rows in studies.items() for row in rows]


def main() -> None:
    """Runs the studies, writes rows and a figure, prints the tables."""
    options = timing.arguments(__doc__, __file__)
    results = run(options)
    timing.finish(options, "speed.step_time", results, rank=rivals.RANK, dtype="float32")
    if options.out is not None:
        shown = [row for row in results if row["study"] == "models"]
        draw(shown, options.out / "step_time.png")


if __name__ == "__main__":
    main()
