"""How exact must a polar factor be? Training quality and time by its polynomials.

The stories260K task of ``benchmarks.pretrained.language`` in blocks of rank 16 and 32,
300 steps, one rate for all, three seeds; and milliseconds for 24 Gram matrices of each
rank. The polynomials of an interval are the best of degree five, one after the other.

    python -m benchmarks.pretrained.polynomials --data-dir DIR [--quick]
"""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import linprog

from benchmarks.pretrained.entries import ours
from benchmarks.pretrained.run import Runner, Task
from benchmarks.shared import timing
from raclora_jax._chain import orthogonal

RATE = 0.002
MUON = [(3.4445, -4.7750, 2.0315)] * 5
Polynomials = list[tuple[float, ...]]


def best(low: float, high: float) -> tuple[tuple[float, ...], float]:
    """The odd quintic closest to 1 on an interval, and how far from 1 it gets.

    A linear program on a grid: ``|1 - p(x)| <= t`` at every point, ``t`` least.
    """
    x = np.union1d(np.geomspace(low, high, 1500), np.linspace(low, high, 1500))
    powers = np.stack([x, x**3, x**5], axis=1)
    sizes = powers.max(axis=0)
    one = np.ones((len(x), 1))
    above = np.hstack([powers / sizes, -one])
    below = np.hstack([-powers / sizes, -one])
    found = linprog(
        [0, 0, 0, 1],
        A_ub=np.vstack([above, below]),
        b_ub=np.concatenate([np.ones(len(x)), -np.ones(len(x))]),
        bounds=[(None, None)] * 3 + [(0, None)],
    ).x
    return tuple((found[:3] / sizes).tolist()), float(found[3])


def composed(low: float, count: int) -> Polynomials:
    """``count`` polynomials that take [low, 1] towards 1, each the best for its turn."""
    interval, found = (low, 1.0), []
    for _ in range(count):
        polynomial, error = best(*interval)
        found.append(polynomial)
        interval = 1 - error, 1 + error
    return found


def exact(gram: Array) -> Array:
    """The inverse root by an eigendecomposition."""
    values, vectors = jnp.linalg.eigh(gram)
    kept = values > 1e-9 * values[:, -1:]
    roots = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return (vectors * roots[:, None]) @ vectors.mT


def choices() -> dict[str, Polynomials | None]:
    """What is compared; ``None`` is the exact factor."""
    return {
        "6 from 0.001": composed(1e-3, 6),
        "5 from 0.001": composed(1e-3, 5),
        "4 from 0.01": composed(1e-2, 4),
        "3 from 0.05 (ours)": composed(5e-2, 3),
        "2 from 0.1": composed(1e-1, 2),
        "5 of Muon": MUON,
        "exact": None,
    }


def using(polynomials: Polynomials | None) -> Any:
    """A context in which the orthogonalised step uses them."""
    if polynomials is None:
        return mock.patch.object(orthogonal, "_inverse_root", exact)
    return mock.patch.object(orthogonal, "POLYNOMIALS", tuple(polynomials))


def quality(task: Task, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for every choice and rank."""
    for rank in (16,) if quick else (16, 32):
        for name, polynomials in choices().items():
            with using(polynomials):
                entry = ours(name, rank, sketch="block")
                runner = Runner(task, entry)
                seeds, steps = ((0,), 20) if quick else ((0, 1, 2), 300)
                losses = [runner.run(RATE, steps, seed) for seed in seeds]
            mean = statistics.mean(losses)
            print(f"rank {rank:3} {name:20} {mean:.4f}", flush=True)
            yield {
                "study": "quality",
                "polynomials": name,
                "rank": rank,
                "steps": steps,
                "rate": RATE,
                "seeds": list(seeds),
                "loss": losses,
                "loss_mean": mean,
            }


def times(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for every choice and rank, timed in turn."""
    for rank in (32,) if quick else (32, 64, 128, 256):
        factors = jax.random.normal(jax.random.key(0), (24, rank, 4 * rank))
        gram = jnp.matmul(factors, factors.mT, precision=jax.lax.Precision.HIGHEST)
        runs = {name: _compiled(chosen, gram) for name, chosen in choices().items()}
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(3 if quick else 21):
            for name, run in runs.items():
                # It takes a hundred times as long, and three say so.
                if name == "exact" and len(spent[name]) == 3:
                    continue
                begun = time.perf_counter()
                jax.block_until_ready(run(gram))
                spent[name].append(1e3 * (time.perf_counter() - begun))
        for name, milliseconds in spent.items():
            median = statistics.median(milliseconds)
            print(f"rank {rank:3} {name:20} {median:8.2f} ms", flush=True)
            yield {
                "study": "time",
                "polynomials": name,
                "rank": rank,
                "milliseconds": median,
            }


def _compiled(polynomials: Polynomials | None, gram: Array) -> Callable[[Array], Array]:
    with using(polynomials):
        inverse_root = orthogonal._inverse_root
        return jax.jit(lambda gram: inverse_root(gram)).lower(gram).compile()


def main() -> None:
    """Measures, writes rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    options = timing.parse(parser, __file__)
    rows = [
        *times(options.quick),
        *quality(Task(options.data_dir), options.quick),
    ]
    coefficients = {name: found for name, found in choices().items() if found}
    timing.finish(options, "pretrained.polynomials", rows, coefficients=coefficients)


if __name__ == "__main__":
    main()
