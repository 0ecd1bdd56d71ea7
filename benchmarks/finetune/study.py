"""Fine-tune a network through rank-1 steps, beside every other method.

A small MLP learns the digits 0-4, then is fine-tuned on 5-9: by full fine-tuning, LoRA,
Chain of LoRA, Asymmetric LoRA, RAC-LoRA as published, and RAC-LoRA as this library has
it, at rank 1 and with biases frozen for all but the first. A second table has the methods
without optimizer state, at rank 1 and at a quarter of the width. Learning rate and, where
there is a chain, link length are tuned for each method over the same grid on validation
images; then each trains on all but the test images, which the tables report, over fresh
seeds.

    python -m benchmarks.finetune                                # scikit-learn's digits
    python -m benchmarks.finetune --data mnist --data-dir DIR    # the paper's experiment
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.finetune import data, entries, report, training
from benchmarks.finetune.entries import Entry
from benchmarks.shared import rows as result_rows
from raclora_jax import methods

# Table by table: its lines and what its title says of them.
STUDIES: dict[str, tuple[Callable[[], list[Entry]], str]] = {
    "adam": (entries.adam, "rank 1, Adam inside"),
    "orthogonal": (entries.orthogonal, "orthogonal inside, no optimizer state"),
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

# Called after every run, for the progress bar.
Tick = Callable[[], object]


class Setting(NamedTuple):
    """What the data decide: size of the run and the links tried."""

    steps: int
    batch: int
    blocks: int
    links: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    learning_rates: tuple[float, ...] = RATES

    def runner(self, build: training.Build, task: data.Task) -> training.Runner:
        """The jitted run of one method on one task."""
        return training.runner(
            build, task, steps=self.steps, batch=self.batch, blocks=self.blocks
        )


class Tuned(NamedTuple):
    """The setting of one method that did best on validation images."""

    accuracy: float
    rate: float
    link: int | None


def tune(
    entry: Entry, params: Any, task: data.Task, setting: Setting, tick: Tick
) -> Tuned:
    """Tries every learning rate and link."""
    tried = []
    for link in setting.links if entry.chained else (None,):
        run = setting.runner(entry.build(link), task)
        for rate in setting.learning_rates:
            scores = []
            for seed in setting.tuning_seeds:
                result = run(params, jnp.float32(rate), jax.random.key(seed))
                scores.append(float(result.validation[-1]))
                tick()
            tried.append(Tuned(statistics.mean(scores), rate, link))
    return max(tried, key=lambda one: one.accuracy)


def measure(
    entry: Entry,
    best: Tuned,
    params: Any,
    task: data.Task,
    setting: Setting,
    seeds: range,
    tick: Tick,
) -> tuple[dict[str, Any], Any]:
    """The row of one method over fresh seeds, and the weights of the first."""
    build = entry.build(best.link)
    run = setting.runner(build, task.refit())
    results, seconds = [], []
    for seed in seeds:
        start = time.perf_counter()
        result = run(params, jnp.float32(best.rate), jax.random.key(seed))
        results.append(jax.block_until_ready(result))
        seconds.append(time.perf_counter() - start)
        tick()
    curves = 100 * np.array([result.test for result in results])
    final = curves[:, -1].tolist()
    method = build(optax.constant_schedule(best.rate), jax.random.key(0))
    row = {
        "method": entry.name,
        "trained": method.trained(params),
        "optimizer_bytes": method.optimizer_bytes(params),
        "link": best.link,
        "learning_rate": best.rate,
        "validation": round(100 * best.accuracy, 3),
        "accuracy_mean": round(statistics.mean(final), 3),
        "accuracy_std": round(statistics.stdev(final), 3),
        "accuracy": [round(value, 3) for value in final],
        # The first run compiles.
        "seconds": round(statistics.median(seconds[1:]), 4),
        "steps": np.linspace(0, setting.steps, setting.blocks + 1)[1:].tolist(),
        "curves": np.round(curves, 2).tolist(),
    }
    return row, results[0].params


class Best(NamedTuple):
    """The weights of the RAC-LoRA run that validated best."""

    weights: Any
    validation: float


def pretrain(task: data.Task, steps: int, batch: int) -> Any:
    """The MLP trained in full on the digits 0-4."""
    first = training.MLP().init(jax.random.key(0), task.train.images[:1])["params"]
    run = training.runner(
        lambda schedule, _: methods.full(schedule),
        task,
        steps=steps,
        batch=batch,
        blocks=1,
    )
    result = run(first, jnp.float32(1e-3), jax.random.key(0))
    print(f"pre-trained on 0-4: {100 * float(result.test[-1]):.2f} % of test images")
    return result.params


def save_weights(params: Any, path: pathlib.Path) -> None:
    """Writes the weights beside the target, then renames."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(flax.serialization.msgpack_serialize(jax.device_get(params)))
    partial.replace(path)


def main() -> None:
    """Runs the comparison and writes tables, figures, rows and weights."""
    options = _options()
    if options.data == "mnist":
        before, after = data.mnist(options.data_dir)
        setting = mnist_setting(after)
    else:
        before, after = data.digits()
        setting = Setting(1600, 64, 20, links=(10, 50), tuning_seeds=(1000, 1001, 1002))
    params = pretrain(before, setting.steps // 4, setting.batch)
    best = Best(None, -1.0)
    for study in options.studies:
        best = max(
            best,
            _study(study, options, params, after, setting),
            key=lambda one: one.validation,
        )

    path = options.out / f"raclora_{options.data}.msgpack"
    save_weights(best.weights, path)
    print(f"figures and rows: {options.out}   load the best weights of RAC-LoRA with")
    print(f"  flax.serialization.msgpack_restore(open({str(path)!r}, 'rb').read())")


def _study(
    study: str,
    options: argparse.Namespace,
    params: Any,
    task: data.Task,
    setting: Setting,
) -> Best:
    """One table: printed, drawn and saved."""
    table, inside = STUDIES[study]
    rows, best = compare(params, task, setting, table(), range(options.seeds))
    name = options.data if study == "adam" else f"{options.data}_{study}"
    title = f"{options.data}, 5-9 after 0-4, {inside}, {options.seeds} seeds"
    report.print_table(rows, title)
    report.draw_figure(rows, options.out / f"{name}.png", title)
    result_rows.save(
        options.out / f"{name}.json",
        f"python -m benchmarks.finetune --data {options.data} --studies {study}",
        rows,
        seeds=list(range(options.seeds)),
        **setting._asdict(),
    )
    return best


def mnist_setting(task: data.Task) -> Setting:
    """100 epochs of batches of 128."""
    epoch = len(task.train.labels) // 128
    return Setting(100 * epoch, 128, 50, links=(10, 100), tuning_seeds=(1000,))


def compare(
    params: Any, task: data.Task, setting: Setting, table: list[Entry], seeds: range
) -> tuple[list[dict[str, Any]], Best]:
    """All rows, and the best weights."""
    tries = sum(len(setting.links) if entry.chained else 1 for entry in table)
    grid = len(setting.learning_rates) * len(setting.tuning_seeds)
    total = tries * grid + len(table) * len(seeds)
    rows: list[dict[str, Any]] = []
    best = Best(None, -1.0)
    for entry, tick in _with_progress(table, total):
        tuned = tune(entry, params, task, setting, tick)
        row, weights = measure(entry, tuned, params, task, setting, seeds, tick)
        rows.append(row)
        if entry.name.startswith("RAC-LoRA,") and tuned.accuracy > best.validation:
            best = Best(weights, tuned.accuracy)
    return rows, best


def _with_progress(table: list[Entry], total: int) -> Iterator[tuple[Entry, Tick]]:
    columns = (
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=total)
        for entry in table:
            progress.update(bar, description=entry.name)
            yield entry, lambda: progress.advance(bar)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument(
        "--data-dir", type=pathlib.Path, help="folder of MNIST's idx files"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/finetune"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    options = parser.parse_args()
    if options.data == "mnist" and options.data_dir is None:
        parser.error("--data mnist needs --data-dir DIR with the four gzipped idx files")
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the table reports a spread")
    return options
