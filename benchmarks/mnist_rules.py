"""Which rule, link length, law and rank: MNIST with one learning rate for all ranks.

The experiment of ``python -m benchmarks.finetune --data mnist`` in 20 epochs in place of
100. The columns are sketched, ``alpha="dim"``. Every cell searches its learning rate on
one grid of powers of two until the best has a worse neighbour on both sides, on
validation images and two seeds of their own, and then runs three seeds. Rows are saved
as they come.

    python -m benchmarks.mnist_rules --data-dir DIR
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import raclora_jax as rl
from benchmarks import rows as result_rows
from benchmarks.contest import search
from benchmarks.finetune import data, entries, training
from benchmarks.finetune import study as finetune
from benchmarks.language import ONE_CORE
from raclora_jax import methods

EPOCHS = 20
SEEDS = (0, 1, 2)
TUNING_SEEDS = (1000, 1001)
RANKS = (1, 4, entries.RANK)
LAWS = ("orthonormal", "block")
LINKS = (1, 5, 25, 100)
# Each with the learning rate at which its search starts.
RULES: dict[str, tuple[Callable[[], optax.GradientTransformation], float]] = {
    "orthogonal": (rl.orthogonal, 0.001),
    "Adam": (optax.scale_by_adam, 0.001),
    "identity": (optax.identity, 0.016),
}


class Cell(NamedTuple):
    """One setting; rank 0 is full fine-tuning."""

    rule: str
    rank: int = 0
    law: str | None = None
    link: int | None = None
    side: str | None = None

    def build(self) -> training.Build:
        """The method, for a schedule and a key."""
        inner = RULES[self.rule][0]()
        if not self.rank:
            return lambda schedule, _: methods.full(schedule, inner=inner)
        spec = dataclasses.replace(
            entries.sketched(self.rank, side=self.side),
            sketch=self.law,
            resample_every=self.link,
        )
        return lambda lr, key: methods.raclora(lr, spec, inner=inner, key=key)


def cells() -> list[Cell]:
    """All of them, the other side at one link; those of ``identity`` come last."""
    practice, theory = ("orthogonal", "Adam"), ("identity",)
    crossed = list(itertools.product(LINKS, RANKS, LAWS))
    other = itertools.product((1, entries.RANK), LAWS, practice)
    return [
        *(Cell(rule) for rule in RULES),
        *(
            Cell(rule, r, law, link, "right")
            for link, r, law in crossed
            for rule in practice
        ),
        *(Cell(rule, r, law, 25, "left") for r, law, rule in other),
        *(
            Cell(rule, r, law, link, "right")
            for link, r, law in crossed
            for rule in theory
        ),
    ]


@functools.cache
def _begin(data_dir: pathlib.Path) -> tuple[Any, data.Task, int]:
    """The pre-trained weights, the task and the steps of a run."""
    before, after = data.mnist(data_dir)
    base = finetune.mnist_setting(after)
    params = finetune.pretrain(before, base.steps // 4, base.batch)
    return params, after, base.steps // 100 * EPOCHS


def row_of(data_dir: pathlib.Path, cell: Cell) -> dict[str, Any]:
    """One cell, tuned and measured."""
    params, task, steps = _begin(data_dir)
    build = cell.build()
    run = training.runner(build, task, steps=steps, batch=128, blocks=1)

    @functools.cache
    def result(rate: float, seed: int) -> training.Result:
        return run(params, jnp.float32(rate), jax.random.key(seed))

    def missed(rate: float) -> float:
        scores = [result(rate, seed).validation[-1] for seed in TUNING_SEEDS]
        return 1 - statistics.mean(map(float, scores))

    tried = search(missed, RULES[cell.rule][1])
    rate = min(tried, key=lambda rate: tried[rate])
    final = [100 * float(result(rate, seed).test[-1]) for seed in SEEDS]
    method = build(optax.constant_schedule(rate), jax.random.key(0))
    return {
        **cell._asdict(),
        "trained": method.trained(params),
        "optimizer_bytes": method.optimizer_bytes(params),
        "learning_rate": rate,
        "tried": [[rate, round(100 * (1 - miss), 3)] for rate, miss in tried.items()],
        "accuracy_mean": round(statistics.mean(final), 3),
        "accuracy_std": round(statistics.stdev(final), 3),
        "accuracy": np.round(final, 3).tolist(),
    }


def main() -> None:
    """Runs all cells and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=result_rows.RESULTS)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE}"
    table = cells()
    rows: dict[Cell, dict[str, Any]] = {}
    spawn = multiprocessing.get_context("spawn")
    # Compiled programs stay in memory, so a process makes some rows and is replaced.
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, spawn, max_tasks_per_child=16
    ) as pool:
        waiting = {pool.submit(row_of, options.data_dir, cell): cell for cell in table}
        for done in concurrent.futures.as_completed(waiting):
            row = rows[waiting[done]] = done.result()
            words = " ".join(str(word) for word in waiting[done])
            mean, spread = row["accuracy_mean"], row["accuracy_std"]
            print(f"{words:40} {mean:.2f} ± {spread:.2f}", row["tried"], flush=True)
            result_rows.save(
                options.out / "mnist_rules.json",
                "python -m benchmarks.mnist_rules",
                [rows[cell] for cell in table if cell in rows],
                seeds=SEEDS,
                tuning_seeds=TUNING_SEEDS,
                epochs=EPOCHS,
                batch=128,
            )


if __name__ == "__main__":
    main()
