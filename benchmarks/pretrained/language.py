"""Every method fine-tunes a small pretrained Llama on Shakespeare, rates tuned alike.

stories260K on tiny Shakespeare: the seven matrices of each layer are tuned, embedding and
norms frozen; 8 windows of 64 tokens a step, 10 % warm-up, then a cosine to zero. The
learning rate of every method is searched on one grid of powers of two, on seed 0, until
the best has a worse neighbour on both sides. A seed decides data order and sketches.

Studies: 300 steps, 1000 steps, and the wall time of 1000 steps of full Adam, by steps
that are timed in turn in this run; what the trials left open; the rate of every rank and
side, tuned on each seed; and the best rules without state as fused steps, at the rates
that the other form was tuned to. Rows are saved as they come and, if there are rows
already, the missing ones are added.

    python -m benchmarks.pretrained.language --data-dir DIR [--quick]
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.pretrained import entries, open_questions, run
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import rows as result_rows
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core

SEEDS = (0, 1, 2)
SHORT, LONG = 300, 1000
DECODER = "decoder 4x512"


def steps_in_time(row: dict[str, Any]) -> int:
    """How many steps fit in the time of ``LONG`` steps of full Adam."""
    return run.CHUNK * round(LONG / row["over_full_adam"] / run.CHUNK)


def decoder_steps(name: str) -> int:
    """The same where the model is the 512-wide decoder, by the rows of ``laws``."""
    rows = result_rows.read("speed/laws")
    over_floor = {
        row["method"]: row["over_floor"] for row in rows if row["model"] == DECODER
    }
    own = over_floor[entries.IN_A_DECODER[name]] / over_floor["full AdamW"]
    return steps_in_time({"over_full_adam": own})


def contenders_of(study: str) -> list[Entry]:
    """The contenders of a study, in the order of the table."""
    if study == "explored":
        return open_questions.explored()
    if study == "one rate":
        return open_questions.one_rate()
    if study == "fused":
        return entries.fused()
    table = [*entries.rivals(), *entries.raclora()]
    if study == "equal steps":
        return table
    decoder = study == "equal decoder time"
    chosen = entries.IN_A_DECODER if decoder else entries.LONG
    return [entry for entry in table if entry.name in chosen]


def everything() -> list[Entry]:
    """All contenders; names are unique."""
    tables = "equal steps", "explored", "one rate", "fused"
    return [entry for table in tables for entry in contenders_of(table)]


# The program -------------------------------------------------------------------------


@functools.cache
def _task(data_dir: pathlib.Path) -> run.Task:
    return run.Task(data_dir)


@functools.cache
def _runner(data_dir: pathlib.Path, name: str) -> run.Runner:
    entry = next(entry for entry in everything() if entry.name == name)
    return run.Runner(_task(data_dir), entry)


def _work(data_dir: pathlib.Path, name: str, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    row = run.tuned_rates if job["study"] == "one rate" else run.contest
    return row(_runner(data_dir, name), **job)


def jobs(results: Results, study: str, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of a study that are missing and can be made."""
    for entry in contenders_of(study):
        if not re.search(options.only, entry.name) or results.get(study, entry.name):
            continue
        job = {"name": entry.name, "study": study, "seeds": options.seeds}
        if study in ("equal steps", "explored", "one rate"):
            steps = run.CHUNK if options.quick else SHORT
            yield job | {"steps": steps, "guess": entry.guess}
        elif study == "fused":
            parts = results.get("equal steps", entry.name.removesuffix(entries.FUSED))
            if parts is not None:
                yield job | {"steps": SHORT, "guess": parts["rate"], "tune": False}
        elif study == "long":
            short = results.get("equal steps", entry.name)
            if short is not None:
                yield job | {"steps": LONG, "guess": short["rate"]}
        else:
            long = results.get("long", entry.name)
            own_time = study == "equal time"
            timed = results.get("time", entry.name) if own_time else None
            if long is None or (own_time and timed is None):
                continue
            steps = steps_in_time(timed) if timed else decoder_steps(entry.name)
            yield job | {"steps": steps, "guess": long["rate"], "tune": False}


def fill(options: argparse.Namespace, results: Results) -> None:
    """Every study that is asked for."""
    if "time" in options.studies:
        task = _task(options.data_dir)
        raced = run.race(task, contenders_of("time"), options.rounds)
        results.replace("time", raced)
    work = functools.partial(_work, options.data_dir)
    for study in options.studies:
        if study != "time":
            results.fill(work, jobs(results, study, options), options.workers)


STUDIES = (
    "time",
    "equal steps",
    "long",
    "equal time",
    "equal decoder time",
    "explored",
    "one rate",
    "fused",
)


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    options.rounds = 1 if options.quick else 5
    if options.quick:
        options.studies, options.only = ("equal steps",), "^(full Adam|RAC r8 orth.*al)$"
    use_one_core()
    out = None if options.out is None else options.out / "language.json"
    results = Results(
        out,
        "pretrained.language",
        tokens_a_step="batch x 64",
        validation_windows=run.WINDOWS,
        warm_up=run.WARM_UP,
    )
    fill(options, results)


if __name__ == "__main__":
    main()
