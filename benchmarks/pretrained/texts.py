"""Three texts in the time of full Adam, and how long the lead of each method lasts.

stories260K learns tiny Shakespeare, problems of GSM8K, or WikiText-2: the seven matrices
of each layer are tuned, 8 windows of 64 tokens a step, 10 % warm-up, then a cosine to
zero. The learning rate of every method is searched on one grid of powers of two, by a
seed and by windows of the held-out text that are not reported: the even ones choose, the
odd ones are reported. It is searched again for every length.

Studies: steps timed in turn in this run; runs of 300 and 1000 steps on every text, and of
3,000 and 10,000 on WikiText-2, the longest; and for the first two lengths as many steps
as fit in the time of full Adam's, at the rate of that length. Rows are saved as they come
and missing ones are added.

    python -m benchmarks.pretrained.texts --data-dir DIR [--quick] [--steps 300 1000]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

import raclora_jax as rl
from benchmarks.pretrained import entries, run, stories
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods

TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
LENGTHS = (300, 1000, 3000, 10_000)
TIMED = (300, 1000)  # run in the time of full Adam, too
LONG = "WikiText-2"  # the text of the longer ones


class Task(run.Task):
    """The language task, whose rates are chosen on windows that are not reported."""

    def __init__(self, data_dir: pathlib.Path, text: str):
        super().__init__(data_dir, text)
        self._halve()

    def _halve(self, count: int = run.WINDOWS) -> None:
        """Windows of the held-out text, in turn for choosing and for reporting."""
        windows = stories.spread_windows(self.text.validation, 2 * count, run.LENGTH)
        self._tuning, self._validation = map(jnp.asarray, (windows[::2], windows[1::2]))

    def tuning_loss(self, layers: Any) -> float:
        """Over the windows that choose a rate."""
        return float(self._score(layers, self._tuning))


def contenders() -> list[Entry]:
    """The contenders, those the claim is about first."""
    whole = {"rules": [rl.Rule(".*", mode="full")], "fused": True}
    momentum = {"inner": entries.momentum, "guess": 1e-3}
    quarters = functools.partial(rl.orthogonal, block_size=16)
    remembers = functools.partial(rl.orthogonal, memory=0.9)

    def blocks(part: int, name: str, **options: Any) -> Entry:
        named = f"blocks of dim/{part}, {name}"
        return entries.ours(named, 64 // part, sketch="block", **options)

    def remembering(part: int, memory: float, link: int) -> Entry:
        inner = functools.partial(rl.orthogonal, memory=memory)
        name = f"memory {memory:g}, links of {link}"
        return blocks(part, name, inner=inner, resample_every=link)

    return [
        entries.full("full Adam", 2e-3),
        entries.ours("full orthogonal, fused", 32, **whole),
        entries.pair("LoRA r8 Adam", methods.lora, 8, 8e-3),
        blocks(4, "orthogonal"),
        blocks(2, "orthogonal"),
        remembering(4, 0.5, 25),
        *(remembering(part, 1.0, 100) for part in (4, 2)),
        entries.ours("RAC r12 Adam, links of 100", 12, inner=None, resample_every=100),
        entries.ours(
            "RAC r24 Adam by columns, links of 100",
            24,
            inner=entries.column_adam,
            resample_every=100,
        ),
        entries.ours(
            "full orthogonal in blocks of dim/4, fused",
            32,
            inner=quarters,
            **whole,
        ),
        blocks(2, "orthogonal in halves", inner=quarters),
        entries.ours("full orthogonal, momentum 0.9, fused", 32, **momentum, **whole),
        entries.ours("full orthogonal, memory 0.9, fused", 32, inner=remembers, **whole),
        *(
            blocks(part, "momentum 0.9, links of 100", resample_every=100, **momentum)
            for part in (4, 2)
        ),
    ]


# The program -------------------------------------------------------------------------


@functools.cache
def _task(data_dir: pathlib.Path, text: str) -> Task:
    return Task(data_dir, text)


@functools.cache
def _runner(data_dir: pathlib.Path, text: str, name: str) -> run.Runner:
    entry = next(entry for entry in contenders() if entry.name == name)
    return run.Runner(_task(data_dir, text), entry)


def _work(data_dir: pathlib.Path, text: str, name: str, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    return run.contest(_runner(data_dir, text, name), held_out=TUNING_SEED, **job)


def study_of(text: str, steps: int, timed: bool = False) -> str:
    """What rows call a length on a text, or the time that full Adam takes for it."""
    return f"{text}, {'the time of ' if timed else ''}{steps} steps"


def jobs(results: Results, steps: int, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of a length that are missing; a search begins where a shorter ended."""
    texts = options.texts if steps in TIMED else [LONG]
    shorter = [length for length in reversed(LENGTHS) if length < steps]
    for entry in contenders():
        if not re.search(options.only, entry.name):
            continue
        for text in texts:
            study = study_of(text, steps)
            if results.get(study, entry.name):
                continue
            known = (results.get(study_of(text, n), entry.name) for n in shorter)
            before = next(filter(None, known), None)
            yield {
                "text": text,
                "name": entry.name,
                "study": study,
                "steps": run.CHUNK if options.quick else steps,
                "seeds": options.seeds if steps in TIMED else options.seeds[:3],
                "guess": before["rate"] if before else entry.guess,
                "tune": not options.quick,
            }


def in_time(results: Results, steps: int, options: argparse.Namespace) -> Iterator[dict]:
    """The rows in the time of full Adam's steps that are missing and can be made."""
    for entry in contenders():
        own = results.get("time", entry.name)
        if steps not in TIMED or not own or not re.search(options.only, entry.name):
            continue
        for text in options.texts:
            study = study_of(text, steps, timed=True)
            tuned = results.get(study_of(text, steps), entry.name)
            fit = run.CHUNK * round(steps / own["over_full_adam"] / run.CHUNK)
            if not tuned or results.get(study, entry.name):
                continue
            if fit == tuned["steps"]:  # the same run
                results.add(tuned | {"study": study})
            else:
                yield {
                    "text": text,
                    "name": entry.name,
                    "study": study,
                    "steps": fit,
                    "seeds": options.seeds,
                    "guess": tuned["rate"],
                    "tune": False,
                }


STUDIES = ("equal steps", "time", "equal time")


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument(
        "--texts", nargs="+", choices=stories.TEXTS, default=stories.TEXTS
    )
    parser.add_argument("--steps", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    if options.quick:
        options.texts, options.steps = ["GSM8K"], LENGTHS[:1]
        options.studies = STUDIES[:2]
        options.only = "^blocks of dim/4, memory 0.5"
    use_one_core()
    path = None if options.out is None else options.out / "texts.json"
    results = Results(
        path,
        "pretrained.texts",
        tokens_a_step=f"8 x {run.LENGTH}",
        validation_windows=run.WINDOWS,
        tuning_seed=TUNING_SEED,
        warm_up=run.WARM_UP,
    )
    clock, *others = contenders()
    timed = [clock, *(e for e in others if re.search(options.only, e.name))]
    known = all(results.get("time", entry.name) for entry in timed)
    if "time" in options.studies and not known:
        rounds = 1 if options.quick else 5
        raced = run.race(_task(options.data_dir, LONG), timed, rounds)
        for text, steps in itertools.product(stories.TEXTS, TIMED):
            results.drop(study_of(text, steps, timed=True))
        results.replace("time", raced)
    work = functools.partial(_work, options.data_dir)
    kinds = {"equal steps": jobs, "equal time": in_time}
    asked = [kinds[study] for study in kinds if study in options.studies]
    for steps in options.steps:
        for missing in asked:
            results.fill(work, missing(results, steps, options), options.workers)


if __name__ == "__main__":
    main()
