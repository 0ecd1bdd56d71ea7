"""The tables of the language and sentiment studies, from their rows."""

from __future__ import annotations

import math
import re
import statistics

from benchmarks.shared import rows as result_rows
from benchmarks.tables.names import named


def losses(name: str, study: str) -> str:
    """Losses of one study, ordered by optimizer bytes; the same data for each seed."""
    everything = _rows(name)
    rows = [row for row in everything if row["study"] == study]
    full = {r["study"]: r for r in everything if r["method"] == "full Adam"}
    # Where the study is of more steps, full Adam had the first count of them.
    base = full["equal steps"]
    if name == "language" and study not in ("equal steps", "explored"):
        base = full["long"]
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


def programs() -> str:
    """The runs of the decoder's program."""
    lines = [
        "| method | optimizer bytes | learning rate | loss on held-out text "
        "| processor seconds of the command |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in _rows("programs"):
        cells = (
            row["method"],
            f"{row['optimizer_bytes']:,}",
            f"{row['rate']:g}",
            f"{row['loss_mean']:.3f} ± {row['loss_std']:.3f}",
            f"{row['cpu_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def defaults() -> str:
    """What both programs take by themselves against LoRA's, on texts and labels."""
    lines = [
        "| data | method | optimizer bytes | loss | accuracy, % | loss minus LoRA's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in _rows("defaults"):
        scored = row["metric"][0] is not None
        behind = "-"
        if "minus_lora" in row:
            behind = f"{row['minus_lora']:+.3f} ± {row['standard_error']:.3f}"
        cells = (
            row["task"],
            row["method"],
            f"{row['optimizer_bytes']:,}",
            f"{statistics.mean(row['loss']):.3f} ± {statistics.stdev(row['loss']):.3f}",
            f"{100 * statistics.mean(row['metric']):.1f}" if scored else "-",
            behind,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def glue(study: str) -> str:
    """The metric of every task that all methods have a row of, and their mean."""
    rows, tasks = _glue(study)
    methods = list(dict.fromkeys(method for method, _ in rows))

    def cell(values: list[float], sign: str = "") -> str:
        return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"

    start = [rows[methods[0], task]["start"] for task in tasks]
    heads = " | ".join(_TASKS[task] for task in tasks)
    lines = [
        f"| method | optimizer bytes | {heads} | mean | over LoRA, seed by seed |",
        "|---" + "|---:" * (len(tasks) + 3) + "|",
        "| before tuning | - | "
        + " | ".join(f"{score:.1f}" for score in (*start, statistics.mean(start)))
        + " | - |",
    ]
    means = glue_means(study)
    rival = means["LoRA r8 Adam"]
    for method, mean in means.items():
        cells = (
            method,
            f"{rows[method, tasks[0]]['optimizer_bytes']:,}",
            *(cell(rows[method, task]["score"]) for task in tasks),
            cell(mean),
            cell([a - b for a, b in zip(mean, rival, strict=True)], "+"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def glue_means(study: str, asked: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """The mean metric of every method over the tasks, or those asked for, one a seed."""
    rows, tasks = _glue(study)
    scores = {
        method: [rows[method, task]["score"] for task in asked or tasks]
        for method in dict.fromkeys(method for method, _ in rows)
    }
    return {
        method: [statistics.mean(seed) for seed in zip(*every, strict=True)]
        for method, every in scores.items()
    }


def cola() -> str:
    """Correlation on CoLA and the loss held out: longer runs, and half of the encoder."""
    columns = {
        "600 steps": "cola, equal steps",
        "2,400 steps": "cola, long, equal steps",
        "half of the encoder, 600 steps": "cola, half, equal steps",
    }
    kept = [row for row in _rows("glue") if row["study"] in columns.values()]
    rows = {(row["method"], row["study"]): row for row in kept}
    starts = {row["study"]: f"{row['start']:.1f}" for row in kept}

    def cell(row: dict | None) -> str:
        if row is None:
            return "-"
        score = f"{row['score_mean']:.1f} ± {row['score_std']:.1f}"
        return f"{score}; {row['loss_mean']:.3f}"

    lines = [
        "| method | " + " | ".join(columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
        "| before tuning | "
        + " | ".join(starts.get(study, "-") for study in columns.values())
        + " |",
    ]
    for method in dict.fromkeys(row["method"] for row in kept):
        cells = (cell(rows.get((method, study))) for study in columns.values())
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


_TASKS = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2"}


def _glue(study: str) -> tuple[dict[tuple[str, str], dict], list[str]]:
    """The rows of a study by method and task, and the tasks that all methods have."""
    kept = [row for row in _rows("glue") if row["study"].endswith(f", {study}")]
    rows = {(r["method"], r["study"].removesuffix(f", {study}")): r for r in kept}
    methods = dict.fromkeys(row["method"] for row in kept)
    return rows, [task for task in _TASKS if all((one, task) in rows for one in methods)]


def times(name: str, study: str = "time") -> str:
    """Milliseconds a step, timed in turn."""
    lines = ["| method | milliseconds a step | over full Adam |", "|---|---:|---:|"]
    for row in _rows(name):
        if row["study"] == study:
            over = f"{row['milliseconds']:.1f} | {row['over_full_adam']:.2f}"
            lines.append(f"| {row['method']} | {over} |")
    return "\n".join(lines)


def rates() -> str:
    """The best rate of every rank, side and rule, and its spread over seeds."""
    lines = [
        "| method | best learning rate, each seed | geometric mean | over the least |",
        "|---|---:|---:|---:|",
    ]
    rows = [row for row in _rows("language") if row["study"] == "one rate"]
    for rule in ("orthogonal", "Adam"):
        own = [row for row in rows if row["method"].endswith(rule)]
        own.sort(key=_side_and_rank)
        least = min((row["rate"] for row in own), default=1.0)
        for row in own:
            each = ", ".join(f"{rate:.2g}" for rate in row["fitted_rates"])
            lines.append(
                f"| {row['method']} | {each} | {row['rate']:.2g} "
                f"| {row['rate'] / least:.2f} |"
            )
    return "\n".join(lines)


def _side_and_rank(row: dict) -> tuple[str, int]:
    """Of a method named like ``RAC r16, side left, Adam``."""
    rank, side, _ = row["method"].split(", ")
    return side, int(rank.removeprefix("RAC r"))


def polynomials() -> str:
    """Loss and milliseconds by the polynomials of the polar factor."""
    rows = _rows("polynomials")
    loss = {(r["polynomials"], r["rank"]): r for r in rows if r["study"] == "quality"}
    time = {(r["polynomials"], r["rank"]): r for r in rows if r["study"] == "time"}
    trained, timed = (sorted({rank for _, rank in cells}) for cells in (loss, time))
    heads = [f"loss, rank {rank}" for rank in trained]
    heads += [f"ms, rank {rank}" for rank in timed]
    lines = ["| polynomials | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads)]
    lines[1] += "|"
    for name in dict.fromkeys(row["polynomials"] for row in rows):
        cells = [f"{loss[name, rank]['loss_mean']:.4f}" for rank in trained]
        cells += [f"{time[name, rank]['milliseconds']:.2f}" for rank in timed]
        lines.append("| " + " | ".join([named(name), *cells]) + " |")
    return "\n".join(lines)


def noise(tasks: tuple[str, ...], base: str, when: str = "", others: bool = False) -> str:
    """The loss on some tasks, and what it is over one: of memory, or of other rules."""
    studies = {task + when: task for task in tasks}
    kept = [
        row
        for row in _rows("noise")
        if row["study"] in studies
        and (row["method"] == base or others != bool(_MEMORY.search(row["method"])))
    ]
    rows = {(row["method"], studies[row["study"]]): row for row in kept}
    methods = list(dict.fromkeys(row["method"] for row in kept))
    return _grid("rule", methods, tasks, rows, base)


def large_batches() -> str:
    """Losses on phrases, 128 a step, and what they are over the polar factor's."""
    columns = {"phrases, 128 a step": "SST-2, 128 texts"}
    return _over_one("noise", columns, base="polar, links of 25")


def texts(length: str) -> str:
    """Losses on three texts by some steps, or in the time of as many of full Adam's."""
    columns = {text: f"{text}, {length}" for text in TEXTS}
    return _over_one("texts", columns, needed=TEXTS)


def lengths() -> str:
    """Losses on the longest text by runs of every length, and in full Adam's time."""
    counts = (300, 1000, 3000, 10_000)
    columns = {f"{count:,} steps": f"WikiText-2, {count} steps" for count in counts}
    columns["the time of 1,000"] = "WikiText-2, the time of 1000 steps"
    return _over_one("texts", columns, needed=("1,000 steps",))


def wide() -> str:
    """Losses of the decoder that is made here, at equal steps and in equal time."""
    columns = {"300 steps": "equal steps", "the time of 300 of full Adam": "equal time"}
    return _over_one("wide", columns)


TEXTS = ("Shakespeare", "GSM8K", "WikiText-2")
# Beside memory stand the polar factor with links as long, LoRA, and Adam inside.
_MEMORY = re.compile("memory|polar, links of 25|Adam")


def _over_one(
    name: str,
    columns: dict[str, str],
    needed: tuple[str, ...] = (),
    base: str = "full Adam",
) -> str:
    """The methods that have a row, in columns of studies; in those needed, if any."""
    studies = {study: column for column, study in columns.items()}
    kept = [row for row in _rows(name) if row["study"] in studies]
    rows = {(row["method"], studies[row["study"]]): row for row in kept}
    methods = [
        method
        for method in dict.fromkeys(row["method"] for row in kept)
        if all((method, column) in rows for column in needed)
    ]
    return _grid("method", methods, tuple(columns), rows, base)


def _grid(
    head: str,
    methods: list[str],
    columns: tuple[str, ...],
    rows: dict[tuple[str, str], dict],
    base: str,
) -> str:
    """Losses, and after each what it is over that of one method, seed by seed."""

    def cell(method: str, column: str) -> str:
        row, other = rows.get((method, column)), rows.get((base, column))
        if row is None or other is None:
            return "-"
        gaps = [a - b for a, b in zip(row["loss"], other["loss"], strict=True)]
        over = f"{statistics.mean(gaps):+.3f} ± {statistics.stdev(gaps):.3f}"
        return f"{row['loss_mean']:.3f}; {over}"

    lines = [
        f"| {head} | optimizer bytes | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for method in methods:
        one = next(rows[method, c] for c in columns if (method, c) in rows)
        cells = (
            method,
            f"{one['optimizer_bytes']:,}",
            *(cell(method, column) for column in columns),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def forgetting() -> str:
    """What was forgotten where the new text had been learnt equally well."""
    rows = _rows("forgetting")
    levels = list(rows[0]["forgotten_at"])
    lines = [
        "| method | loss at the end | forgotten there | "
        + " | ".join(f"forgotten at {level}" for level in levels)
        + " |",
        "|---|" + "---:|" * (len(levels) + 2),
    ]

    def cell(values: list[float | None]) -> str:
        if None in values:
            return "-"
        found = [value for value in values if value is not None]
        return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}"

    for row in rows:
        cells = (
            row["method"],
            f"{row['loss_mean']:.3f}",
            cell(row["forgotten_at_end"]),
            *(cell(row["forgotten_at"][level]) for level in levels),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quantized() -> str:
    """Losses on bases of codes, those in codes and those with the carried error."""
    rows = _rows("quantized")
    float_rows = {row["link"]: row for row in rows if row["base"] == "float32"}
    lines = [
        "| method | base, bytes | error, bytes | learning rate | loss in the codes "
        "| loss with the error | over float32, seed by seed |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def spread(losses: list[float]) -> str:
        return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"

    for row in sorted(rows, key=lambda row: -row["link"]):
        carries = row["error_bytes"] > 0
        plain = float_rows.get(row["link"])
        gaps = (
            [a - b for a, b in zip(row["loss"], plain["loss"], strict=True)]
            if plain
            else []
        )
        cells = (
            row["method"],
            f"{row['base_bytes_packed']:,}",
            f"{row['error_bytes']:,}" if carries else "-",
            f"{row['rate']:g}",
            spread(row["loss"]),
            spread(row["loss_exact"]) if carries else "-",
            f"{statistics.mean(gaps):+.3f} ± {statistics.stdev(gaps):.3f}"
            if gaps
            else "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bytes_class(row: dict) -> int:
    """Optimizer bytes, those within a few per cent of each other alike."""
    return round(15 * math.log(max(row["optimizer_bytes"], 1000)))


def _rows(name: str) -> list[dict]:
    rows: list[dict] = result_rows.read(f"pretrained/{name}")
    return rows
