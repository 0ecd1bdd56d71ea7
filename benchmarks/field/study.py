"""Every method of the field on seven tasks, the same grid of learning rates for each.

Three studies. *Equal steps*: every method at one rank, its rate chosen on the first seed
from eight a factor of 4 apart and two more around the best. *Equal bytes*: every method
at the largest rank whose optimizer memory stays within that of LoRA with Adam at the
first rank, four rates around the first study's. *Equal time*: the same settings, as many
steps as fit in the time of full Adam's run, by steps timed in turn in this run. The last
two are of MNIST and the language model: elsewhere steps are too short to be timed, or
sides too small for other ranks.

Rows are saved as they come and, if there are rows already, the missing ones are added.

    python -m benchmarks.field --data-dir DIR [--quick]
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.field import report, runs
from benchmarks.field.entries import ENTRIES, Entry
from benchmarks.field.tasks import NAMES, Task
from benchmarks.shared import timing
from benchmarks.shared.results import Results, side_by_side, use_one_core

SEEDS = (0, 1, 2)
REFERENCE = "LoRA"  # whose optimizer memory is the budget
CLOCK = "full Adam"  # whose run is the time
QUICK = ("counterexample", "logistic regression", "language model")
STUDIES = ("equal steps", "equal bytes", "time", "equal time")


@functools.cache
def task_of(data_dir: pathlib.Path, name: str) -> Task:
    """A task, its data read once a process."""
    return NAMES[name](data_dir)


def entry_of(name: str) -> Entry:
    """The method of that name."""
    return next(entry for entry in ENTRIES if entry.name == name)


def study_of(task: str, study: str) -> str:
    """What rows call a study of one task."""
    return f"{task}, {study}"


def work(data_dir: pathlib.Path, task: str, entry: str, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    given, method = task_of(data_dir, task), entry_of(entry)
    runner = runs.Runner(given, method, job["rank"] or given.rank, job["seeds"])
    row = runs.measure(runner, job["rates"], job["steps"], refine=job["refine"])
    return {"study": study_of(task, job["study"]), "task": task, **row}


def settings(
    results: Results, task: Task, entry: Entry
) -> tuple[dict[str, Any], int] | None:
    """The row that gives a method's rate, and its rank at equal bytes if one fits."""
    before = results.get(study_of(task.name, "equal steps"), entry.name)
    reference = results.get(study_of(task.name, "equal steps"), REFERENCE)
    if before is None or reference is None:
        return None
    rank = runs.rank_within(task, entry, reference["optimizer_bytes"])
    return before, rank or 0


def jobs(
    results: Results, study: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of a study that are missing and can be made."""
    for name in options.tasks:
        task = task_of(options.data_dir, name)
        if study != "equal steps" and not task.timed:
            continue
        for entry in chosen(options):
            if results.get(study_of(name, study), entry.name):
                continue
            job = {
                "task": name,
                "entry": entry.name,
                "study": study,
                "rank": task.rank,
                "rates": runs.RATES,
                "steps": task.steps // options.part,
                "seeds": options.seeds,
                "refine": study == "equal steps",
            }
            if study == "equal steps":
                yield job
                continue
            found = settings(results, task, entry)
            if found is None or not (study == "equal time" or found[1]):
                continue
            before, rank = found
            rate = before["rate"]
            if study == "equal bytes":
                if rank == task.rank:  # the same run
                    results.add(before | {"study": study_of(name, study)})
                else:
                    around = tuple(rate * 2.0**power for power in (-2, -1, 0, 1))
                    yield job | {"rank": rank, "rates": around}
                continue
            steps = steps_in_time(results, task, entry)
            if steps is not None:
                at = results.get(study_of(name, "equal bytes"), entry.name) or before
                fitted = {"rank": at["rank"], "rates": (at["rate"],), "steps": steps}
                yield job | fitted


def steps_in_time(results: Results, task: Task, entry: Entry) -> int | None:
    """How many steps fit in the time of the clock's run."""
    own, clock = (
        results.get(study_of(task.name, "time"), name) for name in (entry.name, CLOCK)
    )
    if own is None or clock is None:
        return None
    steps = task.steps * clock["milliseconds"] / own["milliseconds"]
    return min(round(steps), runs.LONGEST * task.steps)


def chosen(options: argparse.Namespace) -> list[Entry]:
    """The methods that are asked for."""
    return [entry for entry in ENTRIES if re.search(options.only, entry.name)]


def race(
    data_dir: pathlib.Path, rounds: int, job: tuple[str, list[tuple[str, int]]]
) -> list[float]:
    """Seconds a step of methods and ranks on one task, in a process of its own."""
    name, timed = job
    task = task_of(data_dir, name)
    runners = [runs.Runner(task, entry_of(entry), rank, SEEDS) for entry, rank in timed]
    return runs.race(runners, rounds)


def time_all(results: Results, options: argparse.Namespace) -> None:
    """Steps of every method at the rank it has at equal bytes, timed in turn."""
    todo: list[tuple[str, list[tuple[str, int]]]] = []
    for name in options.tasks:
        task, study = task_of(options.data_dir, name), study_of(name, "time")
        timed = [
            (entry.name, found[1] or task.rank)
            for entry in chosen(options)
            if task.timed and (found := settings(results, task, entry))
        ]
        if not all(results.get(study, entry) for entry, _ in timed):
            todo.append((name, timed))
    timer = functools.partial(race, options.data_dir, options.rounds)
    for (name, timed), spent in side_by_side(timer, todo, 1):
        results.drop(study_of(name, "time"))
        results.drop(study_of(name, "equal time"))
        for (entry, rank), seconds in zip(timed, spent, strict=True):
            row = {
                "study": study_of(name, "time"),
                "task": name,
                "method": entry,
                "rank": rank if entry_of(entry).ranked else None,
                "milliseconds": 1e3 * seconds,
                "rounds": options.rounds,
            }
            results.add(row)
            print(f"{row['study']:32} {entry:32} {1e3 * seconds:.2f} ms", flush=True)


def run(options: argparse.Namespace, results: Results) -> None:
    """Every study that is asked for."""
    for study in options.studies:
        if study == "time":
            time_all(results, options)
        else:
            do = functools.partial(work, options.data_dir)
            results.fill(do, jobs(results, study, options), options.workers, each=16)


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--tasks", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    options.rounds = 1 if options.quick else 5
    options.part = 20 if options.quick else 1
    if options.quick:
        options.studies, options.tasks = STUDIES[:1], QUICK
    use_one_core()
    out = None if options.out is None else options.out / "field.json"
    results = Results(out, "field", rates=runs.RATES, seeds=SEEDS)
    # Two studies run the same programs.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        run(options, results)
    if out is not None:
        report.draw(out.with_suffix(".png"), results.rows)


if __name__ == "__main__":
    main()
