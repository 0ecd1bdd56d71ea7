"""What a step adds to a gradient: drawing sketches, and adding a lift to the weights.

Drawing: the 26 matrices of a decoder with 4 layers of width 512, for every distribution
at several ranks, all at once as the library draws them and one by one. Lifting: the ways
to add ``S F`` to donated weights, with the memory each of them takes.

Run with ``python -m benchmarks.speed.inner_loop [--quick]``.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.console import Console
from rich.table import Table

import raclora_jax as rl
from benchmarks.shared import rows
from raclora_jax._core import lowrank, rounding, sketch
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree

LAYERS, WIDTH = 4, 512
DISTRIBUTIONS = ("orthonormal", "rademacher", "coordinate", "gaussian_raw")
LIFT_SHAPES = ((512, 512), (512, 2048), (2048, 512), (4, 512, 2048))
LEAVES = 4  # of each shape in one program
REPEATS = 11


def decoder() -> dict[str, Any]:
    """The shapes of the matrices of a decoder."""
    shapes = dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH))
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    tree = {f"layer_{i}/{n}": s for i in range(LAYERS) for n, s in shapes.items()}
    tree |= {"embed": (4 * WIDTH, WIDTH), "head": (WIDTH, 4 * WIDTH)}
    return {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in tree.items()}


def build(program: Callable[..., Any], *args: Any, donate: bool = False) -> Any:
    """The compiled program and a row of what it took to get it."""
    start = time.process_time()
    lowered = jax.jit(program, donate_argnums=(0,) if donate else ()).lower(*args)
    traced = time.process_time()
    compiled = lowered.compile()
    return compiled, {
        "trace_and_lower_cpu_ms": 1e3 * (traced - start),
        "compile_cpu_ms": 1e3 * (time.process_time() - traced),
        "temp_kib": compiled.memory_analysis().temp_size_in_bytes / 1024,
    }


def interleaved(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds; one of each per round, so that noise hits all alike."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in spent.items()}


def study_drawing(ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Time to draw every sketch of the decoder, and to compile the program."""
    data, link = jnp.array([0, 7], jnp.uint32), jnp.int32(3)
    found = []
    for name in DISTRIBUTIONS:
        for rank in ranks:
            plans = tuple(plan_tree(rl.Spec(rank, sketch=name), decoder()).values())

            def together(
                data: Array, link: Array, plans: tuple[LeafPlan, ...] = plans
            ) -> Any:
                return sketch.draw_all(data, link, plans)

            def alone(
                data: Array, link: Array, plans: tuple[LeafPlan, ...] = plans
            ) -> Any:
                return [sketch.draw(data, link, plan) for plan in plans]

            built = {
                "together": build(together, data, link),
                "one by one": build(alone, data, link),
            }
            times = interleaved(
                {how: lambda c=c: c(data, link) for how, (c, _) in built.items()}
            )
            for how, (_, row) in built.items():
                found.append(
                    {"study": "draw", "sketch": name, "rank": rank, "how": how}
                    | {"leaves": len(plans), "run_ms": times[how]}
                    | row
                )
    return found


def _matmul(factor: Array, drawn: Array, plan: LeafPlan) -> Array:
    """The lift as one matmul laid out as the leaf."""
    first, second = (drawn, factor) if plan.side == "left" else (factor, drawn)
    axis = len(plan.batch)
    stack = tuple(range(axis))
    dims = (((axis,), (axis,)), (stack, stack))
    return lax.dot_general(first, second, dims, precision=lax.Precision.HIGHEST)


def _transposed(factor: Array, drawn: Array, plan: LeafPlan) -> Array:
    """The same with the sketch always first, and a transpose for a right side."""
    if plan.side == "left":
        return _matmul(factor, drawn, plan)
    return _matmul(drawn, factor, plan).mT


def _outer(factor: Array, drawn: Array, plan: LeafPlan) -> Array:
    """The lift as a sum of outer products, at any rank."""
    first, second = (drawn, factor) if plan.side == "left" else (factor, drawn)
    axis, total = len(plan.batch), None
    for index in range(plan.rank):
        column = lax.index_in_dim(first, index, axis, keepdims=False)[..., :, None]
        term = (
            column * lax.index_in_dim(second, index, axis, keepdims=False)[..., None, :]
        )
        total = term if total is None else total + term
    return total


LIFTS = {
    "library": lowrank.lift_leaf,
    "matmul": _matmul,
    "matmul, transposed": _transposed,
    "outer products": _outer,
}


def study_lifting(
    ranks: tuple[int, ...], dtypes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Time and memory to add a lift to donated weights."""
    found = []
    for dtype in dtypes:
        for shape in LIFT_SHAPES:
            for side in ("left", "right"):
                for rank in ranks:
                    found += _lifting(dtype, shape, side, rank)
    return found


def _lifting(
    dtype: str, shape: tuple[int, ...], side: str, rank: int
) -> list[dict[str, Any]]:
    batch = tuple(range(len(shape) - 2))
    spec = rl.Spec(rank, side=side, rules=[rl.Rule("w", batch=batch)])
    plan = plan_tree(spec, {"w": jax.ShapeDtypeStruct(shape, dtype)})["w"]
    keys = jax.random.split(jax.random.key(0), LEAVES)
    drawn = [jax.random.normal(key, plan.sketch_shape) for key in keys]
    factors = [1e-3 * jax.random.normal(key, plan.factor_shape) for key in keys]

    def program(lift: Callable[..., Array]) -> Callable[..., list[Array]]:
        def one(weight: Array, factor: Array, drawn: Array, key: Array) -> Array:
            exact = weight.astype(plan.wide_dtype) + lift(factor, drawn, plan)
            return rounding.settle(exact, dtype, "auto", key).astype(dtype)

        def all_of_them(weights: Any, factors: Any, drawn: Any, keys: Any) -> Any:
            return list(map(one, weights, factors, drawn, keys))

        return all_of_them

    weights = {how: [jnp.ones(shape, dtype) for _ in keys] for how in LIFTS}
    rest = (factors, drawn, list(keys))
    built = {}
    for how, lift in LIFTS.items():
        if how != "outer products" or rank <= 32:
            built[how] = build(program(lift), weights[how], *rest, donate=True)

    def run(how: str) -> Any:
        weights[how] = built[how][0](weights[how], *rest)
        return weights[how]

    times = interleaved({how: lambda how=how: run(how) for how in built})
    return [
        {"study": "lift", "dtype": dtype, "shape": list(shape), "side": side}
        | {"rank": rank, "how": how, "leaves": LEAVES, "run_ms": times[how] / LEAVES}
        | row
        for how, (_, row) in built.items()
    ]


def print_rows(found: list[dict[str, Any]]) -> None:
    """Both studies as tables."""
    console = Console(width=120)
    for study in ("draw", "lift"):
        mine = [row for row in found if row["study"] == study]
        table = Table(*(name for name in mine[0] if name != "study"))
        for row in mine:
            cells = [value for name, value in row.items() if name != "study"]
            table.add_row(
                *(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells)
            )
        console.print(table)


def main() -> None:
    """Runs both studies, writes the rows, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one or two ranks only")
    parser.add_argument("--out", type=pathlib.Path, default=rows.folder(__file__))
    options = parser.parse_args()
    found = study_drawing((8,) if options.quick else (1, 8, 64))
    ranks = (8, 32) if options.quick else (1, 4, 8, 16, 32, 64)
    dtypes = ("float32",) if options.quick else ("float32", "bfloat16")
    found += study_lifting(ranks, dtypes)
    rows.save(
        options.out / "inner_loop.json",
        "python -m benchmarks.speed.inner_loop" + (" --quick" if options.quick else ""),
        found,
        decoder={"layers": LAYERS, "width": WIDTH},
        repeats=REPEATS,
        lift_run_ms="per leaf",
    )
    print_rows(found)


if __name__ == "__main__":
    main()
