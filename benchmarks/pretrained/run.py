"""One run of one method on the language task, its tuning and its timing."""

from __future__ import annotations

import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.pretrained import stories
from benchmarks.pretrained.entries import Entry

LENGTH = 64  # tokens of a window
CHUNK = 10  # steps a call; all runs are multiples of it, so a method compiles once
WINDOWS = 256  # of validation
WARM_UP = 0.1


class Task:
    """The model and the text; another task has the same methods.

    Args:
      data_dir: The folder with ``stories260k`` and the texts.
      text: A key of ``stories.TEXTS``.
    """

    def __init__(self, data_dir: pathlib.Path, text: str = "Shakespeare"):
        self.model, tokenizer = stories.files(data_dir)
        self.text = stories.encoded(stories.TEXTS[text](data_dir), tokenizer.encode)
        spread = stories.spread_windows(self.text.validation, WINDOWS, LENGTH)
        self._validation = jnp.asarray(spread)
        self._score = jax.jit(self.loss)

    @property
    def params(self) -> Any:
        """Where every run starts."""
        return self.model.layers

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


def warm_cosine(peak: Array | float, steps: Array | int) -> Callable[[Any], Array]:
    """Linear warm-up, then a cosine to zero."""
    warm = WARM_UP * steps

    def schedule(count: Any) -> Array:
        rising = jnp.minimum((count + 1) / warm, 1.0)
        done = jnp.clip((count - warm) / (steps - warm), 0, 1)
        return peak * rising * (1 + jnp.cos(jnp.pi * done)) / 2

    return schedule


def rate_of(
    entry: Entry, peak: Array | float, steps: Array | int
) -> Callable[[Any], Array]:
    """``warm_cosine``; with ``rewarm``, it rises again after each new link."""
    once = warm_cosine(peak, steps)
    if not entry.rewarm:
        return once
    return lambda count: (
        once(count) * jnp.minimum((count % entry.link + 1) / entry.rewarm, 1.0)
    )


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
        return self._init(jax.random.key(seed), self.task.params)

    def advance(
        self, state: Any, rate: float, steps: int, seed: int, tokens: np.ndarray
    ) -> tuple[Any, Array]:
        """``CHUNK`` steps, and the loss of each."""
        key = jax.random.key(seed)
        return self._advance(state, jnp.float32(rate), jnp.float32(steps), key, tokens)

    def trained(self, rate: float, steps: int, seed: int) -> Any:
        """The parameters at the end of a run."""
        state = self.start(seed)
        for tokens in self.task.batches(seed, steps, self.entry.batch):
            state, _ = self.advance(state, rate, steps, seed, tokens)
        method = self.entry.make(lambda count: 0.0 * count, jax.random.key(seed))
        return method.params(state)

    def run(self, rate: float, steps: int, seed: int) -> float:
        """The validation loss at the end of a run."""
        return self.task.validation_loss(self.trained(rate, steps, seed))

    def facts(self) -> dict[str, int]:
        """What the method trains and keeps."""
        method = self.entry.make(lambda count: 0.0 * count, jax.random.key(0))
        params = self.task.params
        return {
            "trained": method.trained(params),
            "optimizer_bytes": method.optimizer_bytes(params),
        }


# Tuning ------------------------------------------------------------------------------


def search(
    score: Callable[[float], float],
    guess: float,
    factor: float = 2.0,
    powers: Iterable[int] = (0,),
) -> dict[float, float]:
    """Losses by rate, on ``guess`` times powers of a factor, until the best is inside.

    It goes down from the best of ``powers``: where a loss has more than one valley, from
    a first that reaches them all.
    """
    found: dict[int, float] = {}

    def at(power: int) -> float:
        if power not in found:
            loss = score(guess * factor**power)
            found[power] = loss if np.isfinite(loss) else float("inf")
        return found[power]

    best = min(powers, key=at)
    while True:
        below, above = at(best - 1), at(best + 1)
        nearest = min((at(best), best), (below, best - 1), (above, best + 1))[1]
        if nearest == best:
            return {guess * factor**power: found[power] for power in sorted(found)}
        best = nearest


def lowered(score: Callable[[float], float], rate: float) -> dict[float, float]:
    """Losses by rate, from one downwards by halves until the next is worse."""
    found = {rate: score(rate), rate / 2: score(rate / 2)}
    while found[rate / 2] < found[rate]:
        rate /= 2
        found[rate / 2] = score(rate / 2)
    return dict(sorted(found.items()))


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
    held_out: int | None = None,
    tuning_steps: int | None = None,
) -> dict[str, Any]:
    """The row of one method at one length: its rate tuned, then all seeds.

    The rate is chosen by what is reported of the first seed; with ``held_out``, a seed,
    by the ``tuning_loss`` of the task on that one, and nothing of it is reported. With
    ``tuning_steps`` runs of so many steps search, and whole ones go down from what they
    found: what is too fast for a long run may win a short one.
    """
    begun = time.perf_counter()

    def score(rate: float, steps: int = steps) -> float:
        if held_out is None:
            return runner.run(rate, steps, seeds[0])
        return runner.task.tuning_loss(runner.trained(rate, steps, held_out))

    short, tried = {}, {}
    if tune and tuning_steps:
        short = search(functools.partial(score, steps=tuning_steps), guess)
        tried = lowered(score, min(short, key=lambda rate: short[rate]))
    elif tune:
        tried = search(score, guess)
    rate = min(tried, key=lambda rate: tried[rate], default=guess)
    known = [tried[rate]] if tune and held_out is None else []
    losses = [*known, *(runner.run(rate, steps, seed) for seed in seeds[len(known) :])]
    return {
        "study": study,
        "method": runner.entry.name,
        **runner.facts(),
        "batch": runner.entry.batch,
        "steps": steps,
        "rate": rate,
        "fitted_rate": fitted(tried) if tune and not short else None,
        "tried": [[rate, loss] for rate, loss in tried.items()],
        "tried_short": [[rate, loss] for rate, loss in short.items()],
        "loss": losses,
        "loss_mean": statistics.mean(losses),
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "seeds": list(seeds),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def tuned_rates(
    runner: Runner, study: str, steps: int, seeds: tuple[int, ...], guess: float
) -> dict[str, Any]:
    """The row of one method whose rate is tuned on every seed by itself."""
    begun = time.perf_counter()
    tried = {
        seed: search(lambda rate, seed=seed: runner.run(rate, steps, seed), guess)
        for seed in seeds
    }
    rates = [fitted(found) for found in tried.values()]
    losses = [min(found.values()) for found in tried.values()]
    return {
        "study": study,
        "method": runner.entry.name,
        "steps": steps,
        "rate": statistics.geometric_mean(rates),
        "fitted_rates": rates,
        "tried": [[[rate, loss] for rate, loss in t.items()] for t in tried.values()],
        "loss_mean": statistics.mean(losses),
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "seeds": list(seeds),
        "seconds": round(time.perf_counter() - begun, 1),
    }


# Timing ------------------------------------------------------------------------------


def race(task: Task, entries: list[Entry], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds a step of one core, parts of runs timed in turn.

    In seconds of the processor, which others on the machine do not lengthen, and each
    part of a run as long as two links.
    """
    runners = [Runner(task, entry) for entry in entries]
    states = [runner.start(0) for runner in runners]
    spent: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for index, runner in enumerate(runners):
            tokens = list(task.batches(turn, 5 * CHUNK, runner.entry.batch))
            begun = time.process_time()
            for part in tokens:
                states[index], losses = runner.advance(states[index], 1e-3, 1000, 0, part)
            jax.block_until_ready(losses)
            if turn:  # the first one compiles
                spent[index].append((time.process_time() - begun) / (5 * CHUNK))
    table = np.array(spent)
    ratios = np.median(table / table[:1], axis=1)
    return [
        {
            "study": "time",
            "method": entry.name,
            "milliseconds": 1e3 * float(np.median(table[index])),
            "over_full_adam": float(ratios[index]),
            "rounds": rounds,
        }
        for index, entry in enumerate(entries)
    ]
