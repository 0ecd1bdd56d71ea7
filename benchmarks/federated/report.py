"""What the federated study found: the tuned runs by rule, and their figure."""

from __future__ import annotations

import pathlib
import statistics

import numpy as np
from matplotlib.figure import Figure

from benchmarks.shared import rows as result_rows


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


def table(name: str) -> str:
    """Every rule at its best setting, by number of clients and start."""
    rows = result_rows.read(f"federated/{name}")
    lines = [
        "| clients | start | rule | rank | local steps | local rate | rounds "
        "| KiB up, per client | KiB down | test accuracy, % |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (clients, start, rule), own in finals(rows).items():
        if len(own) < 3:
            continue
        right = [100 * row["accuracy"] for row in own]
        row = own[0]
        cells = (
            str(clients),
            start,
            rule,
            "-" if rule.startswith("FedAvg") else str(row["rank"]),
            str(row["steps"]),
            f"{row['rate']:g}",
            str(row["exchanges"]),
            f"{row['bytes_up'] / 1024:,.0f}",
            f"{row['bytes_down'] / 1024:,.0f}",
            f"{statistics.mean(right):.2f} ± {statistics.stdev(right):.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
