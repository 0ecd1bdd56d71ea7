"""Which rule, link length, law and rank: MNIST with one learning rate for all ranks.

The experiment of ``python -m benchmarks.finetune --data mnist`` in 20 epochs in place of
100. RAC-LoRA sketches the columns unless said, with ``alpha="dim"``. Every cell searches
its learning rate on one grid of powers of two, on validation images and the first seed,
until the best has a worse neighbour on both sides; then come the other seeds. Rows are
saved as they come and, if there are rows already, the missing ones are added.

    python -m benchmarks.finetune.mnist_rules --data-dir DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import raclora_jax as rl
from benchmarks.finetune import data, entries, training
from benchmarks.finetune import study as finetune
from benchmarks.pretrained.entries import factor_form
from benchmarks.pretrained.run import search
from benchmarks.shared import rows as result_rows
from benchmarks.shared.results import side_by_side, use_one_core
from raclora_jax import methods

EPOCHS = 20
SEEDS = (0, 1, 2)
RANKS = (1, 4, entries.RANK)
LAWS = ("orthonormal", "block")
LINKS = (25, 1, 100, 5)
RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "orthogonal": rl.orthogonal,
    "Adam": optax.scale_by_adam,
    "identity": optax.identity,
}
PAIRS = {"LoRA": methods.lora, "Chain of LoRA": methods.cola}


class Cell(NamedTuple):
    """One setting; what a method has no use for is ``None``."""

    method: str
    rule: str
    rank: int | None = None
    link: int | None = None
    law: str | None = None
    side: str | None = None

    def build(self) -> training.Build:
        """The method, for a schedule and a key."""
        inner = RULES[self.rule]()
        if self.method == "full fine-tuning":
            return lambda schedule, _: methods.full(schedule, inner=inner)
        if self.method in PAIRS:
            make = entries.keyed(PAIRS[self.method], inner=inner)
            pair = rl.Spec(self.rank, side="left", rest="frozen")
            return entries.Entry(self.method, make, pair, True).build(self.link)
        spec = dataclasses.replace(
            entries.sketched(self.rank, side=self.side),
            sketch=self.law,
            resample_every=self.link,
        )
        return lambda schedule, key: factor_form(
            schedule, spec, inner=inner, moments="reset", key=key
        )

    def guess(self) -> float:
        """Where the search begins."""
        return 0.016 if self.rule == "identity" or self.method in PAIRS else 0.001


def cells() -> list[Cell]:
    """All of them; those of ``identity`` come last."""
    practice = ("orthogonal", "Adam")
    ours = functools.partial(Cell, "RAC-LoRA")
    ends = (1, entries.RANK)
    right = list(itertools.product(LINKS, RANKS, LAWS))
    return [
        *(Cell("full fine-tuning", rule) for rule in RULES),
        *(Cell("LoRA", rule, rank) for rank in ends for rule in practice),
        *(
            ours(rule, r, link, law, "right")
            for link, r, law in right
            for rule in practice
        ),
        *(
            ours(rule, r, 25, law, "left")
            for r in ends
            for law in LAWS
            for rule in practice
        ),
        *(
            Cell("Chain of LoRA", rule, rank, link)
            for link, rank, rule in itertools.product((25, 100), ends, practice)
        ),
        *(ours("identity", r, link, law, "right") for link, r, law in right),
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
        return 1 - float(result(rate, SEEDS[0]).validation[-1])

    tried = search(missed, cell.guess())
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
    parser.add_argument("--out", type=pathlib.Path, default=result_rows.folder(__file__))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    use_one_core()
    path, commit = options.out / "mnist_rules.json", result_rows.provenance()["commit"]
    rows = _saved(path)
    missing = [cell for cell in cells() if cell not in rows]
    work = functools.partial(row_of, options.data_dir)
    for cell, row in side_by_side(work, missing, options.workers, each=16):
        rows[cell] = row | {"commit": commit}
        words = " ".join(str(word) for word in cell)
        mean, spread = row["accuracy_mean"], row["accuracy_std"]
        print(f"{words:48} {mean:.2f} ± {spread:.2f}", row["tried"], flush=True)
        result_rows.save(
            path,
            "python -m benchmarks.finetune.mnist_rules",
            [rows[cell] for cell in cells() if cell in rows],
            seeds=SEEDS,
            epochs=EPOCHS,
            batch=128,
        )


def _saved(path: pathlib.Path) -> dict[Cell, dict[str, Any]]:
    """The rows that are there already."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    rows = [{"commit": record["commit"], **row} for row in record["rows"]]
    return {Cell(*(row[name] for name in Cell._fields)): row for row in rows}


if __name__ == "__main__":
    main()
