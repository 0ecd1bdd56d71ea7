"""Writes tables and figures of README and docs from the result files: no number is typed.

python -m benchmarks.tables
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from benchmarks.federated import report as federated_report
from benchmarks.field import report as field_report
from benchmarks.shared import rows as result_rows
from benchmarks.tables import figures, finetune, grpo, pods, pretrained, rates, verdict
from benchmarks.tables.names import named

PAGES = tuple(
    result_rows.ROOT / page
    for page in (
        "README.md",
        "docs/results.md",
        "docs/results/digits.md",
        "docs/results/federated.md",
        "docs/results/labels.md",
        "docs/results/noise.md",
        "docs/results/language.md",
        "docs/results/paper.md",
        "docs/results/programs.md",
        "docs/results/quantised.md",
        "docs/results/rules.md",
        "docs/results/texts.md",
        "docs/field.md",
        "docs/guides/followers.md",
        "docs/guides/one_chip.md",
        "docs/guides/tunix.md",
        "docs/performance.md",
        "docs/theory.md",
    )
)


def counterexample_table() -> str:
    """Median gaps of the counterexample at c = 1/2, and how many runs diverged."""
    rows = result_rows.read("rates/counterexample")
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
    record = result_rows.record("speed/step_time")
    rows = [row for row in record["rows"] if row["study"] == "models"]
    header = (
        "| model | RAC-LoRA | full AdamW | LoRA | qwix LoRA | share of AdamW's "
        "| of LoRA's | of qwix's | peak MiB: floor, RAC-LoRA, AdamW, LoRA, qwix |"
    )
    shown = ("ours", "full AdamW", "LoRA, rank first", "qwix LoRA")
    return _over_floor(header, rows, shown, lambda over: [over[0] / r for r in over[1:]])


def fused_table() -> str:
    """A step in both forms, model by model, and what the compiler plans for it."""
    rows = result_rows.read("speed/fused")
    lines = [
        "| model | setting | over the floor | fused over parts | peak MiB: floor, parts, "
        "fused | compile s: floor, parts, fused |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["method"]: row for row in rows if row["model"] == model}
        for method, row in own.items():
            form, _, setting = method.partition(", ")
            if form != "fused":
                continue
            beside = [own["floor"], own[f"parts, {setting}"], row]
            peaks = ", ".join(f"{one['peak_mib']:.0f}" for one in beside)
            times = ", ".join(f"{one['compile_seconds']:.1f}" for one in beside)
            over = [f"{row[name]:.2f}" if name in row else "" for name in _OF_A_STEP]
            cells = (model, setting, *over, peaks, times)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_OF_A_STEP = ("over_floor", "over_parts")


def compile_table() -> str:
    """Seconds of CPU before the first step: AdamW's, and the others over them."""
    rows = result_rows.read("speed/trace_time")
    cells = {(row["model"], row["method"]): row for row in rows}
    models = [row["model"] for row in rows if row["method"] == "full AdamW"]
    others = ("floor", "LoRA", "qwix LoRA", "ours", "block, dim / 8")
    lines = [
        "| model | AdamW, s: staged, compiled | floor | LoRA | qwix LoRA | RAC-LoRA "
        "| blocks, no state |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        plain = cells[model, "full AdamW"]
        seconds = plain["trace_seconds"] + plain["lower_seconds"]
        said = [model, f"{seconds:.2f}, {plain['compile_seconds']:.1f}"]
        for name in others:
            one = cells[model, name]
            said.append(
                f"{one['staged_over_plain']:.2f}, {one['compile_over_plain']:.2f}"
            )
        lines.append("| " + " | ".join(said) + " |")
    return "\n".join(lines)


def draws_table() -> str:
    """What a new link costs, a column for each law."""
    rows = result_rows.read("speed/draws")
    laws = list(dict.fromkeys(row["law"] for row in rows))
    lines = [
        "| compile s, run ms | " + " | ".join(laws) + " |",
        "|---" * (len(laws) + 1) + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["law"]: row for row in rows if row["model"] == model}
        cells = [
            f"{own[law]['compile_seconds']:.2f}, {own[law]['milliseconds']:.1f}"
            if law in own
            else ""
            for law in laws
        ]
        lines.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(lines)


def sides_table() -> str:
    """Steps by the side that is sketched, beside LoRA."""
    rows = result_rows.read("speed/sides")
    header = (
        "| model | left | right | smaller | auto | LoRA | auto / LoRA "
        "| peak MiB: floor, left, right, smaller, auto, LoRA |"
    )
    sides = ("left", "right", "smaller", "auto")
    shown = (*(f"ours, {side}" for side in sides), "LoRA, rank first")
    return _over_floor(header, rows, shown, lambda over: [over[3] / over[-1]])


def laws_table() -> str:
    """The stateless step by law and rank, a column for each model."""
    rows = result_rows.read("speed/laws")
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
    cells = {(row["model"], row["method"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        "| step | " + " | ".join(models) + " |",
        "|---" + "|---:" * len(models) + "|",
    ]
    for column, name in zip(columns, names, strict=True):
        over = [f"{cells[model, column]['over_floor']:.2f}" for model in models]
        lines.append("| " + " | ".join([name, *over]) + " |")
    peaks = [f"{cells[m, 'block, dim / 4']['peak_over_floor']:.2f}" for m in models]
    lines.append(
        "| " + " | ".join(["peak over the floor's, block, dim / 4", *peaks]) + " |"
    )
    return "\n".join(lines)


def gpu_table() -> str:
    """Steps of the Llama on a card, and the parts of RAC-LoRA's."""
    lines = [
        "| step | milliseconds | over the floor | compiled peak, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name, prefix in (
        ("gpu_steps_remat", ""),
        ("gpu_parts", "ours, left, up to the "),
    ):
        rows = result_rows.read(f"speed/{name}")
        for row in rows if not prefix else rows[1:]:
            step = row["method"].split(", ")[-1] if prefix else row["method"]
            lines.append(
                f"| {named(prefix + step)} | {row['milliseconds']:.0f} "
                f"| {row['over_floor']:.2f} | {row['peak_mib']:,.0f} |"
            )
    return "\n".join(lines)


def data_parallel_table() -> str:
    """Bytes that devices exchange, and that wait between micro-batches."""
    rows = result_rows.read("speed/data_parallel")
    sent = {r["method"]: r for r in rows if r["study"] == "data parallel"}
    waiting = {r["method"]: r for r in rows if r["study"] == "accumulation"}
    lines = [
        "| method | all-reduced a step, MiB | full / own "
        "| waiting between micro-batches, MiB | compiled peak of a micro-step, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, row in sent.items():
        other = waiting[method]
        lines.append(
            f"| {named(method)} | {row['all_reduce_mib']:.2f} "
            f"| {row['full_over_own']:.1f} "
            f"| {other['waiting_mib']:.2f} | {other['peak_mib']:.0f} |"
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


TABLES = {
    "verdict": lambda: verdict.table("docs/"),
    "verdict_of_docs": lambda: verdict.table(""),
    "digits": lambda: finetune.accuracies("digits"),
    "digits_orthogonal": lambda: finetune.accuracies("digits_orthogonal"),
    "rules": finetune.rules,
    "rules_beside": finetune.beside_rules,
    "mnist": lambda: finetune.accuracies("mnist"),
    "settings": lambda: finetune.accuracies("mnist_settings"),
    "counterexample": counterexample_table,
    "step_time": step_time_table,
    "fused": fused_table,
    "sides": sides_table,
    "compile": compile_table,
    "draws": draws_table,
    "language_steps": lambda: pretrained.losses("language", "equal steps"),
    "language_long": lambda: pretrained.losses("language", "long"),
    "language_times": lambda: pretrained.times("language"),
    "language_time": lambda: pretrained.losses("language", "equal time"),
    "language_decoder": lambda: pretrained.losses("language", "equal decoder time"),
    "language_explored": lambda: pretrained.losses("language", "explored"),
    "language_rates": pretrained.rates,
    "polynomials": pretrained.polynomials,
    "defaults": pretrained.defaults,
    "programs": pretrained.programs,
    "glue_steps": lambda: pretrained.glue("equal steps"),
    "glue_time": lambda: pretrained.glue("equal time"),
    "glue_cola": pretrained.cola,
    "quantized": pretrained.quantized,
    "texts_time": lambda: pretrained.texts("the time of 300 steps"),
    "texts_steps": lambda: pretrained.texts("300 steps"),
    "texts_long": lambda: pretrained.texts("1000 steps"),
    "texts_lengths": pretrained.lengths,
    "wide": pretrained.wide,
    "wide_times": lambda: pretrained.times("wide"),
    "wide_blocks": lambda: pretrained.times("wide", "time, blocks"),
    "noise_texts": lambda: pretrained.noise(
        ("Shakespeare", "GSM8K", "WikiText-2"), "polar, links of 25"
    ),
    "noise_rules": lambda: pretrained.noise(
        ("Shakespeare", "GSM8K", "WikiText-2", "SST-2"),
        "polar, links of 25",
        others=True,
    ),
    "noise_labels": lambda: pretrained.noise(
        ("SST-2", "MRPC", "exchanged words"), "LoRA r8 Adam"
    ),
    "noise_time": lambda: pretrained.noise(
        ("SST-2", "MRPC", "exchanged words"), "LoRA r8 Adam", ", equal time"
    ),
    "noise_large": pretrained.large_batches,
    "forgetting": pretrained.forgetting,
    "sentiment_steps": lambda: pretrained.losses("sentiment", "equal steps"),
    "sentiment_times": lambda: pretrained.times("sentiment"),
    "sentiment_races": lambda: pretrained.times("sentiment", "time, memory"),
    "sentiment_time": lambda: pretrained.losses("sentiment", "equal time"),
    "data_parallel": data_parallel_table,
    "laws": laws_table,
    "gpu": gpu_table,
    "pod_7b": lambda: pods.programs("7B"),
    "pod_13b": lambda: pods.programs("13B"),
    "pod_70b": lambda: pods.programs("70B"),
    "pod_blocks": pods.blocks,
    "pod_slices": pods.slices,
    "one_chip": pods.one_chip,
    "grpo": grpo.table,
    "followers": pods.followers,
    "followers_steps": pods.followed,
    "rates": rates.rates,
    "estimators": rates.estimators,
    "certificates": rates.certificates,
    "field_ranking": field_report.ranking,
    "field_ahead": field_report.ahead,
    "field_language": lambda: field_report.one_task("language model"),
    "field_mnist": lambda: field_report.one_task("MNIST 5-9"),
    "field_steps": field_report.steps,
    "ntk_full": field_report.ntk_full,
    "ntk_lora": field_report.ntk,
    "ntk_chain": field_report.ntk_chain,
    "federated": lambda: federated_report.table("federated_mnist"),
    "federated_explored": lambda: federated_report.table("federated_mnist_explored"),
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
    """Rewrites the pages in place, and draws the figures."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    figures.draw()
