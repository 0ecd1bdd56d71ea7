"""The paper's counterexample: which low-rank methods reach the optimum, and which do not.

A quadratic of a 3 x 3 matrix, rank 1. LoRA and COLA diverge at step 1/L, one frozen
factor gets stuck, projected steps on fresh sketches reach the optimum. Plain GD on a raw
Gaussian sketch diverges too: the guarantee belongs to the projector.

Run with ``python -m benchmarks.rates.counterexample``.

References:
  Malinovsky et al., `Randomized Asymmetric Chain of LoRA
  <https://arxiv.org/abs/2410.08305>`_, 2024, Section 3, Eq. 2 and Figure 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import raclora_jax as rl
from benchmarks.shared import chains, rows

SIZE, RANK = 3, 1
CHAINS, INNER = 300, 20
STEPS = CHAINS * INNER
FACTORS = (0.5, 1.0)  # the c of f; sources do not say which one the paper has
STEP_SIZES = (1.0, 0.1)  # in units of 1/L
DIVERGED = 1e6
EARLY_CHAINS = (1, 3, 10, 30)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """f(W) = c x^T M x + 1^T x with x = vec W and M = Diag(10, 1, ..., 1).

    Args:
      c: Factor of the quadratic term; L = 20 c and mu = 2 c.
    """

    c: Array | float

    @property
    def diagonal(self) -> Array:
        """M, laid out as W."""
        return jnp.ones((SIZE, SIZE)).at[0, 0].set(10.0)

    @property
    def smoothness(self) -> Array | float:
        """L, the largest eigenvalue of the Hessian 2 c M."""
        return 20 * self.c

    def grad(self, W: Array) -> Array:
        """2 c M x + 1."""
        return 2 * self.c * self.diagonal * W + 1

    def gap(self, W: Array) -> Array:
        """f(W) - f* = c (x - x*)^T M (x - x*), free of cancellation near the optimum."""
        optimum = -1 / (2 * self.c * self.diagonal)
        return self.c * jnp.sum(self.diagonal * (W - optimum) ** 2)


# Gaps before the first and after every gradient step, (STEPS + 1,).
Run = Callable[[Quadratic, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
      name: What people read.
      run: ``(problem, gamma, W0, key) -> gaps``.
      per_chain: Gradient steps between two merges; ``STEPS`` for a single chain.
      library: Whether ``raclora_jax`` takes the steps.
    """

    name: str
    run: Run
    per_chain: int = INNER
    library: bool = True


def full_gd(problem: Quadratic, gamma: Array, start: Array, key: Array) -> Array:
    """W <- W - gamma grad; the key is for the other methods."""
    del key
    return chains.trajectory(optax.sgd(gamma), start, problem.grad, problem.gap, STEPS)


def sketched(sketch: str, per_chain: int = INNER, side: str = "right") -> Run:
    """A chain of ``per_chain`` steps per sketch; of one link it is Asymmetric LoRA.

    In W, GD on the trained factor of ``W + B A`` is ``W <- W - gamma grad A^T A``: with
    ``gaussian_raw`` that is plain GD on the factor, with orthonormal rows it is Eq. 4.
    """
    spec = rl.Spec(RANK, side=side, sketch=sketch, resample_every=per_chain)

    def run(problem: Quadratic, gamma: Array, start: Array, key: Array) -> Array:
        tx = chains.projected_gd(gamma, spec, jax.random.key_data(key))
        return chains.trajectory(tx, start, problem.grad, problem.gap, STEPS)

    return run


def two_factors(per_chain: int, fresh: bool = True) -> Run:
    """LoRA, and COLA as a chain of it: GD on both factors of ``W + B A``, then a merge.

    Every chain starts from a Gaussian A and B = 0; alpha = rank, so no factor stands
    before the product.

    Args:
      per_chain: Steps until B A is merged into W.
      fresh: Whether a chain draws its own A, or restarts from that of the first.
    """

    def run(problem: Quadratic, gamma: Array, start: Array, key: Array) -> Array:
        def step(
            W: Array, factors: tuple[Array, Array]
        ) -> tuple[tuple[Array, Array], Array]:
            B, A = factors
            G = problem.grad(W + B @ A)
            B, A = B - gamma * G @ A.T, A - gamma * B.T @ G
            return (B, A), problem.gap(W + B @ A)

        def chain(W: Array, index: Array) -> tuple[Array, Array]:
            draw = jax.random.fold_in(key, index if fresh else 0)
            factors = jnp.zeros((SIZE, RANK)), jax.random.normal(draw, (RANK, SIZE))
            (B, A), gaps = lax.scan(
                lambda carry, _: step(W, carry), factors, None, length=per_chain
            )
            return W + B @ A, gaps

        _, gaps = lax.scan(chain, start, jnp.arange(STEPS // per_chain))
        return jnp.concatenate([problem.gap(start)[None], gaps.ravel()])

    return run


METHODS = (
    Method("Full GD", full_gd, STEPS, library=False),
    Method("LoRA", two_factors(STEPS), STEPS, library=False),
    Method("COLA, A re-drawn", two_factors(INNER), library=False),
    Method("COLA, same A", two_factors(INNER, fresh=False), library=False),
    Method("AsymmLoRA, raw GD", sketched("gaussian_raw", STEPS), STEPS),
    Method("AsymmLoRA, projected", sketched("orthonormal", STEPS), STEPS),
    Method("RAC Eq. 3, left, 1 step", sketched("orthonormal", 1, "left"), 1),
    Method("RAC Eq. 4, right, 1 step", sketched("orthonormal", 1), 1),
    Method("RAC, 20 raw GD, Gaussian", sketched("gaussian_raw")),
    Method("RAC, 20 raw GD, orthonormal", sketched("orthonormal")),
    Method("RAC, 20, Gaussian + Gram", sketched("orthonormal")),
    Method("RAC, 20, Rademacher + Gram", sketched("rademacher")),
    Method("RAC, 20, coordinate", sketched("coordinate")),
)


def measure(method: Method, seeds: int) -> np.ndarray:
    """Gaps of every setting and seed, ``(factors, step sizes, seeds, STEPS + 1)``."""

    def one(c: Array, relative: Array, key: Array) -> Array:
        problem = Quadratic(c)
        start_key, chain_key = jax.random.split(key)
        start = jax.random.normal(start_key, (SIZE, SIZE))
        return method.run(problem, relative / problem.smoothness, start, chain_key)

    by_seed = jax.vmap(one, (None, None, 0))
    by_step = jax.vmap(by_seed, (None, 0, None))
    by_factor = jax.jit(jax.vmap(by_step, (0, None, None)))
    settings = jnp.asarray(FACTORS), jnp.asarray(STEP_SIZES)
    return np.asarray(by_factor(*settings, chains.seed_keys(seeds)))


def summarise(method: Method, c: float, relative: float, gaps: np.ndarray) -> dict:
    """One row of the results: gaps of the runs that stayed finite, and how many did."""
    with np.errstate(invalid="ignore"):
        lost = ~(gaps[:, -1] <= DIVERGED)
    kept = gaps[~lost]
    row = {
        "method": method.name,
        "by": "raclora_jax" if method.library else "plain formula",
        "c": c,
        "step_times_L": relative,
        "steps_per_chain": method.per_chain,
        "runs": len(gaps),
        "diverged": int(lost.sum()),
    }
    if not len(kept):
        return row | {"median": None, "quartiles": None}
    low, middle, high = (float(q[-1]) for q in chains.quartiles(kept))
    row |= {"median": middle, "quartiles": [low, high]}
    if method.per_chain == INNER:
        after = {n: float(np.median(kept[:, n * INNER])) for n in EARLY_CHAINS}
        row["median_after_chains"] = after
    return row


def cell(row: dict) -> str:
    """Median and quartiles of the runs that stayed finite, and how many did not."""
    parts = []
    if row["diverged"]:
        parts.append(f"{row['diverged']}/{row['runs']} diverge")
    if row["median"] is not None:
        numbers = [shown(gap) for gap in (row["median"], *row["quartiles"])]
        middle, low, high = numbers
        parts.append(middle if len(set(numbers)) == 1 else f"{middle} ({low}, {high})")
    return "; ".join(parts)


def shown(gap: float) -> str:
    """A gap with two digits; below 1e-15 it is rounding."""
    return "<1e-15" if gap < 1e-15 else f"{gap:.2g}"


def print_table(results: list[dict]) -> None:
    """Methods down, settings across."""
    settings = list(itertools.product(FACTORS, STEP_SIZES))
    table = Table(title="Optimality gap, median (quartiles) of the runs that stay finite")
    table.add_column("method", no_wrap=True)
    for c, relative in settings:
        table.add_column(f"c={c:g}, step {relative:g}/L", no_wrap=True)
    by_cell = {(r["method"], r["c"], r["step_times_L"]): r for r in results}
    for method in METHODS:
        cells = [cell(by_cell[method.name, *setting]) for setting in settings]
        table.add_row(method.name, *cells)
    Console(width=160).print(table)


# Method: label, colour, line style.
FIGURE_LINES = {
    "Full GD": ("full GD", "black", "--"),
    "RAC Eq. 4, right, 1 step": ("RAC-LoRA, projector, 1 step per link", "tab:red", "-"),
    "RAC, 20 raw GD, orthonormal": ("RAC-LoRA, projector, 20 steps", "tab:pink", "-"),
    "RAC, 20 raw GD, Gaussian": ("RAC-LoRA, raw Gaussian, 20 steps", "tab:purple", "-"),
    "COLA, A re-drawn": ("COLA, A re-drawn, 20 steps", "tab:orange", "-"),
    "AsymmLoRA, projected": ("Asymmetric LoRA, projected", "tab:green", "-"),
    "COLA, same A": ("COLA, same A at every restart", "tab:brown", "-."),
    "LoRA": ("LoRA", "tab:blue", "-"),
}


def draw_figure(curves: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """The paper's Figure 1 with spread: gap against gradient steps, c = 1/2.

    Args:
      curves: ``{method: (step sizes, seeds, STEPS + 1)}``.
      path: The PNG.
    """
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    steps = np.arange(STEPS + 1)
    for index, (panel, relative) in enumerate(zip(panels, STEP_SIZES, strict=True)):
        for name, (label, colour, style) in FIGURE_LINES.items():
            # Off the top rather than absent, so that a diverging line is seen to leave.
            low, middle, high = np.clip(chains.quartiles(curves[name][index]), 0, 1e9)
            panel.plot(steps, middle, style, color=colour, label=label, linewidth=1.6)
            panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set(xscale="log", yscale="log", xlim=(1, STEPS), ylim=(1e-8, 1e3))
        panel.set(title=f"step {relative:g} / L", xlabel="gradient steps")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(r"optimality gap $f(W) - f^*$")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs every method, writes rows and figure, prints the table."""
    options = chains.arguments(__doc__, __file__)
    jax.config.update("jax_enable_x64", True)
    results, curves = [], {}
    for method in METHODS:
        gaps = measure(method, options.seeds)
        curves[method.name] = gaps[FACTORS.index(0.5)]
        for (i, c), (j, relative) in itertools.product(
            enumerate(FACTORS), enumerate(STEP_SIZES)
        ):
            results.append(summarise(method, c, relative, gaps[i, j]))
    rows.save(
        options.out / "counterexample.json",
        "python -m benchmarks.rates.counterexample",
        results,
        seeds=options.seeds,
        chains=CHAINS,
        steps_per_chain=INNER,
        gradient_steps=STEPS,
        rank=RANK,
        alpha=RANK,
        diverged_above=DIVERGED,
        dtype="float64",
    )
    draw_figure(curves, options.out / "counterexample.png")
    print_table(results)


if __name__ == "__main__":
    main()
