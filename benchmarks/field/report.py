"""Tables and figure of the field, from its rows."""

from __future__ import annotations

import math
import pathlib
import statistics
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from benchmarks.field.entries import ENTRIES
from benchmarks.shared import rows as result_rows

STUDIES = ("equal steps", "equal bytes", "equal time")
LANGUAGE = "language model"
SOLVED = 1e-9  # a relative gap below is rounding, and the same for all
COLOURS = {
    "full": "black",
    "pairs": "tab:blue",
    "projected": "tab:green",
    "some layers": "tab:orange",
    "RAC-LoRA": "tab:red",
}

FAMILIES = {entry.name: entry.family for entry in ENTRIES}

Row = dict[str, Any]


def read() -> list[Row]:
    """All rows."""
    rows: list[Row] = result_rows.read("field/field")
    return rows


def of_study(rows: list[Row], task: str, study: str) -> dict[str, Row]:
    """The rows of one study of one task, by method."""
    wanted = f"{task}, {study}"
    return {row["method"]: row for row in rows if row["study"] == wanted}


def tasks_of(rows: list[Row], study: str) -> list[str]:
    """The tasks that a study has."""
    found = [row["task"] for row in rows if row["study"].endswith(study)]
    return list(dict.fromkeys(found))


# Ranking -----------------------------------------------------------------------------


def places(rows: list[Row], task: str, study: str) -> dict[str, float]:
    """The place of each method on one task, 0 for the first and 1 for the last.

    Places of each seed, ties shared, in the mean; a run that was lost counts as last.
    """
    found = of_study(rows, task, study)
    table = np.array([row["loss"] for row in found.values()], float)
    table = np.maximum(np.where(np.isfinite(table), table, np.inf), SOLVED)
    ranks = scipy.stats.rankdata(table, axis=0).mean(1)
    return dict(zip(found, (ranks - 1) / max(len(found) - 1, 1), strict=True))


def ranking() -> str:
    """Mean place over the tasks of each study, and its spread."""
    rows = read()
    means: dict[str, dict[str, tuple[float, float, int]]] = {}
    for study in STUDIES:
        every: dict[str, list[float]] = {}
        for task in tasks_of(rows, study):
            for method, place in places(rows, task, study).items():
                every.setdefault(method, []).append(place)
        means[study] = {
            method: (statistics.mean(all_), statistics.pstdev(all_), len(all_))
            for method, all_ in every.items()
        }
    counts = {
        study: max((n for *_, n in own.values()), default=0)
        for study, own in means.items()
    }
    heads = [f"{study}, {counts[study]} tasks" for study in STUDIES]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" + "|---:" * 3 + "|"]
    order = sorted(means["equal steps"].items(), key=lambda item: item[1][0])
    for method, _ in order:
        cells = [
            _place(study, means[study].get(method), counts[study]) for study in STUDIES
        ]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def _place(study: str, found: tuple[float, float, int] | None, count: int) -> str:
    if found is None:
        return "does not fit" if study == "equal bytes" else "not raced"
    mean, spread, own = found
    return f"{mean:.2f} ± {spread:.2f}" + (f" ({own})" if own < count else "")


# Tables ------------------------------------------------------------------------------


def steps() -> str:
    """Every task at equal steps and one rank: those of networks, then the small ones."""
    rows = read()
    tasks = tasks_of(rows, "equal steps")
    networks = [task for task in tasks if task in _NETWORKS]
    return "\n\n".join(
        _steps(rows, kept)
        for kept in (networks, [task for task in tasks if task not in networks])
        if kept
    )


_NETWORKS = (LANGUAGE, "MNIST 5-9", "conv net")


def _steps(rows: list[Row], tasks: list[str]) -> str:
    by_task = {task: of_study(rows, task, "equal steps") for task in tasks}
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = ["| method | " + " | ".join(tasks) + " |"]
    lines.append("|---" + "|---:" * len(tasks) + "|")
    for method in methods:
        cells = [_number(by_task[task].get(method)) for task in tasks]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def one_task(task: str) -> str:
    """One task in all three studies, the best in equal time first."""
    rows = read()
    by_study = {s: of_study(rows, task, s) for s in (*STUDIES, "time")}
    lines = [
        "| method | rank, optimizer bytes | equal steps | rank, bytes within the budget "
        "| equal bytes | steps x ms in equal time | equal time |",
        "|---" + "|---:" * 6 + "|",
    ]

    def key(method: str) -> float:
        row = by_study["equal time"].get(method) or by_study["equal steps"][method]
        return float(row["loss_mean"])

    for method in sorted(by_study["equal steps"], key=key):
        step, fit, clock, end = (
            by_study[s].get(method)
            for s in ("equal steps", "equal bytes", "time", "equal time")
        )
        timed = f"{end['steps']:,} x {clock['milliseconds']:.2f}" if clock and end else ""
        cells = [
            method,
            _size(step),
            _number(step),
            _size(fit) if fit else "does not fit",
            _number(fit),
            timed,
            _number(end),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(row: Row) -> str:
    rank = "" if row["rank"] is None else f"{row['rank']}: "
    return f"{rank}{row['optimizer_bytes']:,}"


def ahead() -> str:
    """The first of each kind of method and of ours, task by task."""
    rows = read()
    groups = (("full",), ("projected", "some layers"), ("pairs",), ("RAC-LoRA",))
    lines = [
        "| task | study | first of RAC-LoRA | | over the first in full "
        "| over the first of full gradients and a small state | over the first pair |",
        "|---|---|---|---:|---|---|---|",
    ]
    for study in STUDIES:
        for task in tasks_of(rows, study):
            found = of_study(rows, task, study).values()
            parts = [[r for r in found if FAMILIES[r["method"]] in g] for g in groups]
            if not all(parts):  # a run of some methods only
                continue
            first = [min(part, key=lambda row: row["loss_mean"]) for part in parts]
            *others, own = first
            cells = [task, study, own["method"], _number(own)]
            cells += [f"{_over(own, other)}, {other['method']}" for other in others]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _over(ours: Row, theirs: Row) -> str:
    """The difference of two rows of the same data; solved tasks have none to speak of."""
    gaps = [a - b for a, b in zip(ours["loss"], theirs["loss"], strict=True)]
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps)
    if max(abs(mean), spread) < 0.001:
        return f"{mean:+.1e}"
    return f"{mean:+.3f} ± {spread:.3f}"


def _number(row: Row | None) -> str:
    if row is None:
        return ""
    if not math.isfinite(row["loss_mean"]):
        return "lost"
    mean, spread = row["loss_mean"], row["loss_std"] or 0.0
    if mean < 0.01:
        return "solved" if mean < SOLVED else f"{mean:.1e}"
    return f"{mean:.3f} ± {spread:.3f}"


# NTK ---------------------------------------------------------------------------------


def ntk() -> str:
    """Where LoRA of each rank ends in the linearised network."""
    record = result_rows.record("rates/ntk")
    rows = [row for row in record["rows"] if row["study"] == "LoRA"]
    limit = record["settings"]["ended_below"]
    lines = [
        "| rank | reach the optimum of full fine-tuning | local minima above it "
        "| of these, above the best of their rank | excess, least and most |",
        "|---:|---:|---:|---:|---:|",
    ]
    for rank in sorted({row["rank"] for row in rows}):
        own = [row for row in rows if row["rank"] == rank]
        ends = [max(row["excess"], 0.0) for row in own]
        best: dict[int, float] = {}
        for row in own:
            best[row["data"]] = min(row["excess"], best.get(row["data"], math.inf))
        minima = [row for row in own if row["excess"] > limit and _settled(row)]
        worse = [row for row in minima if row["excess"] > 1.001 * best[row["data"]]]
        reached = sum(end <= limit for end in ends)
        lines.append(
            f"| {rank} | {reached} of {len(own)} | {len(minima)} | {len(worse)} "
            f"| {min(ends):.1e}, {max(ends):.1e} |"
        )
    return "\n".join(lines)


def _settled(row: Row) -> bool:
    """Whether the gradient is zero and no curvature negative, but for rounding."""
    return bool(row["gradient"] < 1e-6 and row["lowest_curvature"] > -1e-6)


def ntk_full() -> str:
    """The rank of full fine-tuning's solution beside its bound."""
    rows = result_rows.read("rates/ntk")
    full = [row for row in rows if row["study"] == "full"]
    lines = [
        "| examples | rank of the solution, each seed | bound | lazy check, mean |",
        "|---:|---:|---:|---:|",
    ]
    for examples in sorted({row["examples"] for row in full}):
        own = [row for row in full if row["examples"] == examples]
        ranks = ", ".join(str(row["rank"]) for row in own)
        lazy = statistics.mean(row["lazy"] for row in own)
        lines.append(f"| {examples} | {ranks} | {own[0]['bound']} | {lazy:.2f} |")
    return "\n".join(lines)


def ntk_chain() -> str:
    """Links of a chain by its rank, beside d / r times full descent."""
    rows = result_rows.read("rates/ntk")
    chain = [row for row in rows if row["study"] == "chain"]
    (whole,) = (row["links"][0] for row in chain if row["rank"] is None)
    lines = [
        "| rank | lambda | links, mean | d / r times full |",
        "|---:|---:|---:|---:|",
    ]
    lines.append(f"| full | 1 | {whole:,} | {whole:,} |")
    for row in chain:
        if row["rank"] is not None:
            mean = statistics.mean(row["links"])
            told = whole / row["lambda"]
            lines.append(
                f"| {row['rank']} | {row['lambda']:.3f} | {mean:,.0f} | {told:,.0f} |"
            )
    return "\n".join(lines)


# Figure ------------------------------------------------------------------------------


def draw(path: pathlib.Path, rows: list[Row]) -> None:
    """The language model: loss against optimizer bytes and against time."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    times = of_study(rows, LANGUAGE, "time")
    fits = of_study(rows, LANGUAGE, "equal bytes")
    for study, marker in (("equal steps", "o"), ("equal bytes", "s")):
        for method, row in of_study(rows, LANGUAGE, study).items():
            point = max(row["optimizer_bytes"], 1), row["loss_mean"]
            _mark(panels[0], point, method, marker)
            # Steps were timed at the rank of equal bytes, where one fits.
            timed = study == "equal bytes" or method not in fits
            if timed and method in times:
                spent = times[method]["milliseconds"] * row["steps"] / 1e3
                _mark(panels[1], (spent, row["loss_mean"]), method, marker)
    for method, row in of_study(rows, LANGUAGE, "equal time").items():
        spent = times[method]["milliseconds"] * row["steps"] / 1e3
        _mark(panels[1], (spent, row["loss_mean"]), method, "^")
    panels[0].set(xscale="symlog", xlabel="optimizer bytes")
    panels[1].set(xlabel="seconds of one core")
    panels[0].set_ylabel("validation loss")
    panels[0].set_title("circles: one rank; squares: the bytes of LoRA or less")
    panels[1].set_title("squares: equal steps; triangles: equal time")
    for panel in panels:
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=100)


def _mark(panel: Any, point: tuple[float, float], method: str, marker: str) -> None:
    colour = COLOURS[FAMILIES[method]]
    panel.plot(*point, marker, color=colour, alpha=0.7)
    panel.annotate(method, point, fontsize=6, xytext=(3, 3), textcoords="offset points")
