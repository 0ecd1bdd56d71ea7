"""What the federated study found: the tuned runs by rule, and their figure."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.figure import Figure


def finals(rows: list[dict]) -> dict[tuple[int, str, str], list[dict]]:
    """The tuned runs, seed by seed, by (clients, start, rule)."""
    cells: dict[tuple[int, str, str], list[dict]] = {}
    for row in rows:
        if row["judged"] == "test":
            cell = row["clients"], row["start"], row["rule"]
            cells.setdefault(cell, []).append(row)
    return cells


def draw(path: pathlib.Path, rows: list[dict]) -> None:
    """Accuracy against bytes up, a panel for each number of clients and start."""
    cells = finals(rows)
    panels = list(dict.fromkeys(cell[:2] for cell in cells))
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for (*where, rule), own in cells.items():
            if tuple(where) == panel:
                curves = np.array([row["curve"] for row in own])
                sent, right = curves.mean(axis=0).T
                axis.plot(sent / 2**20, 100 * right, "o-", markersize=3, label=rule)
        axis.set(title=f"{panel[0]} clients, {panel[1]}", xlabel="MiB up, per client")
        axis.set_xscale("log")
    axes[0].set_ylabel("test accuracy, %")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
