"""Table and figure of a comparison."""

from __future__ import annotations

import collections
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table


def print_table(rows: list[dict], title: str) -> None:
    """Prints one line per method: cost, tuned learning rate, accuracy, seconds."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for name in ("trained numbers", "optimizer bytes", "link", "learning rate"):
        table.add_column(name, justify="right")
    for name in ("accuracy, %", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['trained']:,}",
            f"{row['optimizer_bytes']:,}",
            str(row["link"] or "-"),
            f"{row['learning_rate']:g}",
            f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}",
            f"{row['seconds']:.2f}",
        )
    Console(width=max(Console().width, 110)).print(table)


def draw_figure(rows: list[dict], path: pathlib.Path, title: str) -> None:
    """Mean test accuracy against steps, one colour a method, a line style for each.

    Full fine-tuning and this library's RAC-LoRA carry their spread over the seeds.
    """
    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    colors: dict[str, str] = {"full fine-tuning": "black", "RAC-LoRA": "C3"}
    spare = iter(("C0", "C1", "C2", "C4", "C5"))
    styles = collections.defaultdict(lambda: iter(("-", "--", "-.", ":", (0, (1, 3)))))
    for row in rows:
        method = row["method"].partition(",")[0]
        color = colors.get(method) or colors.setdefault(method, next(spare))
        steps, curves = np.array(row["steps"]), np.array(row["curves"])
        mean, deviation = curves.mean(0), curves.std(0)
        leads = method in ("full fine-tuning", "RAC-LoRA")
        axes.plot(
            steps,
            mean,
            color=color,
            ls=next(styles[method]),
            lw=2.4 if leads else 1.3,
            label=row["method"],
        )
        if leads:
            axes.fill_between(
                steps, mean - deviation, mean + deviation, color=color, alpha=0.12, lw=0
            )
    axes.set(xlabel="steps", ylabel="test accuracy, %", title=title)
    best = max(row["accuracy_mean"] for row in rows)
    axes.set_ylim(best - 25, min(best + 1.5, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
