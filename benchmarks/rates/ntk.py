"""Low-rank training of a linearised network: what the NTK paper claims, measured.

A network of digits is linearised at its start in one 24 x 24 matrix,
``f(x) + <G(x), D>``, and fitted by least squares. Three claims: with the nuclear norm as
regulariser full fine-tuning has a solution whose rank r obeys r (r + 1) / 2 <= K N; LoRA
of a rank above that, with decay on both factors, ends there from everywhere; LoRA of a
small rank also ends in local minima that are worse. A run has ended where its gradient is
zero and its Hessian has no negative eigenvalue. Beside them stands the advice of
``raclora_jax.theory``: ranks, lambda and links, which a chain with one frozen factor is
run to confirm, and how lazy the network is over the change that was found.

Run with ``python -m benchmarks.rates.ntk``.

References:
  Jang, Lee and Ryu, `LoRA Training in the NTK Regime has No Spurious Local Minima
  <https://arxiv.org/abs/2402.11867>`_, 2024. Sizes and data here are ours.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import sklearn.datasets
from jax import Array
from matplotlib.figure import Figure

import raclora_jax as rl
from benchmarks.shared import chains, rows, timing
from raclora_jax import theory

WIDTH = 24
EXAMPLES = (4, 8, 16, 32, 64, 128)
STUDIED, CHAINED = 64, 32  # where LoRA and the chain are run
RANKS = (1, 2, 3, 4, 6)  # of LoRA, and the one that is advised
DECAY = 1e-3  # of the least decay at which the solution is zero
ENDED = 1e-4  # relative excess over the optimum of full fine-tuning
SEEDS = 10
CHAIN_TARGET, CHAIN_STEPS = 1e-3, 40_000


class Problem(NamedTuple):
    """``|J D - target|^2 / 2N + decay |D|_*`` for a change D of one matrix.

    Attributes:
      jacobian: ``(examples, WIDTH, WIDTH)``.
      target: ``(examples,)``, what the start leaves to fit.
      decay: Factor of the nuclear norm.
      params: The network at the start.
      images: ``(examples, 64)``.
    """

    jacobian: np.ndarray
    target: np.ndarray
    decay: float
    params: Any
    images: Array

    @classmethod
    def of(cls, examples: int, seed: int) -> Problem:
        """Even digits against odd ones, other digits and weights for every seed."""
        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(labels))[:examples]
        x = jnp.asarray(images[chosen] / 8 - 1)
        sizes = ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))
        params = [
            jnp.asarray(rng.standard_normal(size) / np.sqrt(size[0])) for size in sizes
        ]
        jacobian = jax.jacobian(lambda w: network([params[0], w, params[2]], x))(
            params[1]
        )
        target = (-1.0) ** labels[chosen] - np.asarray(network(params, x))
        problem = cls(np.asarray(jacobian), target, 0.0, params, x)
        slope = np.linalg.norm(problem.gradient(np.zeros((WIDTH, WIDTH))), 2)
        return problem._replace(decay=DECAY * slope)

    def gradient(self, D: np.ndarray) -> np.ndarray:
        """Of the least squares."""
        rest = np.einsum("nij,ij->n", self.jacobian, D) - self.target
        return np.einsum("n,nij->ij", rest, self.jacobian) / len(rest)

    def value(self, D: np.ndarray) -> float:
        """Of the objective."""
        rest = np.einsum("nij,ij->n", self.jacobian, D) - self.target
        nuclear = np.linalg.svd(D, compute_uv=False).sum()
        return float(rest @ rest / (2 * len(rest)) + self.decay * nuclear)


def network(params: Any, x: Array) -> Array:
    """Two hidden layers of tanh, one output."""
    first, middle, last = params
    return (jnp.tanh(jnp.tanh(x @ first) @ middle) @ last)[:, 0]


# Full fine-tuning --------------------------------------------------------------------


def full(problem: Problem, steps: int = 20_000) -> np.ndarray:
    """The minimiser, by accelerated proximal steps that restart where they overshoot."""
    flat = problem.jacobian.reshape(len(problem.target), -1)
    step = len(flat) / np.linalg.norm(flat, 2) ** 2
    D = ahead = np.zeros((WIDTH, WIDTH))
    pace = 1.0
    for _ in range(steps):
        left, values, right = np.linalg.svd(ahead - step * problem.gradient(ahead))
        new = left * np.maximum(values - step * problem.decay, 0) @ right
        if np.sum((ahead - new) * (new - D)) > 0:
            pace = 1.0
        faster = (1 + np.sqrt(1 + 4 * pace**2)) / 2
        ahead = new + (pace - 1) / faster * (new - D)
        if np.linalg.norm(new - D) < 1e-10 * np.linalg.norm(new):
            return new
        D, pace = new, faster
    return D


def rank_of(D: np.ndarray) -> int:
    """Singular values above a millionth of the largest."""
    values = np.linalg.svd(D, compute_uv=False)
    return int(np.sum(values > 1e-6 * values[0]))


def full_row(examples: int, seed: int) -> dict[str, Any]:
    """The rank of full fine-tuning's solution, beside its bound."""
    problem = Problem.of(examples, seed)
    D = full(problem)
    delta = [jnp.zeros_like(w) for w in problem.params]
    delta[1] = jnp.asarray(D)
    lazy = theory.lazy_check(network, problem.params, delta, problem.images)
    return {
        "study": "full",
        "examples": examples,
        "seed": seed,
        "rank": rank_of(D),
        "bound": theory.ntk_rank(examples) - 1,
        "value": problem.value(D),
        "start": problem.value(np.zeros_like(D)),
        "lazy": float(lazy),
    }


# LoRA --------------------------------------------------------------------------------


def lora_rows(data: int, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Where LoRA ends on one problem, beside the optimum of full fine-tuning."""
    problem = Problem.of(STUDIED, data)
    best = full(problem)
    made = [row for rank in ranks for row in lora_ends(problem, rank)]
    start, optimum = problem.value(np.zeros_like(best)), problem.value(best)
    for row in made:
        row["excess"] = (row.pop("value") - optimum) / (start - optimum)
        row |= {"data": data, "rank_of_optimum": rank_of(best)}
    return made


def lora_ends(problem: Problem, rank: int) -> list[dict[str, Any]]:
    """Where it ends from several starts, and what a local minimum would show."""
    jacobian, target = jnp.asarray(problem.jacobian), jnp.asarray(problem.target)

    @jax.jit
    def objective(flat: Array) -> Array:
        left, right = flat.reshape(2, WIDTH, rank)
        rest = jnp.einsum("nij,ir,jr->n", jacobian, left, right) - target
        return rest @ rest / (2 * len(target)) + problem.decay / 2 * flat @ flat

    slope, curvature = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
    made = []
    for seed in range(SEEDS):
        first = np.random.default_rng(seed).standard_normal((2, WIDTH, rank))
        answer = scipy.optimize.minimize(
            lambda flat: float(objective(flat)),
            first.ravel() / np.sqrt(WIDTH),
            jac=lambda flat: np.asarray(slope(flat)),
            method="L-BFGS-B",
            options={"maxiter": 50_000, "maxfun": 100_000, "ftol": 0, "gtol": 1e-10},
        )
        lowest = float(jnp.linalg.eigvalsh(curvature(answer.x))[0])
        made.append(
            {
                "study": "LoRA",
                "rank": rank,
                "seed": seed,
                "value": float(answer.fun),
                "gradient": float(np.linalg.norm(slope(answer.x))),
                "lowest_curvature": lowest,
            }
        )
    return made


# A chain with one frozen factor ------------------------------------------------------


def chain_row(problem: Problem, rank: int | None) -> dict[str, Any]:
    """Steps of gradient descent, or of links of one step, to a small loss."""
    jacobian, target = jnp.asarray(problem.jacobian), jnp.asarray(problem.target)
    flat = problem.jacobian.reshape(len(target), -1)
    gamma = len(flat) / np.linalg.norm(flat, 2) ** 2

    def loss(D: Array) -> Array:
        return jnp.mean((jnp.einsum("nij,ij->n", jacobian, D) - target) ** 2) / 2

    def run(key: Array) -> Array:
        if rank is None:
            tx = optax.sgd(gamma)
        else:
            spec = rl.Spec(rank, resample_every=1)
            tx = chains.projected_gd(gamma, spec, jax.random.key_data(key))
        start = jnp.zeros((WIDTH, WIDTH))
        return chains.trajectory(tx, start, jax.grad(loss), loss, CHAIN_STEPS)

    curves = np.asarray(
        jax.jit(jax.vmap(run))(chains.seed_keys(1 if rank is None else 5))
    )
    below = curves <= CHAIN_TARGET * curves[:, :1]
    reached = [int(one.argmax()) if one.any() else None for one in below]
    return {
        "study": "chain",
        "rank": rank,
        "lambda": 1.0 if rank is None else rank / WIDTH,
        "links": reached,
    }


# The program -------------------------------------------------------------------------


def draw(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Ranks of full fine-tuning, ends of LoRA, links of a chain."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    whole, pairs, chain = (
        [row for row in results if row["study"] == study]
        for study in ("full", "LoRA", "chain")
    )
    bounds = {row["examples"]: row["bound"] for row in whole}
    left.plot(
        [row["examples"] for row in whole],
        [row["rank"] for row in whole],
        "o",
        alpha=0.5,
        label="rank of the solution",
    )
    left.plot(*zip(*sorted(bounds.items()), strict=True), "k--", label="bound")
    left.set(xscale="log", xlabel="examples", title="full fine-tuning", ylim=(0, None))
    left.legend()
    ends = [max(row["excess"], 1e-9) for row in pairs]
    middle.plot([row["rank"] for row in pairs], ends, "o", color="tab:red", alpha=0.3)
    middle.axhline(ENDED, color="black", linestyle=":", linewidth=1)
    middle.set(yscale="log", xlabel="rank", title=f"LoRA, {STUDIED} examples")
    middle.set_ylabel("excess over the optimum, relative")
    (descent,) = (row["links"][0] for row in chain if row["rank"] is None)
    sketched = [row for row in chain if row["rank"] and None not in row["links"]]
    ranks = np.array([row["rank"] for row in sketched])
    right.plot(ranks, [np.mean(row["links"]) for row in sketched], "o", label="chain")
    right.plot(ranks, descent * WIDTH / ranks, "k--", label="full descent x d / r")
    right.set(xscale="log", yscale="log", xlabel="rank", title="links, one factor frozen")
    right.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Runs the three studies, writes rows and figure, prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=rows.folder(__file__))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    results = [full_row(n, seed) for n in EXAMPLES for seed in range(3)]
    advised = theory.ntk_rank(STUDIED)
    for data in range(3):
        results += lora_rows(data, (*RANKS, advised))
    problem = Problem.of(CHAINED, 0)
    results += [chain_row(problem, rank) for rank in (None, 1, 2, 4, 8, 12)]
    rows.save(
        options.out / "ntk.json",
        "python -m benchmarks.rates.ntk",
        results,
        width=WIDTH,
        studied=STUDIED,
        chained=CHAINED,
        decay=DECAY,
        ended_below=ENDED,
        chain_target=CHAIN_TARGET,
        ntk_rank=advised,
        capacity_rank=theory.capacity_rank(STUDIED, rows=WIDTH, cols=WIDTH),
        dtype="float64",
    )
    draw(results, options.out / "ntk.png")
    timing.print_rows(results, "ntk")


if __name__ == "__main__":
    main()
