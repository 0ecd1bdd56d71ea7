"""Least squares: how the number of links depends on the rank, and the theory's rate.

Two studies. The first counts links to a relative gap of 1e-6 on a small problem, for
every rank, side and distribution, and compares the contraction per link with the bound
under the PL condition. The second pre-trains a larger regression, then fine-tunes it on
shifted data at several ranks: against steps times lambda the curves fall on one.

Run with ``python -m benchmarks.rates.linear_regression``.

References:
  Malinovsky et al., `Randomized Asymmetric Chain of LoRA
  <https://arxiv.org/abs/2410.08305>`_, 2024, Theorem 5.5, Section 6.1 and Figure 2. Its
  sizes and data are not public; those here are ours.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import raclora_jax as rl
from benchmarks.shared import chains, rows

# Links to a small gap.
INPUTS, OUTPUTS, SAMPLES = 16, 8, 200
RANKS = (1, 2, 4, 8)
PROJECTORS = ("orthonormal", "rademacher", "coordinate")
COMPARED_RANK = 4
MAX_LINKS, TARGET = 800, 1e-6

# Pre-train, then fine-tune.
WIDE_INPUTS, WIDE_OUTPUTS, WIDE_SAMPLES = 256, 64, 1024
WIDE_RANKS = (1, 2, 4, 8, 16, 32)
WIDE_SEEDS = 5
FULL_STEPS, WIDE_TARGET = 90, 1e-4


# (generator) -> problem, W0. Data are drawn by NumPy, once and outside any program.
Draw = Callable[[np.random.Generator], tuple["LeastSquares", np.ndarray]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """f(W) = ||X W - Y||^2 / 2N by its second moments: one gradient is one matmul.

    Args:
      hessian: X^T X / N, ``(inputs, inputs)``.
      optimum: The minimiser, ``(inputs, outputs)``.
    """

    hessian: Array
    optimum: Array

    @classmethod
    def of(cls, X: np.ndarray, Y: np.ndarray) -> LeastSquares:
        """The problem of regressing Y on X."""
        hessian = X.T @ X / len(X)
        return cls(hessian, np.linalg.solve(hessian, X.T @ Y / len(X)))

    def grad(self, W: Array) -> Array:
        """X^T (X W - Y) / N."""
        return self.hessian @ (W - self.optimum)

    def gap(self, W: Array) -> Array:
        """f(W) - f* = tr(E^T X^T X E) / 2N with E = W - W*, free of cancellation."""
        error = W - self.optimum
        return jnp.sum(error * (self.hessian @ error)) / 2


def small_problem(rng: np.random.Generator) -> tuple[LeastSquares, np.ndarray]:
    """Gaussian data, targets and start."""
    X = rng.standard_normal((SAMPLES, INPUTS))
    Y = rng.standard_normal((SAMPLES, OUTPUTS))
    return LeastSquares.of(X, Y), rng.standard_normal((INPUTS, OUTPUTS))


def shifted_problem(rng: np.random.Generator) -> tuple[LeastSquares, np.ndarray]:
    """A fine-tuning task, and the minimiser of the pre-training task to start from.

    Both tasks have noisy linear targets and features with standard deviations from 1
    down to 0.4, along other directions in each; the true weights move by a matrix of
    full rank, so no single low-rank update can follow.
    """
    before = rng.standard_normal((WIDE_INPUTS, WIDE_OUTPUTS))
    after = before + rng.standard_normal((WIDE_INPUTS, WIDE_OUTPUTS))

    def task(truth: np.ndarray) -> LeastSquares:
        deviations = np.geomspace(1.0, 0.4, WIDE_INPUTS)
        turn, _ = np.linalg.qr(rng.standard_normal((WIDE_INPUTS, WIDE_INPUTS)))
        X = rng.standard_normal((WIDE_SAMPLES, WIDE_INPUTS)) * deviations @ turn
        noise = rng.standard_normal((WIDE_SAMPLES, WIDE_OUTPUTS))
        return LeastSquares.of(X, X @ truth + noise)

    pretrained = task(before).optimum
    return task(after), pretrained


@dataclasses.dataclass(frozen=True)
class Runs:
    """One problem, start and chain per seed, drawn once for all ranks of a study.

    Args:
      problems: ``LeastSquares`` with a leading axis of seeds.
      starts: Initial weights, ``(seeds, inputs, outputs)``.
      mu: Smallest eigenvalue of the Hessian, ``(seeds,)``.
      smoothness: Largest one, L, ``(seeds,)``.
      chain_keys: Keys of the sketches, ``(seeds,)``.
    """

    problems: LeastSquares
    starts: np.ndarray
    mu: np.ndarray
    smoothness: np.ndarray
    chain_keys: Array

    @classmethod
    def of(cls, draw: Draw, seeds: int) -> Runs:
        """Draws what every seed starts from."""
        drawn = [draw(np.random.default_rng(seed)) for seed in range(seeds)]
        problems, starts = jax.tree.map(lambda *each: np.stack(each), *drawn)
        eigenvalues = np.linalg.eigvalsh(problems.hessian)
        keys = chains.seed_keys(seeds)
        return cls(problems, starts, eigenvalues[:, 0], eigenvalues[:, -1], keys)

    @property
    def condition(self) -> np.ndarray:
        """mu / L, ``(seeds,)``."""
        return self.mu / self.smoothness

    def relative_gaps(self, spec: rl.Spec | None, steps: int) -> np.ndarray:
        """Gaps at gamma = 1/L over the first one, ``(seeds, steps + 1)``.

        Args:
          spec: How to sketch; ``None`` is full GD.
          steps: Gradient steps.
        """

        def one(run: tuple[LeastSquares, Array, Array, Array]) -> Array:
            problem, start, smoothness, key = run
            if spec is None:
                tx = optax.sgd(1 / smoothness)
            else:
                data = jax.random.key_data(key)
                tx = chains.projected_gd(1 / smoothness, spec, data)
            gaps = chains.trajectory(tx, start, problem.grad, problem.gap, steps)
            return gaps / gaps[0]

        # One seed after another: XLA's batched matmuls on a CPU are slow.
        each = self.problems, self.starts, self.smoothness, self.chain_keys
        return np.asarray(jax.jit(lambda runs: lax.map(one, runs))(each))


def steps_to(gaps: np.ndarray, target: float) -> np.ndarray:
    """The first step at or below the target, per run.

    Raises:
      RuntimeError: If a run did not get there: a mean over the others would mislead.
    """
    reached = gaps <= target
    if not reached.any(axis=1).all():
        raise RuntimeError(f"{(~reached.any(axis=1)).sum()} runs did not reach {target}")
    return reached.argmax(axis=1)


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean and sample standard deviation over runs."""
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1))}


def contraction(gaps: np.ndarray, links: np.ndarray) -> np.ndarray:
    """Mean of gap(t+1) / gap(t) over the links down to the target, per run.

    Theorem 5.5 bounds its expectation given the past, link by link.
    """
    pairs = zip(gaps, links, strict=True)
    return np.array([np.mean(one[1 : n + 1] / one[:n]) for one, n in pairs])


def measure_links(runs: Runs, side: str, rank: int, sketch: str) -> dict:
    """One row: links to the target, and contraction per link against the PL bound."""
    dim = INPUTS if side == "left" else OUTPUTS
    full = rank == dim  # the projector is the identity, and the library has no rank n
    spec = rl.Spec(rank, side=side, sketch=sketch, resample_every=1)
    gaps = runs.relative_gaps(None if full else spec, MAX_LINKS)
    links = steps_to(gaps, TARGET)
    ratio, bound = contraction(gaps, links), 1 - runs.condition * rank / dim
    return {
        "study": "links",
        "method": "full GD" if full else "RAC-LoRA",
        "side": side,
        "rank": rank,
        "sketch": None if full else sketch,
        "lambda": rank / dim,
        "links": spread(links) | {"min": int(links.min()), "max": int(links.max())},
        "contraction": spread(ratio),
        "pl_bound": spread(bound),
        "runs": len(gaps),
        "runs_above_bound": int((ratio > bound).sum()),
    }


def with_halving(results: list[dict]) -> list[dict]:
    """Adds to each row by how much a doubling of the rank divided its links."""
    links = {(r["side"], r["rank"]): r["links"]["mean"] for r in results}

    def halving(row: dict) -> float | None:
        before = links.get((row["side"], row["rank"] // 2)) if row["rank"] > 1 else None
        return before and before / row["links"]["mean"]

    return [row | {"links_of_half_the_rank_over_links": halving(row)} for row in results]


def study_links(seeds: int) -> list[dict]:
    """Every rank and side with orthonormal sketches, then every distribution."""
    runs = Runs.of(small_problem, seeds)
    ranks = [
        measure_links(runs, side, rank, "orthonormal")
        for side in ("left", "right")
        for rank in RANKS
    ]
    laws = [measure_links(runs, "left", COMPARED_RANK, law) for law in PROJECTORS]
    return [*with_halving(ranks), *(row | {"study": "distributions"} for row in laws)]


def study_fine_tuning(seeds: int) -> tuple[list[dict], dict[int, np.ndarray], float]:
    """Fine-tuning at every rank, sketching the outputs: lambda = rank / n.

    Returns:
      Rows, the relative gaps ``{rank: (seeds, steps + 1)}`` with full GD at rank n, and
      the mean of mu / L.
    """
    runs = Runs.of(shifted_problem, seeds)
    results, curves = [], {}
    for rank in (*WIDE_RANKS, WIDE_OUTPUTS):
        lam = rank / WIDE_OUTPUTS
        full = rank == WIDE_OUTPUTS
        spec = None if full else rl.Spec(rank, side="right", resample_every=1)
        steps = math.ceil(FULL_STEPS / lam)
        curves[rank] = runs.relative_gaps(spec, steps)
        needed = steps_to(curves[rank], WIDE_TARGET)
        results.append(
            {
                "study": "fine-tune",
                "method": "full GD" if full else "RAC-LoRA",
                "side": "right",
                "rank": rank,
                "sketch": None if full else spec.sketch,
                "lambda": lam,
                "steps": spread(needed),
                "steps_times_lambda": spread(needed * lam),
                "runs": len(needed),
            }
        )
    return results, curves, float(runs.condition.mean())


def draw_links(results: list[dict], path: pathlib.Path) -> None:
    """Links against rank, and the contraction per link beside its bound."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    counts, rates = figure.subplots(1, 2)
    for side, colour in (("left", "tab:red"), ("right", "tab:blue")):
        chosen = [r for r in results if r["study"] == "links" and r["side"] == side]
        ranks = np.array([r["rank"] for r in chosen])
        links = np.array([r["links"]["mean"] for r in chosen])
        deviation = [r["links"]["std"] for r in chosen]
        counts.errorbar(
            ranks, links, deviation, fmt="o", color=colour, capsize=3, label=side
        )
        label = "halving per doubling" if side == "right" else None
        counts.plot(ranks, links[0] / ranks, ":", color="gray", label=label)
        slow = [1 - r["contraction"]["mean"] for r in chosen]
        bound = [1 - r["pl_bound"]["mean"] for r in chosen]
        rates.plot(ranks, slow, "o-", color=colour, label=f"{side}, measured")
        rates.plot(ranks, bound, "--", color=colour, label=f"{side}, PL bound")
    marks = {counts: (10, 20, 50, 100, 200), rates: (0.02, 0.05, 0.1, 0.2, 0.5)}
    counts.set(ylabel=f"links to a relative gap of {TARGET:g}", yscale="log")
    rates.set(ylabel="1 - contraction per link (higher is faster)", yscale="log")
    for panel, ticks in marks.items():
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_yticks([], minor=True)
        panel.set_xscale("log", base=2)
        panel.set_xticks(RANKS, [str(rank) for rank in RANKS])
        panel.set_xlabel("rank")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=9)
    figure.savefig(path, dpi=100)


def draw_fine_tuning(
    curves: dict[int, np.ndarray], condition: float, path: pathlib.Path
) -> None:
    """The paper's Figure 2, and the same curves against steps times lambda."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_steps, by_work = figure.subplots(1, 2, sharey=True)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(WIDE_RANKS)))
    for rank, gaps in curves.items():
        full = rank == WIDE_OUTPUTS
        colour = "black" if full else colours[WIDE_RANKS.index(rank)]
        label = f"full GD (r = n = {rank})" if full else f"r = {rank}"
        # A few hundred points, dense where either axis is, draw the line of thousands.
        last = gaps.shape[1] - 1
        points = np.r_[0, np.geomspace(1, last, 150), np.linspace(0, last, 150)]
        steps = np.unique(points.astype(int))
        low, middle, high = chains.quartiles(gaps[:, steps])
        for panel, scale in ((by_steps, 1), (by_work, rank / WIDE_OUTPUTS)):
            style = "--" if full else "-"
            panel.plot(steps * scale, middle, style, color=colour, label=label)
            panel.fill_between(steps * scale, low, high, color=colour, alpha=0.2)
    work = np.linspace(0, FULL_STEPS, 100)
    bound = np.exp(-condition * work)
    (line,) = by_work.plot(work, bound, ":", color="gray")
    by_work.legend([line], [r"PL bound, $\exp(-\lambda t\,\mu/L)$"], fontsize=8.5)
    by_steps.set(xlabel="steps t", xscale="log", xlim=(1, None))
    by_work.set(xlabel=r"$\lambda t = (r/n) \times$ steps", xlim=(0, FULL_STEPS))
    by_steps.set(ylabel="relative optimality gap", yscale="log", ylim=(1e-6, 1.5))
    by_steps.legend(fontsize=8.5)
    for panel in (by_steps, by_work):
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=100)


def plus_minus(numbers: dict[str, float], digits: int) -> str:
    """Mean +- standard deviation over runs."""
    return f"{numbers['mean']:.{digits}f} ± {numbers['std']:.{digits}f}"


def print_links(results: list[dict]) -> None:
    """Both parts of the study of links."""
    table = Table(title=f"Links to a relative gap of {TARGET:g}, mean ± std over runs")
    for name in ("side", "rank", "sketch", "lambda", "links", "halving"):
        table.add_column(name, no_wrap=True)
    for name in ("contraction", "PL bound", "runs above it"):
        table.add_column(name, no_wrap=True)
    for row in results:
        halving = row.get("links_of_half_the_rank_over_links")
        table.add_row(
            row["side"],
            str(row["rank"]),
            row["sketch"] or "none: full GD",
            f"{row['lambda']:.4g}",
            plus_minus(row["links"], 1),
            f"{halving:.2f}" if halving else "",
            plus_minus(row["contraction"], 4),
            plus_minus(row["pl_bound"], 4),
            str(row["runs_above_bound"]),
        )
    Console(width=130).print(table)


def print_fine_tuning(results: list[dict]) -> None:
    """Steps, and steps times lambda, per rank."""
    table = Table(title=f"Fine-tuning to a relative gap of {WIDE_TARGET:g}, mean ± std")
    for name in ("method", "rank", "lambda", "steps", "steps x lambda"):
        table.add_column(name, no_wrap=True)
    for row in results:
        table.add_row(
            row["method"],
            str(row["rank"]),
            f"{row['lambda']:.4g}",
            plus_minus(row["steps"], 1),
            plus_minus(row["steps_times_lambda"], 2),
        )
    Console(width=130).print(table)


def main() -> None:
    """Runs both studies, writes rows and figures, prints the tables."""
    options = chains.arguments(__doc__, __file__)
    jax.config.update("jax_enable_x64", True)
    links = study_links(options.seeds)
    tuned, curves, condition = study_fine_tuning(min(options.seeds, WIDE_SEEDS))
    rows.save(
        options.out / "linear_regression.json",
        "python -m benchmarks.rates.linear_regression",
        [*links, *tuned],
        step_times_L=1.0,
        steps_per_link=1,
        small={"inputs": INPUTS, "outputs": OUTPUTS, "samples": SAMPLES},
        small_target=TARGET,
        wide={"inputs": WIDE_INPUTS, "outputs": WIDE_OUTPUTS, "samples": WIDE_SAMPLES},
        wide_target=WIDE_TARGET,
        wide_mu_over_L=condition,
        dtype="float64",
    )
    draw_links(links, options.out / "linear_regression_links.png")
    draw_fine_tuning(curves, condition, options.out / "linear_regression.png")
    print_links(links)
    print_fine_tuning(tuned)


if __name__ == "__main__":
    main()
