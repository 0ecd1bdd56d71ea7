"""Interleaved timing of compiled steps, and what the compiler says about them."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.shared import rows
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method

MIB = 2**20
WARM = 2  # steps of each method before the clock starts


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled with its state donated, and the numbers known without a run.

    Args:
      method: The method.
      step: The executable.
      peak: Bytes of arguments, temporaries and outputs that are no argument.
      held: Bytes of the state, which stays between steps.
      flops: As the compiler counts them; a loop body counts once.
      optimizer: Bytes of optimizer state.
      seconds: Time to trace, lower and compile.
    """

    method: Method
    step: Any
    peak: int
    held: int
    flops: float
    optimizer: int
    seconds: float

    @classmethod
    def of(cls, method: Method, model: Model) -> Compiled:
        """Compiles from shapes alone: nothing of the model is allocated."""
        key = jax.random.key(0)
        state = jax.eval_shape(method.init, key)
        batch = jax.eval_shape(model.batch, key)
        start = time.perf_counter()
        step = jax.jit(method.step, donate_argnums=0).lower(state, batch).compile()
        seconds = time.perf_counter() - start
        flops = (step.cost_analysis() or {}).get("flops", float("nan"))
        optimizer = nbytes(method.optimizer(state))
        held = nbytes(state)
        return cls(method, step, peak(step), held, flops, optimizer, seconds)

    def row(self) -> dict[str, Any]:
        """What a result file keeps."""
        return {
            "method": self.method.name,
            "gflops": self.flops / 1e9,
            "peak_mib": self.peak / MIB,
            "optimizer_mib": self.optimizer / MIB,
            "compile_seconds": round(self.seconds, 2),
        }


def peak(step: Any) -> int:
    """Bytes a compiled program holds at once, as its buffer assignment has them."""
    memory = step.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def race(
    model: Model, entries: Iterable[Compiled], *, rounds: int, runs: int = 5
) -> list[dict[str, Any]]:
    """Times the steps in turn, one of each per round, so that noise hits all alike.

    Args:
      model: Where the batch comes from.
      entries: The compiled methods; the first is what the others are held against.
      rounds: Timed steps of each method per run.
      runs: How often the rounds are repeated.

    Returns:
      One row per method: the median of its seconds, and over the runs the median, the
      lowest and the highest of the median ratio to the first method within a round.
    """
    entries = list(entries)
    batch = jax.jit(model.batch)(jax.random.key(1))
    states = [jax.jit(entry.method.init)(jax.random.key(0)) for entry in entries]

    def one_round() -> list[float]:
        spent = []
        for index, entry in enumerate(entries):
            start = time.perf_counter()
            states[index], loss = entry.step(states[index], batch)
            jax.block_until_ready((states[index], loss))
            spent.append(time.perf_counter() - start)
        return spent

    for _ in range(WARM):
        one_round()
    table = np.array([[one_round() for _ in range(rounds)] for _ in range(runs)])
    ratios = np.median(table / table[..., :1], axis=1)
    return [
        entry.row()
        | {
            "milliseconds": 1e3 * float(np.median(table[..., index])),
            "over_floor": float(np.median(ratios[:, index])),
            "over_floor_range": [ratios[:, index].min(), ratios[:, index].max()],
        }
        for index, entry in enumerate(entries)
    ]


def compare(
    model: Model, methods: Iterable[Method], *, rounds: int, runs: int = 5
) -> list[dict[str, Any]]:
    """Compiles the methods, then lets them race; rows name the model."""
    entries = [Compiled.of(method, model) for method in methods]
    timed = race(model, entries, rounds=rounds, runs=runs)
    return [{"model": model.name} | row for row in timed]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that speed studies share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results")
    return parser


def parse(parser: argparse.ArgumentParser, program: str) -> argparse.Namespace:
    """The options of this run; a quick run keeps its numbers to itself.

    Args:
      parser: What it takes.
      program: Its ``__file__``; results go beside it.
    """
    options = parser.parse_args()
    if options.out is None and not options.quick:
        options.out = rows.folder(program)
    return options


def arguments(description: str | None, program: str) -> argparse.Namespace:
    """The options of a study that has none of its own."""
    return parse(parser(description), program)


def finish(
    options: argparse.Namespace,
    program: str,
    results: list[dict],
    *,
    name: str | None = None,
    **settings: Any,
) -> None:
    """Prints the rows, and saves them where the run is to be kept.

    Args:
      options: Of this run.
      program: The module of ``benchmarks`` that made the rows.
      results: The rows.
      name: Of the file, if it is not the module's.
      **settings: What all rows share.
    """
    name = name or program.rpartition(".")[2]
    print_rows(results, name.replace("_", " "))
    if options.out is not None:
        path = options.out / f"{name}.json"
        rows.save(path, f"python -m benchmarks.{program}", results, **settings)


def print_rows(results: list[dict], title: str) -> None:
    """A table of all fields that any row has."""
    columns = list(dict.fromkeys(name for row in results for name in row))
    table = Table(title=title)
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in results:
        table.add_row(*(_shown(row.get(name)) for name in columns))
    Console(width=170).print(table)


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case [*parts]:
            return " ".join(map(_shown, parts))
    return str(value)
