"""The verdict on top of README and results: a situation, what to take, and by how much.

Every number is of a row. A lead is the mean of the differences seed by seed, on the same
data. It is called level below their standard deviation, and slight below twice that.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.federated import report as federated_report
from benchmarks.shared import rows as result_rows
from benchmarks.tables import pretrained

Row = dict[str, Any]

_ADAM = "LoRA r8 Adam"
_HALF = "RAC r32 block orthogonal"
_MEMORY = "RAC r64 block, memory 0.8, link 25"
_TIME = "<br>in equal time: "


class Line(NamedTuple):
    """A row of the verdict.

    Attributes:
      situation: What is asked for.
      page: Where the study stands, below ``docs``.
      take: What to take there.
      beside_lora: Against LoRA, at its bytes and in its time.
      beside_full: Against full fine-tuning.
    """

    situation: str
    page: str
    take: str
    beside_lora: str
    beside_full: str


class Lead(NamedTuple):
    """How far one method is ahead of another; positive is better."""

    mean: float
    spread: float
    digits: int

    def __str__(self) -> str:
        if abs(self.mean) < self.spread:
            return f"level ({self.mean:+z.{self.digits}f})"
        slightly = "slightly " if abs(self.mean) < 2 * self.spread else ""
        side = "ahead" if self.mean > 0 else "behind"
        return f"{slightly}{side} by {abs(self.mean):.{self.digits}f}"


def lead(ours: Sequence[float], others: Sequence[float], digits: int = 3) -> Lead:
    """The lead of scores, where larger is better, seed by seed."""
    gaps = [a - b for a, b in zip(ours, others, strict=True)]
    return Lead(statistics.mean(gaps), statistics.stdev(gaps), digits)


def table(docs: str) -> str:
    """The verdict; ``docs`` is the way from the page to the folder of the docs."""
    lines = [
        "| situation | take | against LoRA at its bytes, and in its time "
        "| against full fine-tuning |",
        "|---|---|---|---|",
    ]
    for make in (
        _language,
        _texts,
        _long_run,
        _wide,
        _language_adam,
        _same_rule,
        _program,
        _glue,
        _phrases,
        _rank_one,
        _codes,
        _one_chip,
        _slices,
        _steps,
        _clients,
    ):
        line = make()
        cells = (f"[{line.situation}]({docs}{line.page})", *line[2:])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Quality -----------------------------------------------------------------------------


def _language() -> Line:
    steps, time = _beside("long", _HALF), _beside("equal time", _HALF)
    bytes_ = _one("pretrained/language", "long", _ADAM)["optimizer_bytes"]
    return Line(
        "A small Llama, 512 targets a step",
        "results/language.md",
        "RAC-LoRA without state, half of the width",
        f"loss {steps['LoRA']}, with no optimizer bytes for {bytes_:,}"
        f"{_TIME}{time['LoRA']}",
        f"{steps['full']}{_TIME}{time['full']}",
    )


def _texts() -> Line:
    method = "blocks of dim/2, orthogonal"

    def beside(rival: str, when: str) -> str:
        """The least and the largest lead over the texts."""
        leads = []
        for text in pretrained.TEXTS:
            study = f"{text}, {when}300 steps"
            leads.append(_lower("pretrained/texts", study, method, rival))
        least, most = (pick(leads, key=lambda one: one.mean) for pick in (min, max))
        words, _, number = str(most).rpartition(" ")
        same = str(least).startswith(words)
        return f"{least} to {number if same else most}"

    time = "the time of "
    return Line(
        "Three texts, the time of 300 steps of full Adam",
        "results/texts.md",
        "RAC-LoRA without state, half of the width",
        f"loss {beside(_ADAM, '')} at equal steps{_TIME}{beside(_ADAM, time)}",
        f"{beside('full Adam', '')} at equal steps{_TIME}{beside('full Adam', time)}",
    )


def _long_run() -> Line:
    whole, half = "full orthogonal, memory 0.9, fused", "blocks of dim/2, orthogonal"
    name, full = "pretrained/texts", "full Adam"
    study, longest = (f"WikiText-2, {count} steps" for count in (3000, 10_000))
    return Line(
        "A longer run, 3,000 steps of WikiText-2",
        "results/texts.md#how-long-it-lasts",
        "whole gradients with memory, fused",
        f"loss {_lower(name, study, whole, _ADAM)}, at "
        f"{_share_of_bytes(name, study, whole)} of its optimizer bytes; half of the "
        f"width without state {_lower(name, study, half, _ADAM)}{_TIME}not raced",
        f"{_lower(name, study, whole, full)}, after 10,000 steps "
        f"{_lower(name, longest, whole, full)}; half of the width without state "
        f"{_lower(name, study, half, full)}",
    )


def _wide() -> Line:
    method = "blocks of dim/4, orthogonal"
    found = {
        (study, rival): _lower("pretrained/wide", study, method, rival)
        for study in ("equal steps", "equal time")
        for rival in (_ADAM, "full Adam")
    }
    bytes_ = _one("pretrained/wide", "equal steps", _ADAM)["optimizer_bytes"]
    return Line(
        "A Llama 512 wide, 21 million weights",
        "results/texts.md#at-a-width-of-512",
        "RAC-LoRA without state, a quarter of the width",
        f"loss {found['equal steps', _ADAM]}, with no optimizer bytes for {bytes_:,}"
        f"{_TIME}{found['equal time', _ADAM]}",
        f"{found['equal steps', 'full Adam']}{_TIME}{found['equal time', 'full Adam']}",
    )


def _language_adam() -> Line:
    method = "RAC r12 Adam"
    steps, time = _beside("long", method), _beside("equal time", method)
    return Line(
        "The small Llama, with Adam inside",
        "results/language.md",
        "LoRA, or RAC-LoRA without state",
        f"loss {steps['LoRA']}{_TIME}{time['LoRA']}",
        f"{steps['full']}{_TIME}{time['full']}",
    )


def _same_rule() -> Line:
    found = {}
    for study, own in (
        ("equal bytes", "RAC-LoRA, orthogonal"),
        ("equal time", "RAC-LoRA, orthogonal, block"),
    ):
        for rival in ("LoRA, orthogonal", "full orthogonal"):
            where = f"language model, {study}"
            found[study, rival] = _lower("field/field", where, own, rival)
    return Line(
        "The same stateless rule in LoRA's pair",
        "field.md",
        "LoRA's pair by bytes, RAC-LoRA by time",
        f"loss {found['equal bytes', 'LoRA, orthogonal']}, no bytes for both"
        f"{_TIME}{found['equal time', 'LoRA, orthogonal']}",
        f"the same rule: {found['equal bytes', 'full orthogonal']}"
        f"{_TIME}{found['equal time', 'full orthogonal']}",
    )


def _program() -> Line:
    rows = result_rows.read("pretrained/defaults")
    found = {(row["task"], row["method"]): row for row in rows}
    gains = []
    for text in ("GSM8K", "WikiText-2"):
        ours, lora = (found[text, name] for name in ("raclora-orthogonal", "lora"))
        gains.append(
            f"{lead(_negative(ours['loss']), _negative(lora['loss']))} on {text}"
        )
    searched = {row["method"]: row for row in result_rows.read("pretrained/programs")}
    half, full = searched["RAC-LoRA r32, orthogonal"], searched["full, Adam"]
    behind = lead(_negative(half["loss"]), _negative(full["loss"]))
    return Line(
        "The program for texts, its settings left alone",
        "results/programs.md",
        "its default, which is the first row's",
        f"loss {' and '.join(gains)}, with no optimizer bytes for "
        f"{lora['optimizer_bytes']:,}{_TIME}not raced",
        f"{behind} on Shakespeare, each at its best rate",
    )


def _glue() -> Line:
    adam, full = "RAC r12 Adam, link 100", "full Adam"

    def beside(
        rival: str, method: str, study: str = "equal steps", tasks: tuple[str, ...] = ()
    ) -> Lead:
        means = pretrained.glue_means(study, tasks)
        return lead(means[method], means[rival], 1)

    def twice(method: str, study: str = "equal steps") -> str:
        on_two = beside(_ADAM, method, study, ("mrpc", "sst2"))
        return f"{beside(_ADAM, method, study)}; without CoLA {on_two}"

    share = _share_of_bytes("pretrained/glue", "sst2, equal steps", _MEMORY)
    return Line(
        "MiniLM, three tasks of GLUE",
        "results/labels.md",
        "RAC-LoRA with Adam, links of 100",
        f"points: {twice(adam)}; with memory, at {share} of its bytes, {twice(_MEMORY)}"
        f"{_TIME}{twice(adam, 'equal time')}",
        f"{beside(full, adam)}<br>in LoRA's time: {beside(full, adam, 'equal time')}",
    )


def _phrases() -> Line:
    adam = "RAC r16 Adam, link 100"

    def beside(rival: str, method: str = _MEMORY, study: str = "equal steps") -> str:
        return str(_lower("pretrained/sentiment", study, method, rival))

    share = _share_of_bytes("pretrained/sentiment", "equal steps", _MEMORY)
    # Of the race of memory full Adam has no row: 300 of its steps take a little longer.
    timed, full = (
        _negative(_one("pretrained/sentiment", study, method)["loss"])
        for study, method in (("equal time", _MEMORY), ("equal steps", "full Adam"))
    )
    in_time = lead(timed, full)
    return Line(
        "MiniLM, phrases of SST-2, few steps",
        "results/labels.md",
        "RAC-LoRA with memory, a sixth of the width",
        f"loss {beside(_ADAM)}, at {share} of its bytes; {beside(_ADAM, adam)} "
        f"with Adam inside{_TIME}{beside(_ADAM, study='equal time')}",
        f"{beside('full Adam')}<br>in LoRA's time: {in_time} on its 300 steps",
    )


def _rank_one() -> Line:
    lora, chain, full = [], [], []
    for data, name in (("digits", "digits"), ("mnist", "MNIST")):
        rows = {row["method"]: row for row in result_rows.read(f"finetune/{data}")}
        ours = rows["RAC-LoRA, right"]["accuracy"]
        for kept, rival in (
            (lora, "LoRA, right"),
            (chain, "Chain of LoRA, left"),
            (full, "full fine-tuning"),
        ):
            kept.append(f"{lead(ours, rows[rival]['accuracy'], 2)} on {name}")
    return Line(
        "Rank 1, an image classifier",
        "results/digits.md",
        "Chain of LoRA",
        f"points: {'; '.join(lora)}<br>against Chain of LoRA: {'; '.join(chain)}",
        "; ".join(full),
    )


def _codes() -> Line:
    rows = {row["method"]: row for row in result_rows.read("pretrained/quantized")}
    lora = rows["LoRA r8 Adam on nf4, never merged"]["loss"]
    said = [
        lead(_negative(rows[f"nf4, error {what}, link 5"]["loss"]), _negative(lora))
        for what in ("carried", "let go")
    ]
    cost = lead(
        _negative(rows["int8, error carried, link 5"]["loss"]),
        _negative(rows["float32, link 5"]["loss"]),
    )
    return Line(
        "A base in four bits",
        "results/quantised.md",
        "LoRA, or RAC-LoRA with the rounding error carried",
        f"loss {said[0]} with the error carried, {said[1]} without{_TIME}not raced",
        f"not measured; int8 against a float32 base: {cost}",
    )


def _beside(study: str, method: str) -> dict[str, Lead]:
    """A method of the language study against LoRA and full fine-tuning with Adam."""
    ours, lora = (_one("pretrained/language", study, name) for name in (method, _ADAM))
    full = _one("pretrained/language", "long", "full Adam")
    return {
        name: lead(_negative(ours["loss"]), _negative(other["loss"]))
        for name, other in (("LoRA", lora), ("full", full))
    }


def _lower(name: str, study: str, method: str, rival: str) -> Lead:
    """How far a method's losses are below a rival's in a study of a result file."""
    ours, other = (_one(name, study, one)["loss"] for one in (method, rival))
    return lead(_negative(ours), _negative(other))


def _negative(losses: Sequence[float]) -> list[float]:
    return [-loss for loss in losses]


# Memory, time and bytes --------------------------------------------------------------


def _one_chip() -> Line:
    rows = result_rows.read("pods/pod")
    study = "7B, v5e-1, 2048, effort -1"
    fused, lora = (
        next(r for r in rows if (r["study"], r["method"]) == (study, method))
        for method in ("fused, dim / 4", "LoRA")
    )
    chips = _smallest(rows, "7B", "AdamW")
    return Line(
        "Llama 7B on one chip of 16 GB",
        "guides/one_chip.md",
        "a fused step on a quarter of the rows",
        f"a peak of {fused['peak_mib']:,.0f} MiB for {lora['peak_mib']:,.0f} of LoRA of "
        f"rank 16, compiled{_TIME}not raced",
        f"AdamW needs {chips} chips",
    )


def _slices() -> Line:
    rows = result_rows.read("pods/pod")
    least = {
        method: _smallest(rows, "70B", method)
        for method in ("ours, left", "LoRA", "AdamW")
    }
    study = "70B, v5e-256, 4096, effort -1"
    sent = {r["method"]: r["total_gb"] for r in rows if r["study"] == study and r["fits"]}
    ours, floor = sent["ours, left"], sent["floor"]
    return Line(
        "Llama 70B on a TPU slice",
        "performance.md#tpu-slices",
        "RAC-LoRA or LoRA",
        f"{least['ours, left']} chips for {least['LoRA']}, compiled; a device exchanges "
        f"{ours / floor:.3f} of the bytes of frozen weights, with LoRA "
        f"{sent['LoRA'] / floor:.3f}{_TIME}not raced",
        f"AdamW needs {least['AdamW']} chips, and {sent['AdamW'] / floor:.3f} of those "
        "bytes",
    )


def _smallest(rows: list[Row], model: str, method: str) -> int:
    """Chips of the smallest v5e slice that a method fits."""
    return min(
        row["chips"]
        for row in rows
        if (row["model"], row["method"]) == (model, method)
        and row["fits"]
        and row["slice"].startswith("v5e")
        and row["tensor"] == 1
        and row["length"] == 4096
    )


def _steps() -> Line:
    rows = [r for r in result_rows.read("speed/step_time") if r["study"] == "models"]

    def over(method: str, whose: str) -> str:
        """The share of a method's time on the decoder, and its range over models."""
        shares = {r["model"]: r["ours_over_this"] for r in rows if r["method"] == method}
        return (
            f"{shares['decoder 4x512']:.2f} of {whose} time on a decoder, "
            f"{min(shares.values()):.2f} to {max(shares.values()):.2f} over "
            f"{len(shares)} models"
        )

    gpu = {r["method"]: r for r in result_rows.read("speed/gpu_steps_remat")}
    card = gpu["ours"]["milliseconds"] / gpu["LoRA, rank first"]["milliseconds"]
    return Line(
        "The time of a step, rank 8",
        "performance.md#whole-steps",
        "RAC-LoRA",
        f"{over('LoRA, rank first', 'its')}; {card:.2f} on a GPU",
        over("full AdamW", "AdamW's"),
    )


def _clients() -> Line:
    cells = federated_report.finals(result_rows.read("federated/federated_mnist"))
    means = {
        cell: 100 * statistics.mean(row["accuracy"] for row in own)
        for cell, own in cells.items()
    }
    over, behind, shares = [], [], []
    for panel in dict.fromkeys(cell[:2] for cell in cells):
        own = {rule: mean for (*at, rule), mean in means.items() if panel == (*at,)}
        ours, full = own.pop("Fed-RAC-LoRA"), own.pop("FedAvg")
        over.append(ours - max(own.values()))
        behind.append(full - ours)
        sent = [cells[*panel, rule][0]["bytes_up"] for rule in ("FedAvg", "Fed-RAC-LoRA")]
        shares.append(sent[0] / sent[1])
    return Line(
        "Clients that keep their data",
        "results/federated.md",
        "Fed-RAC-LoRA",
        f"ahead of the best of {len(own)} federated LoRAs by {min(over):.1f} to "
        f"{max(over):.1f} points at equal bytes up{_TIME}not raced",
        f"behind FedAvg, which sends {statistics.mean(shares):.0f} times the bytes, by "
        f"{min(behind):.1f} to {max(behind):.1f}",
    )


def _share_of_bytes(name: str, study: str, method: str) -> str:
    """A method's optimizer bytes as a share of LoRA's."""
    ours, lora = (_one(name, study, m)["optimizer_bytes"] for m in (method, _ADAM))
    return f"{ours / lora:.2f}"


def _one(name: str, study: str, method: str) -> Row:
    """The row of a method in a study of a result file."""
    rows = result_rows.read(name)
    (row,) = (r for r in rows if (r["study"], r["method"]) == (study, method))
    return row
