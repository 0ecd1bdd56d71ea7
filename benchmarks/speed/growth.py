"""How time and FLOPs of a step grow with width, depth, tokens and rank.

An unscanned decoder, so that the compiler counts every layer; one size varies at a
time. Rows hold the floor, ours and two-factor LoRA at each size.

    python -m benchmarks.speed.growth [--quick]
"""

from __future__ import annotations

import pathlib
from typing import Any

from matplotlib.figure import Figure

from benchmarks.shared import models, rivals, timing

SMALL = {"width": 256, "layers": 2, "vocab": 1024, "sequences": 4, "length": 128}
TINY = {"width": 64, "layers": 1, "vocab": 128, "sequences": 2, "length": 16}
SIZES: dict[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024),
    "layers": (1, 2, 4, 8),
    "sequences": (1, 2, 4, 8, 16),
    "rank": (4, 8, 16, 32, 64),
}


def measure(axis: str, size: int, base: dict[str, int], **times: int) -> list[dict]:
    """The methods at one point: the base with one size replaced."""
    sizes = base if axis == "rank" else base | {axis: size}
    rank = size if axis == "rank" else rivals.RANK
    model = models.decoder(**sizes)
    methods = [
        rivals.floor(model),
        rivals.ours(model, rank=rank),
        rivals.lora(model, rank=rank),
    ]
    rows = timing.compare(model, methods, **times)
    shared: dict[str, Any] = {"axis": axis, "size": size}
    return [
        shared | row | {"flops_over_floor": row["gflops"] / rows[0]["gflops"]}
        for row in rows
    ]


def draw(results: list[dict], path: pathlib.Path) -> None:
    """Time over the floor's against each size; FLOPs over the floor's, dotted."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = list(dict.fromkeys(row["axis"] for row in results))
    for panel, axis in zip(figure.subplots(1, len(axes), sharey=True), axes, strict=True):
        for method in dict.fromkeys(row["method"] for row in results):
            rows = [r for r in results if (r["axis"], r["method"]) == (axis, method)]
            sizes = [row["size"] for row in rows]
            (line,) = panel.plot(sizes, [r["over_floor"] for r in rows], "o-")
            line.set_label(method)
            flops = [row["flops_over_floor"] for row in rows]
            panel.plot(sizes, flops, ":", color=line.get_color())
        panel.set_xscale("log", base=2)
        panel.set_xlabel(axis)
        panel.grid(alpha=0.25)
    panel.legend(fontsize=8)
    figure.axes[0].set_ylabel("time (dotted: FLOPs) / floor")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measures every point, writes rows and a figure, prints the table."""
    options = timing.arguments(__doc__, __file__)
    times = {"rounds": 2, "runs": 1} if options.quick else {"rounds": 5, "runs": 3}
    base = TINY if options.quick else SMALL
    results = []
    for axis, sizes in SIZES.items():
        for size in sizes[:1] if options.quick else sizes:
            results += measure(axis, size, base, **times)
    timing.finish(options, "speed.growth", results, base=base, dtype="float32")
    if options.out is not None:
        draw(results, options.out / "growth.png")


if __name__ == "__main__":
    main()
