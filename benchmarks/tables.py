"""Writes the tables of README and docs from the result files: no number is typed.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence

from benchmarks import federated_report
from benchmarks.rows import RESULTS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = tuple(
    ROOT / page for page in ("README.md", "docs/results.md", "docs/performance.md")
)


def finetune_table(name: str) -> str:
    """The rows of ``make finetune`` as Markdown."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| method | trained numbers | optimizer bytes | link | learning rate "
        "| test accuracy, % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        cells = (
            row["method"],
            f"{row['trained']:,}",
            f"{row['optimizer_bytes']:,}",
            str(row["link"] or "-"),
            f"{row['learning_rate']:g}",
            f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counterexample_table() -> str:
    """Median gaps of the counterexample at c = 1/2, and how many runs diverged."""
    rows = json.loads((RESULTS / "counterexample.json").read_text())["rows"]
    by_cell = {(r["method"], r["c"], r["step_times_L"]): r for r in rows}

    def cell(method: str, step: float) -> str:
        row = by_cell[method, 0.5, step]
        said = []
        if row["diverged"]:
            said.append(f"{row['diverged']}/{row['runs']} diverge")
        if row["median"] is not None:
            gap = row["median"]
            said.append("< 1e-12" if gap < 1e-12 else f"{gap:.2g}")
        return "; ".join(said)

    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| method | step 1/L | step 0.1/L |", "|---|---:|---:|"]
    lines += [f"| {m} | {cell(m, 1.0)} | {cell(m, 0.1)} |" for m in methods]
    return "\n".join(lines)


def step_time_table() -> str:
    """Whole steps of every method, model by model."""
    record = json.loads((RESULTS / "step_time.json").read_text())
    rows = [row for row in record["rows"] if row["study"] == "models"]
    header = (
        "| model | ours | full AdamW | LoRA | qwix LoRA | ours / AdamW | ours / LoRA "
        "| ours / qwix | peak MiB: floor, ours, AdamW, LoRA, qwix |"
    )
    shown = ("ours", "full AdamW", "LoRA, rank first", "qwix LoRA")
    return _over_floor(header, rows, shown, lambda over: [over[0] / r for r in over[1:]])


def sides_table() -> str:
    """Steps by the side that is sketched, beside LoRA."""
    rows = json.loads((RESULTS / "sides.json").read_text())["rows"]
    header = (
        "| model | left | right | auto | LoRA | left / LoRA "
        "| peak MiB: floor, left, right, auto, LoRA |"
    )
    shown = ("ours, left", "ours, right", "ours, auto", "LoRA, rank first")
    return _over_floor(header, rows, shown, lambda over: [over[0] / over[-1]])


def laws_table() -> str:
    """The stateless step by law and rank, model by model."""
    rows = json.loads((RESULTS / "laws.json").read_text())["rows"]
    fractions = [f"dim / {part}" for part in (16, 8, 4)]
    every = "a new one every step"
    columns = [
        *(f"orthonormal, {fraction}" for fraction in fractions),
        *(f"block, {fraction}" for fraction in fractions),
        f"block, dim / 4, {every}",
        "full AdamW",
        "LoRA, rank first",
    ]
    names = [*columns[:-2], "AdamW", "LoRA, rank 8"]
    lines = [
        "| model | " + " | ".join(names) + " | peak / floor, block, dim / 4 |",
        "|---" + "|---:" * (len(names) + 1) + "|",
    ]
    by_cell = {(row["model"], row["method"]): row for row in rows}
    for model in dict.fromkeys(row["model"] for row in rows):
        over = [f"{by_cell[model, name]['over_floor']:.2f}" for name in columns]
        peak = by_cell[model, "block, dim / 4"]["peak_over_floor"]
        lines.append("| " + " | ".join([model, *over, f"{peak:.2f}"]) + " |")
    return "\n".join(lines)


def gpu_table() -> str:
    """Steps of the Llama on a card, and the parts of ours."""
    lines = [
        "| step | milliseconds | over the floor | compiled peak, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name, prefix in (
        ("gpu_steps_remat", ""),
        ("gpu_parts", "ours, left, up to the "),
    ):
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        for row in rows if not prefix else rows[1:]:
            step = row["method"].split(", ")[-1] if prefix else row["method"]
            lines.append(
                f"| {prefix}{step} | {row['milliseconds']:.0f} "
                f"| {row['over_floor']:.2f} | {row['peak_mib']:,.0f} |"
            )
    return "\n".join(lines)


def _over_floor(
    header: str,
    rows: list[dict],
    shown: Sequence[str],
    compared: Callable[[list[float]], list[float]],
) -> str:
    """A line per model: steps over the floor of the same run, ratios of those, peaks."""
    by_cell = {(row["model"], row["method"]): row for row in rows}
    columns = header.count("|") - 1
    lines = [header, "|---" + "|---:" * (columns - 1) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [by_cell[model, method] for method in shown]
        over = [row["over_floor"] for row in cells]
        peaks = [row["peak_mib"] for row in (by_cell[model, "floor"], *cells)]
        ratios = (f"{ratio:.2f}" for ratio in (*over, *compared(over)))
        texts = (model, *ratios, ", ".join(f"{peak:.0f}" for peak in peaks))
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def language_table(study: str) -> str:
    """Losses of one study, ordered by optimizer bytes; the same data for each seed."""
    record = json.loads((RESULTS / "language.json").read_text())
    by_study = {(row["study"], row["method"]): row for row in record["rows"]}
    rows = [row for row in record["rows"] if row["study"] == study]
    short = study in ("equal steps", "explored")
    base = by_study["equal steps" if short else "long", "full Adam"]
    if base["method"] not in [row["method"] for row in rows]:
        rows.append(base)
    lines = [
        "| method | trained numbers | optimizer bytes | steps | learning rate "
        "| validation loss | over full Adam, seed by seed |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda r: (_bytes_class(r), r["loss_mean"])):
        gaps = [a - b for a, b in zip(row["loss"], base["loss"], strict=True)]
        cells = (
            row["method"],
            f"{row['trained']:,}",
            f"{row['optimizer_bytes']:,}",
            f"{row['steps']:,}",
            f"{row['rate']:g}",
            f"{row['loss_mean']:.3f} ± {row['loss_std']:.3f}",
            f"{statistics.mean(gaps):+.3f} ± {statistics.stdev(gaps):.3f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bytes_class(row: dict) -> int:
    """Optimizer bytes, those within a few per cent of each other alike."""
    return round(15 * math.log(max(row["optimizer_bytes"], 1000)))


def language_times_table() -> str:
    """Milliseconds a step of the language study, timed in turn."""
    record = json.loads((RESULTS / "language.json").read_text())
    lines = ["| method | milliseconds a step | over full Adam |", "|---|---:|---:|"]
    for row in record["rows"]:
        if row["study"] == "time":
            over = f"{row['milliseconds']:.1f} | {row['over_full_adam']:.2f}"
            lines.append(f"| {row['method']} | {over} |")
    return "\n".join(lines)


def federated_table() -> str:
    """Every rule at its best setting, by number of clients and start."""
    rows = json.loads((RESULTS / "federated_mnist.json").read_text())["rows"]
    lines = [
        "| clients | start | rule | rank | local steps | local rate | rounds "
        "| KiB up, per client | KiB down | test accuracy, % |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (clients, start, rule), own in federated_report.finals(rows).items():
        if len(own) < 3:
            continue
        right = [100 * row["accuracy"] for row in own]
        row = own[0]
        cells = (
            str(clients),
            start,
            rule,
            "-" if rule == "FedAvg" else str(row["rank"]),
            str(row["steps"]),
            f"{row['rate']:g}",
            str(row["exchanges"]),
            f"{row['bytes_up'] / 1024:,.0f}",
            f"{row['bytes_down'] / 1024:,.0f}",
            f"{statistics.mean(right):.2f} ± {statistics.stdev(right):.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {
    "digits": lambda: finetune_table("digits"),
    "mnist": lambda: finetune_table("mnist"),
    "settings": lambda: finetune_table("mnist_settings"),
    "counterexample": counterexample_table,
    "step_time": step_time_table,
    "sides": sides_table,
    "language_steps": lambda: language_table("equal steps"),
    "language_long": lambda: language_table("long"),
    "language_times": language_times_table,
    "language_time": lambda: language_table("equal time"),
    "language_decoder": lambda: language_table("equal decoder time"),
    "language_explored": lambda: language_table("explored"),
    "laws": laws_table,
    "gpu": gpu_table,
    "federated": federated_table,
}


def filled(text: str) -> str:
    """The text with every marked table written anew."""
    for name in marked(text):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{after}"
    return text


def marked(text: str) -> list[str]:
    """The names of the tables that a text holds."""
    return re.findall(r"<!-- end of (\w+) -->", text)


def main() -> None:
    """Rewrites the pages in place."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
