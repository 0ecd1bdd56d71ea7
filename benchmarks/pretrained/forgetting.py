"""What a model forgets of its first text while it learns another.

stories260K, which Adam trained on short stories, learns tiny Shakespeare by every method
at the rate that ``benchmarks.pretrained.language`` tuned for 1000 steps. Every 50 steps
two losses are taken: on held-out Shakespeare, and on stories that the model wrote itself
before the first step, at temperature 1, where its loss was as small as it can be.
Methods are compared where they have learnt equally much: what was forgotten when the
loss on Shakespeare first passed a level, on a line between two measurements.

    python -m benchmarks.pretrained.forgetting --data-dir DIR [--quick]
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.pretrained import language, run, stories
from benchmarks.shared import rows as result_rows
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core

SEEDS = (0, 1, 2, 3, 4)
STEPS, EVERY = 1000, 50
METHODS = (
    "full Adam",
    "full orthogonal",
    "LoRA r8 Adam",
    "RAC r12 Adam",
    "RAC r8 block orthogonal",
    "RAC r16 block orthogonal",
    "RAC r32 block orthogonal",
)
LEVELS = (3.2, 3.0, 2.9, 2.85, 2.8)  # losses on the new text


class Task(run.Task):
    """The language task, with stories of the model's own."""

    def __init__(self, data_dir: pathlib.Path):
        super().__init__(data_dir)
        self._stories = written(self.model, run.WINDOWS, run.LENGTH)
        self.before = self.own_loss(self.params)

    def own_loss(self, layers: Any) -> float:
        """On what the model wrote before it was tuned."""
        return float(self._score(layers, self._stories))


@functools.partial(jax.jit, static_argnames=("config", "count", "length"))
def _written(layers: Any, rest: Any, config: Any, count: int, length: int) -> Array:
    def grow(texts: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        index, key = at
        scores = stories.logits(layers, rest, texts[:, :-1], config)
        chosen = jax.random.categorical(key, scores[:, index])
        return texts.at[:, index + 1].set(chosen.astype(jnp.int32)), None

    start = jnp.zeros((count, length + 1), jnp.int32).at[:, 0].set(1)
    keys = jax.random.split(jax.random.key(0), length)
    texts, _ = lax.scan(grow, start, (jnp.arange(length), keys))
    return texts


def written(model: stories.Model, count: int, length: int) -> Array:
    """Texts ``(count, length + 1)`` drawn from a model, each from the start token."""
    return _written(model.layers, model.rest, model.config, count, length)


def curve(task: Task, runner: run.Runner, rate: float, steps: int, seed: int) -> Any:
    """``(new, forgotten)`` after every ``EVERY`` steps of a run."""
    points = [(task.validation_loss(task.params), 0.0)]
    state = runner.start(seed)
    method = runner.entry.make(lambda count: 0.0 * count, jax.random.key(seed))
    for done, tokens in enumerate(task.batches(seed, steps, runner.entry.batch), 1):
        state, _ = runner.advance(state, rate, steps, seed, tokens)
        if done * run.CHUNK % EVERY == 0:
            params = method.params(state)
            forgotten = task.own_loss(params) - task.before
            points.append((task.validation_loss(params), forgotten))
    return points


def forgotten_at(level: float, points: list[tuple[float, float]]) -> float | None:
    """What was forgotten when the new loss first passed a level; ``None`` if never."""
    for (above, less), (below, more) in itertools.pairwise(points):
        if above > level >= below:
            return less + (more - less) * (above - level) / (above - below)
    return None


def row(task: Task, name: str, rate: float, steps: int, seeds: Any) -> dict[str, Any]:
    """One method: its curves, and what it forgot at every level."""
    begun = time.perf_counter()
    entry = next(entry for entry in language.everything() if entry.name == name)
    runner = run.Runner(task, entry)
    curves = [curve(task, runner, rate, steps, seed) for seed in seeds]
    at_levels = {
        str(level): [forgotten_at(level, points) for points in curves] for level in LEVELS
    }
    ends = [points[-1][0] for points in curves]
    return {
        "study": "forgetting",
        "method": name,
        "steps": steps,
        "rate": rate,
        "seeds": list(seeds),
        "before": task.before,
        "curves": curves,
        "forgotten_at": at_levels,
        "forgotten_at_end": [points[-1][1] for points in curves],
        "loss": ends,
        "loss_mean": statistics.mean(ends),
        "loss_std": statistics.stdev(ends) if len(ends) > 1 else None,
        "seconds": round(time.perf_counter() - begun, 1),
    }


@functools.cache
def _task(data_dir: pathlib.Path) -> Task:
    return Task(data_dir)


def _work(data_dir: pathlib.Path, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    return row(_task(data_dir), **job)


def jobs(results: Results, options: Any) -> Iterator[dict[str, Any]]:
    """The rows that are missing, at the rates of the language study."""
    tuned = {
        one["method"]: one["rate"]
        for one in result_rows.read("pretrained/language")
        if one["study"] == "long"
    }
    for name in METHODS:
        if re.search(options.only, name) and not results.get("forgetting", name):
            yield {
                "name": name,
                "rate": tuned[name],
                "steps": EVERY if options.quick else STEPS,
                "seeds": SEEDS[:1] if options.quick else SEEDS,
            }


def main() -> None:
    """Runs the study and prints its rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    if options.quick:
        options.only = "^full Adam$"
    use_one_core()
    path = None if options.out is None else options.out / "forgetting.json"
    results = Results(
        path,
        "pretrained.forgetting",
        tokens_a_step=f"8 x {run.LENGTH}",
        windows=run.WINDOWS,
        levels=LEVELS,
        warm_up=run.WARM_UP,
    )
    work = functools.partial(_work, options.data_dir)
    results.fill(work, jobs(results, options), options.workers)


if __name__ == "__main__":
    main()
