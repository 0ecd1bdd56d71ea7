"""The figures of index, results and performance, drawn from the rows.

``python -m benchmarks.tables`` writes them into ``docs/_static``. Letters stay text and
ids are salted, so that the same rows and Matplotlib give the same bytes. The ground is
white, for a page may be dark.
"""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.shared import rows as result_rows
from benchmarks.tables import grpo as grpo_tables
from benchmarks.tables import pretrained

FOLDER = result_rows.ROOT / "docs" / "_static"
RAC_LORA, LORA, FULL = "#cf222e", "#0969da", "#57606a"
_STYLE = {
    "axes.edgecolor": "#8b949e",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "raclora_jax",
}


def quality() -> Figure:
    """Quality in equal time against what the optimizer holds, on three tasks."""
    figure = Figure(figsize=(6.8, 5.6), layout="constrained")
    (llama, glue), (phrases, names) = figure.subplots(2, 2)
    rows = result_rows.read("pretrained/language")
    found = _seeds(rows, "equal time", "loss")
    found["full Adam"] = _seeds(rows, "long", "loss")["full Adam"]
    for method, label, at, colour in (
        ("full Adam", "Adam", (-7, -12), FULL),
        ("full orthogonal", "stateless", (8, -11), FULL),
        ("LoRA r8 Adam", "r8, Adam", (8, 2), LORA),
        ("LoRA r8 orthogonal", "r8, stateless", (8, 0), LORA),
        ("RAC r12 Adam", "r12, Adam", (8, -5), RAC_LORA),
        ("RAC r16 block orthogonal", "r16, stateless", (8, -3), RAC_LORA),
        ("RAC r32 block orthogonal", "r32, stateless", (8, 1), RAC_LORA),
    ):
        _mark(llama, found[method], label, at, colour)
    llama.set(title="a small Llama", ylabel="loss: lower is better", xlim=(-2e4, 6e6))
    held = _seeds(result_rows.read("pretrained/glue"), "equal time", "score")
    for method, seeds in pretrained.glue_means("equal time").items():
        held[method] = held[method][0], seeds
    for method, label, at, colour in (
        ("full Adam", "Adam", (7, -3), FULL),
        ("LoRA r8 Adam", "r8, Adam", (8, -3), LORA),
        ("RAC r12 Adam, link 100", "r12, Adam", (-8, -3), RAC_LORA),
        ("RAC r16 block orthogonal", "r16, stateless", (8, -4), RAC_LORA),
    ):
        _mark(glue, held[method], label, at, colour)
    glue.set(title="MiniLM, three tasks of GLUE", xlim=(-2e4, 6e8))
    glue.set_ylabel("mean metric: higher is better")
    found = _seeds(result_rows.read("pretrained/sentiment"), "equal time", "loss")
    for method, label, at, colour in (
        ("full Adam", "Adam", (7, 6), FULL),
        ("LoRA r8 Adam", "r8, Adam", (8, -3), LORA),
        ("LoRA r8 orthogonal", "r8, stateless", (8, 4), LORA),
        ("RAC r16 Adam, link 25", "r16, Adam", (8, -3), RAC_LORA),
        ("RAC r16 block orthogonal, link 25", "r16, stateless", (8, -8), RAC_LORA),
    ):
        _mark(phrases, found[method], label, at, colour)
    phrases.set(title="MiniLM, phrases of SST-2", xlim=(-2e4, 6e8))
    phrases.set_ylabel("loss: lower is better")
    for panel in (llama, glue, phrases):
        panel.set_xscale("symlog", linthresh=1e5, linscale=0.6)
        panel.set_xlabel("optimizer bytes")
        panel.grid(color="#d0d7de", linewidth=0.6)
        panel.margins(y=0.12)
    names.axis("off")
    for place, (label, colour) in enumerate(
        (("RAC-LoRA", RAC_LORA), ("LoRA", LORA), ("full fine-tuning", FULL))
    ):
        names.plot(0.08, 0.8 - 0.14 * place, "o", color=colour)
        names.text(0.14, 0.8 - 0.14 * place, label, color=colour, va="center")
    names.text(0.04, 0.2, "every method in the same time;\nbars: deviation over seeds")
    names.set(xlim=(0, 1), ylim=(0, 1))
    return figure


_Seeds = tuple[int, list[float]]


def _seeds(rows: list[dict[str, Any]], study: str, key: str) -> dict[str, _Seeds]:
    """Optimizer bytes and what each seed reached, by method."""
    kept = (row for row in rows if row["study"].endswith(study))
    return {row["method"]: (row["optimizer_bytes"], row[key]) for row in kept}


def _mark(
    panel: Any, found: _Seeds, label: str, at: tuple[int, int], colour: str
) -> None:
    """The mean over seeds with its deviation, and what it is."""
    held, seeds = found
    mean = statistics.mean(seeds)
    panel.errorbar(held, mean, statistics.stdev(seeds), fmt="o", color=colour, ms=5)
    panel.annotate(
        label,
        (held, mean),
        xytext=at,
        textcoords="offset points",
        fontsize=8,
        color=colour,
        ha="right" if at[0] < 0 else "left",
    )


def step_time() -> Figure:
    """A step over its floor, model by model."""
    rows = [r for r in result_rows.read("speed/step_time") if r["study"] == "models"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["model"], row["method"]): row for row in rows}
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    panel = figure.subplots()
    shown = (
        ("ours", "RAC-LoRA", RAC_LORA),
        ("LoRA, rank first", "LoRA", LORA),
        ("full AdamW", "full fine-tuning, AdamW", FULL),
    )
    for place, (method, label, colour) in enumerate(shown):
        lengths = [cells[model, method]["over_floor"] for model in models]
        heights = [index + 0.27 * (place - 1) for index in range(len(models))]
        panel.barh(heights, lengths, 0.25, color=colour, label=label)
        for height, length in zip(heights, lengths, strict=True):
            panel.text(0.03, height, f"{length:.2f}", va="center", fontsize=7, color="w")
    panel.set_yticks(range(len(models)), models)
    panel.invert_yaxis()
    panel.axvline(1, color="black", linewidth=0.9)
    panel.set_xlabel("time of a step over that of the floor")
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False)
    return figure


def grpo() -> Figure:
    """The reward of GRPO on held-out problems, by steps and by time."""
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    colours = {"full": FULL, "qwix": LORA}
    styles = dict.fromkeys(colours.values(), "-")
    lines = iter(("-", "--", ":"))
    for curve in grpo_tables.curves():
        colour = colours.get(curve.method.split()[0], RAC_LORA)
        style = styles.get(colour) or next(lines)
        mean, spread = curve.rewards.mean(0), curve.rewards.std(0, ddof=1)
        for panel, places in (
            (by_step, curve.steps),
            (by_time, curve.steps * curve.seconds),
        ):
            panel.plot(places, mean, style, color=colour, label=curve.method)
            panel.fill_between(
                places, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0
            )
    by_step.set(xlabel="steps", ylabel="reward on held-out problems")
    by_time.set(xlabel="seconds of one core")
    for panel in (by_step, by_time):
        panel.grid(color="#d0d7de", linewidth=0.6)
    figure.legend(
        *by_step.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    return figure


FIGURES = {"quality": quality, "step_time": step_time, "grpo": grpo}


def draw(folder: pathlib.Path = FOLDER) -> None:
    """Writes every figure as an SVG."""
    with mpl.rc_context(_STYLE):
        for name, make in FIGURES.items():
            make().savefig(folder / f"{name}.svg", metadata={"Date": None})
