"""Bounds measured, and the certificate put to the test.

``python -m benchmarks.rates``, or one of its studies after it: ``bounds``,
``estimators``, ``certificates``.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.rates import bounds, certificates, estimators
from benchmarks.rates.problems import PROBLEMS, least_squares
from benchmarks.shared import rows

STUDIES = ("bounds", "estimators", "certificates")


def draw_bounds(results: list[dict], path: pathlib.Path) -> None:
    """Gaps of least squares beside the bound, and ratios to the bound by lambda."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    gaps, ratios = figure.subplots(1, 2)
    problem = least_squares()
    drawn = [r for r in results if r["problem"] == problem.name and "relative_gaps" in r]
    for index, row in enumerate(drawn):
        links = np.arange(len(row["relative_gaps"]))
        colour = f"C{index}"
        gaps.plot(links, row["relative_gaps"], color=colour, label=f"rank {row['rank']}")
        factor = 1 - row["lam"] * problem.mu / problem.smoothness
        gaps.plot(links, factor**links, ":", color=colour)
    gaps.set(yscale="log", xlabel="links", ylabel="relative gap", ylim=(1e-6, 1.5))
    gaps.set_title("least squares, left sketches; dotted: bound")
    gaps.legend()
    own = [row for row in results if row["study"] == "bounds"]
    for index, name in enumerate(dict.fromkeys(row["problem"] for row in own)):
        points = [
            (row["lam"], row["nonconvex_over_bound"])
            for row in own
            if row["problem"] == name
        ]
        ratios.plot(*zip(*points, strict=True), ".", color=f"C{index}", label=name)
    ratios.axhline(1, color="black", linewidth=0.8)
    ratios.set(xlabel="lambda", ylabel="measured / bound", ylim=(0, 1.05))
    ratios.set_title("mean squared gradient, every law, side and rank")
    ratios.legend()
    figure.savefig(path, dpi=100)


def draw_estimators(curves: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Mean relative gaps of the long runs."""
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    panel = figure.subplots()
    for name, curve in curves.items():
        panel.plot(np.arange(len(curve)), curve, label=name)
    panel.set(yscale="log", xlabel="links", ylabel="relative gap")
    panel.set_title(f"Bernoulli sides, step {estimators.FLOOR_STEP:g} / L")
    panel.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs the studies, writes rows and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=STUDIES)
    parser.add_argument("--out", type=pathlib.Path, default=rows.folder(__file__))
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    def save(study: str, results: list[dict], **settings) -> None:
        command = f"python -m benchmarks.rates {study}"
        path = options.out / f"rates_{study}.json"
        shared = {"seeds": options.seeds, "dtype": "float64"} | settings
        rows.save(path, command, results, **shared)

    if "bounds" in options.studies:
        results: list[dict] = []
        for make in PROBLEMS:
            results += bounds.measure(make(), options.seeds)
            save("bounds", results, step="1 / L", links_times_lambda=bounds.LENGTH)
        draw_bounds(results, options.out / "rates_bounds.png")
    if "estimators" in options.studies:
        results, curves = estimators.measure(options.seeds)
        save("estimators", results, rank=estimators.RANK)
        draw_estimators(curves, options.out / "rates_estimators.png")
    if "certificates" in options.studies:
        save("certificates", certificates.measure(options.seeds), step="1 / L")
    for study in options.studies:
        record = json.loads((options.out / f"rates_{study}.json").read_text())
        for row in record["rows"]:
            print({name: v for name, v in row.items() if name != "relative_gaps"})


if __name__ == "__main__":
    main()
