"""Runs of one method on one task: tuned, measured, timed."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from benchmarks.field.entries import Entry, Setting
from benchmarks.field.tasks import Task
from benchmarks.pretrained.run import warm_cosine
from raclora_jax.methods import Method

# Of every method alike, then the double and the half of the best.
RATES = tuple(4.0**power for power in range(-6, 2))
SIDE_BY_SIDE = 8  # runs in one program, where they are short
# Where steps are short, compiling costs more than running.
COMPILED_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
LONGEST = 3  # times the steps of the task: what a fast method may do in equal time

Case = tuple[float, int]  # a learning rate and a seed


class Runner:
    """One method on one task at one rank, compiled once for rates, seeds and lengths.

    Args:
      task: What is trained.
      entry: The method.
      rank: Of every leaf.
      seeds: All that will be asked for.
    """

    def __init__(self, task: Task, entry: Entry, rank: int, seeds: tuple[int, ...]):
        self.task, self.entry, self.rank, self.seeds = task, entry, rank, seeds
        self.setting = setting_of(task, rank)
        every = [task.batches(seed, LONGEST * task.steps) for seed in seeds]
        self.batches = tuple(np.stack(parts) for parts in zip(*every, strict=True))
        if task.together:
            many = jax.vmap(self._run, in_axes=(0, 0, None, None))
            self._compiled = jax.jit(many, compiler_options=COMPILED_FAST)
        else:
            self._compiled = jax.jit(self._run)

    def method(self, schedule: optax.Schedule, key: Array) -> Method:
        """The method over a schedule."""
        return self.entry.method(self.setting, schedule, key)

    def _run(
        self, rate: Array, place: Array, steps: Array, batches: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        seed = jnp.asarray(self.seeds)[place]
        start_key, method_key = jax.random.split(jax.random.key(seed))
        method = self.method(warm_cosine(rate, steps), method_key)
        own = tuple(part[place] for part in batches)

        def body(index: Array, state: Any) -> Any:
            batch = (part[index] for part in own)
            return method.step(state, self.task.loss, *batch)[0]

        state = lax.fori_loop(0, steps, body, method.init(self.task.start(start_key)))
        params = method.params(state)
        return self.task.tuning(params), self.task.measured(params)

    def run(self, cases: list[Case], steps: int) -> list[tuple[float, float]]:
        """The number that tunes and the number that is reported, of every case."""
        size = SIDE_BY_SIDE if self.task.together else 1
        found: list[tuple[float, float]] = []
        for first in range(0, len(cases), size):
            part = cases[first : first + size]
            filled = part + part[-1:] * (size - len(part))
            rates = jnp.asarray([rate for rate, _ in filled], jnp.float32)
            places = jnp.asarray([self.seeds.index(seed) for _, seed in filled])
            if not self.task.together:
                rates, places = rates[0], places[0]
            answers = self._compiled(rates, places, jnp.int32(steps), self.batches)
            pairs = zip(*(np.atleast_1d(answer) for answer in answers), strict=True)
            found += [tuple(map(_finite, pair)) for pair in pairs][: len(part)]
        return found

    def seconds(self, steps: int) -> float:
        """Of the processor for a run of so many steps; others do not lengthen it."""
        begun = time.process_time()
        self.run([(RATES[0], self.seeds[0])], steps)
        return time.process_time() - begun

    def facts(self) -> dict[str, int]:
        """What the method trains and keeps."""
        return facts(self.task, self.entry, self.rank)


def _finite(value: Any) -> float:
    return float(value) if np.isfinite(value) else float("inf")


def setting_of(task: Task, rank: int) -> Setting:
    """What a task gives to a method of some rank."""
    shapes = jax.eval_shape(task.start, jax.random.key(0))
    return Setting.of(task.spec(rank), shapes, task.steps)


def facts(task: Task, entry: Entry, rank: int) -> dict[str, int]:
    """Trained numbers and optimizer bytes at some rank."""
    key = jax.random.key(0)
    method = entry.method(setting_of(task, rank), lambda count: 0.0 * count, key)
    shapes = jax.eval_shape(task.start, key)
    return {
        "trained": method.trained(shapes),
        "optimizer_bytes": method.optimizer_bytes(shapes),
    }


def rank_within(task: Task, entry: Entry, budget: int) -> int | None:
    """The largest rank whose optimizer bytes stay in a budget; ``None`` if none does."""
    for rank in range(task.top_rank, 0, -1) if entry.ranked else (task.rank,):
        try:
            if facts(task, entry, rank)["optimizer_bytes"] <= budget:
                return rank
        except ValueError:  # above a side
            continue
    return None


def measure(
    runner: Runner, rates: tuple[float, ...], steps: int, *, refine: bool
) -> dict[str, Any]:
    """One row: rates tried on the first seed, all seeds at the best."""
    begun, spent = time.perf_counter(), time.process_time()
    first, *others = runner.seeds
    tried: dict[float, tuple[float, float]] = {}

    def attempt(rates: tuple[float, ...]) -> float:
        new = [rate for rate in rates if rate not in tried]
        found = runner.run([(rate, first) for rate in new], steps)
        tried.update(zip(new, found, strict=True))
        return min(tried, key=lambda rate: tried[rate][0])

    rate = attempt(rates)
    if refine:
        rate = attempt((rate / 2, rate * 2))
    later = runner.run([(rate, seed) for seed in others], steps) if others else []
    numbers = [tried[rate][1], *(number for _, number in later)]
    return {
        "method": runner.entry.name,
        "rank": runner.rank if runner.entry.ranked else None,
        **runner.facts(),
        "steps": steps,
        "rate": rate,
        "tried": [[rate, tuned] for rate, (tuned, _) in sorted(tried.items())],
        "loss": numbers,
        "loss_mean": statistics.mean(numbers),
        "loss_std": statistics.stdev(numbers)
        if np.isfinite(numbers).all() and others
        else None,
        "seeds": list(runner.seeds),
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": round(time.process_time() - spent, 1),
    }


def race(runners: list[Runner], rounds: int) -> list[float]:
    """Seconds a step of each, short and long runs timed in turn.

    The difference of two lengths leaves out what a run does once.
    """
    short, long = 5, 5 + runners[0].task.steps // 4
    spent: list[list[float]] = [[] for _ in runners]
    for turn in range(rounds + 1):
        for index, runner in enumerate(runners):
            pair = runner.seconds(short), runner.seconds(long)
            if turn:  # the first one compiles
                spent[index].append((pair[1] - pair[0]) / (long - short))
    return [statistics.median(one) for one in spent]
