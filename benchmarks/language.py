"""Every method fine-tunes a small pretrained Llama on Shakespeare, rates tuned alike.

stories260K on tiny Shakespeare: the seven matrices of each layer are tuned, embedding and
norms frozen; 8 windows of 64 tokens a step, 10 % warm-up, then a cosine to zero. The
learning rate of every method is searched on one grid of powers of two, on seed 0, until
the best has a worse neighbour on both sides. A seed decides data order and sketches.

Studies: 300 steps, 1000 steps, and the wall time of 1000 steps of full Adam, by steps
that are timed in turn in this run. Rows are saved as they come and, if there are rows
already, the missing ones are added.

    python -m benchmarks.language --data-dir DIR [--quick]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import contenders, stories, timing
from benchmarks import rows as result_rows
from benchmarks.contenders import Entry

LENGTH = 64  # tokens of a window
CHUNK = 10  # steps a call; all runs are multiples of it, so a method compiles once
WINDOWS = 256  # of validation
SEEDS = (0, 1, 2)
SHORT, LONG = 300, 1000
WARM_UP = 0.1
# One core each: these matrices are too small to share, and two runs go side by side.
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Task:
    """The model and the text.

    Args:
      data_dir: The folder with ``stories260k`` and ``tinyshakespeare``.
    """

    def __init__(self, data_dir: pathlib.Path):
        self.model, tokenizer = stories.files(data_dir)
        self.text = stories.shakespeare(data_dir, tokenizer)
        spread = stories.spread_windows(self.text.validation, WINDOWS, LENGTH)
        self._validation = jnp.asarray(spread)
        self._score = jax.jit(self.loss)

    def loss(self, layers: Any, tokens: Array) -> Array:
        """Of the adapted matrices, the rest of the model closed over."""
        return stories.loss(layers, self.model.rest, tokens, self.model.config)

    def validation_loss(self, layers: Any) -> float:
        """Over all windows."""
        return float(self._score(layers, self._validation))

    def batches(self, seed: int, steps: int, batch: int) -> Iterator[np.ndarray]:
        """Training windows, ``(CHUNK, batch, LENGTH + 1)`` at a time."""
        draw = np.random.default_rng(seed)
        for _ in range(steps // CHUNK):
            starts = draw.integers(len(self.text.train) - LENGTH, size=(CHUNK, batch))
            yield stories.windows(self.text.train, starts, LENGTH)


def rate_of(
    entry: Entry, peak: Array | float, steps: Array | int
) -> Callable[[Any], Array]:
    """Linear warm-up, cosine to zero; with ``rewarm``, up again after each new link."""
    warm = WARM_UP * steps

    def schedule(count: Any) -> Array:
        rising = jnp.minimum((count + 1) / warm, 1.0)
        done = jnp.clip((count - warm) / (steps - warm), 0, 1)
        rate = peak * rising * (1 + jnp.cos(jnp.pi * done)) / 2
        if entry.rewarm:
            rate *= jnp.minimum((count % entry.link + 1) / entry.rewarm, 1.0)
        return rate

    return schedule


class Runner:
    """One method, compiled once for all rates, seeds and lengths of a run.

    Args:
      task: What is trained.
      entry: The method.
    """

    def __init__(self, task: Task, entry: Entry):
        self.task, self.entry = task, entry
        self._init = jax.jit(self._begin)
        self._advance = jax.jit(self._chunk, donate_argnums=0)

    def _begin(self, key: Array, layers: Any) -> Any:
        return self.entry.make(lambda count: 0.0 * count, key).init(layers)

    def _chunk(
        self, state: Any, peak: Array, steps: Array, key: Array, tokens: Array
    ) -> tuple[Any, Array]:
        method = self.entry.make(rate_of(self.entry, peak, steps), key)
        return lax.scan(
            lambda state, batch: method.step(state, self.task.loss, batch), state, tokens
        )

    def start(self, seed: int) -> Any:
        """The state before the first step."""
        return self._init(jax.random.key(seed), self.task.model.layers)

    def advance(
        self, state: Any, rate: float, steps: int, seed: int, tokens: np.ndarray
    ) -> tuple[Any, Array]:
        """``CHUNK`` steps, and the loss of each."""
        key = jax.random.key(seed)
        return self._advance(state, jnp.float32(rate), jnp.float32(steps), key, tokens)

    def run(self, rate: float, steps: int, seed: int) -> float:
        """The validation loss at the end of a run."""
        state = self.start(seed)
        for tokens in self.task.batches(seed, steps, self.entry.batch):
            state, _ = self.advance(state, rate, steps, seed, tokens)
        method = self.entry.make(lambda count: 0.0 * count, jax.random.key(seed))
        return self.task.validation_loss(method.params(state))

    def facts(self) -> dict[str, int]:
        """What the method trains and keeps."""
        method = self.entry.make(lambda count: 0.0 * count, jax.random.key(0))
        layers = self.task.model.layers
        return {
            "trained": method.trained(layers),
            "optimizer_bytes": method.optimizer_bytes(layers),
        }


# Tuning ------------------------------------------------------------------------------


def search(score: Callable[[float], float], guess: float) -> dict[float, float]:
    """Losses by rate, on ``guess`` times powers of two, until the best is inside."""
    found: dict[int, float] = {}

    def at(power: int) -> float:
        if power not in found:
            loss = score(guess * 2.0**power)
            found[power] = loss if np.isfinite(loss) else float("inf")
        return found[power]

    best = 0
    while True:
        below, above = at(best - 1), at(best + 1)
        nearest = min((at(best), best), (below, best - 1), (above, best + 1))[1]
        if nearest == best:
            return {guess * 2.0**power: found[power] for power in sorted(found)}
        best = nearest


def fitted(tried: dict[float, float]) -> float:
    """Where a parabola through the best and its neighbours, over log rate, is lowest."""
    rates = list(tried)
    at = min(range(len(rates)), key=lambda i: tried[rates[i]])
    low, best, high = (tried[rates[i]] for i in (at - 1, at, at + 1))
    if not np.isfinite(low + high) or low + high <= 2 * best:
        return rates[at]
    return rates[at] * 2 ** (0.5 * (low - high) / (low - 2 * best + high))


def contest(
    runner: Runner,
    study: str,
    steps: int,
    seeds: tuple[int, ...],
    guess: float,
    tune: bool = True,
) -> dict[str, Any]:
    """The row of one method at one length: rate tuned on the first seed, then all."""
    begun = time.perf_counter()

    def score(rate: float) -> float:
        return runner.run(rate, steps, seeds[0])

    tried = search(score, guess) if tune else {guess: score(guess)}
    rate = min(tried, key=lambda rate: tried[rate])
    losses = [tried[rate], *(runner.run(rate, steps, seed) for seed in seeds[1:])]
    return {
        "study": study,
        "method": runner.entry.name,
        **runner.facts(),
        "batch": runner.entry.batch,
        "steps": steps,
        "rate": rate,
        "fitted_rate": fitted(tried) if tune else None,
        "tried": [[rate, loss] for rate, loss in tried.items()],
        "loss": losses,
        "loss_mean": statistics.mean(losses),
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "seeds": list(seeds),
        "seconds": round(time.perf_counter() - begun, 1),
    }


# Timing ------------------------------------------------------------------------------


def race(task: Task, entries: list[Entry], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds a step, chunks timed in turn so that noise hits all alike."""
    runners = [Runner(task, entry) for entry in entries]
    states = [runner.start(0) for runner in runners]
    # Long enough that links end as often as they do in a run.
    spent: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for index, runner in enumerate(runners):
            tokens = list(task.batches(turn, 5 * CHUNK, runner.entry.batch))
            begun = time.perf_counter()
            for part in tokens:
                states[index], losses = runner.advance(states[index], 1e-3, LONG, 0, part)
            jax.block_until_ready(losses)
            if turn:  # the first one compiles
                spent[index].append((time.perf_counter() - begun) / (5 * CHUNK))
    table = np.array(spent)
    ratios = np.median(table / table[:1], axis=1)
    return [
        {
            "study": "time",
            "method": entry.name,
            "milliseconds": 1e3 * float(np.median(table[index])),
            "over_full_adam": float(ratios[index]),
        }
        for index, entry in enumerate(entries)
    ]


def steps_in_time(row: dict[str, Any]) -> int:
    """How many steps fit in the time of ``LONG`` steps of full Adam."""
    return CHUNK * round(LONG / row["over_full_adam"] / CHUNK)


# The program -------------------------------------------------------------------------


@functools.cache
def _task(data_dir: pathlib.Path) -> Task:
    return Task(data_dir)


@functools.cache
def _runner(data_dir: pathlib.Path, name: str) -> Runner:
    entry = next(entry for entry in contenders.everything() if entry.name == name)
    return Runner(_task(data_dir), entry)


def _work(data_dir: pathlib.Path, name: str, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    return contest(_runner(data_dir, name), **job)


class Results:
    """The rows so far, saved whenever one is added.

    Args:
      path: The file; its rows are taken over. ``None`` keeps nothing.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path, self.rows = path, []
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """In the place of the row of the same study and method, if there is one."""
        row = row | {"commit": result_rows.provenance()["commit"]}
        same = [self._name(row) == self._name(old) for old in self.rows]
        if any(same):
            self.rows[same.index(True)] = row
        else:
            self.rows.append(row)
        if self.path is not None:
            result_rows.save(
                self.path,
                "python -m benchmarks.language",
                self.rows,
                tokens_a_step="batch x 64",
                validation_windows=WINDOWS,
                warm_up=WARM_UP,
                xla_flags=ONE_CORE,
            )

    def get(self, study: str, method: str) -> dict[str, Any] | None:
        """The row of a study and a method."""
        wanted = (study, method)
        return next((row for row in self.rows if self._name(row) == wanted), None)

    @staticmethod
    def _name(row: dict[str, Any]) -> tuple[str, str]:
        return row["study"], row["method"]


def jobs(results: Results, study: str, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of a study that are missing and can be made."""
    for entry in contenders.of_study(study):
        if not re.search(options.only, entry.name) or results.get(study, entry.name):
            continue
        job = {"name": entry.name, "study": study, "seeds": options.seeds}
        if study in ("equal steps", "explored"):
            steps = CHUNK if options.quick else SHORT
            yield job | {"steps": steps, "guess": entry.guess}
        elif study == "long":
            short = results.get("equal steps", entry.name)
            if short is not None:
                yield job | {"steps": LONG, "guess": short["rate"]}
        else:
            long = results.get("long", entry.name)
            timed = results.get(contenders.CLOCKS[study], entry.name)
            if long is not None and timed is not None:
                steps = steps_in_time(timed)
                yield job | {"steps": steps, "guess": long["rate"], "tune": False}


def run(options: argparse.Namespace, results: Results) -> None:
    """Every study that is asked for."""
    if "time" in options.studies:
        for row in race(_task(options.data_dir), contenders.timed(), options.rounds):
            results.add(row)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, spawn) as pool:
        for study in options.studies:
            if study == "time":
                continue
            waiting = [
                pool.submit(_work, options.data_dir, **job)
                for job in jobs(results, study, options)
            ]
            for done in concurrent.futures.as_completed(waiting):
                row = done.result()
                results.add(row)
                print(
                    f"{row['study']:16} {row['method']:44} {row['steps']:5} steps "
                    f"rate {row['rate']:<8g} {row['loss_mean']:.3f} "
                    f"± {row['loss_std'] or 0:.3f}  {row['seconds']} s",
                    flush=True,
                )


STUDIES = ("time", "equal steps", "long", "equal time", "equal decoder time", "explored")


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser)
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    options.rounds = 1 if options.quick else 7
    if options.quick:
        options.studies, options.only = ("equal steps",), "^(full Adam|RAC r8 orth.*al)$"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE}"
    out = None if options.out is None else options.out / "language.json"
    run(options, Results(out))


if __name__ == "__main__":
    main()
