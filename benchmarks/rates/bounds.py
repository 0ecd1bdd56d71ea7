"""Projected gradient steps of every law, side and rank, against their bounds."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import raclora_jax as rl
from benchmarks.rates.problems import FAST_COMPILE, Problem
from benchmarks.shared import chains
from raclora_jax import theory

LAWS = ("orthonormal", "rademacher", "coordinate", "block")
SIDES = ("left", "right")
# Cases whose mean gaps are kept for the figure.
DRAWN = tuple(("left", rank) for rank in (1, 2, 4, 8))
# Links in units of 1 / lambda.
LENGTH = 20
ORTHOGONAL_LINKS = 400


def runs(
    problem: Problem,
    inner: optax.GradientTransformation,
    spec: rl.Spec | None,
    *,
    learning_rate: float,
    links: int,
    seeds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps ``(seeds, links + 1)`` and gradients ``(seeds, links, rows, cols)``."""

    def one(key: Array) -> tuple[Array, Array]:
        tx = (
            optax.sgd(learning_rate)
            if spec is None
            else rl.raclora(learning_rate, spec, inner=inner, key=key)
        )

        def step(carry, _):
            W, state = carry
            G = problem.grad(W)
            updates, state = tx.update(G, state, W)
            W = optax.apply_updates(W, updates)
            return (W, state), (problem.gap(W), G)

        start = problem.start
        _, (gaps, grads) = lax.scan(step, (start, tx.init(start)), None, length=links)
        return jnp.concatenate([problem.gap(start)[None], gaps]), grads

    gaps, grads = jax.jit(jax.vmap(one), compiler_options=FAST_COMPILE)(
        chains.seed_keys(seeds)
    )
    return np.asarray(gaps), np.asarray(grads)


def cases(problem: Problem):
    """``(law, side, rank, dim)``; the full rank is one case, plain gradient descent."""
    for side, dim in zip(SIDES, problem.start.shape, strict=True):
        for law in LAWS:
            for rank in range(1, dim):
                yield law, side, rank, dim
        yield "all of it", side, dim, dim


def measure(problem: Problem, seeds: int) -> list[dict]:
    """Rows of one problem; those of least squares hold what the figure draws."""
    results = []
    for law, side, rank, dim in cases(problem):
        row, gaps = against_bounds(problem, law, side, rank, dim, seeds)
        if law == "orthonormal" and (side, rank) in DRAWN and problem.mu is not None:
            mean = gaps.mean(axis=0)
            row["relative_gaps"] = [float(f"{gap:.4g}") for gap in mean / mean[0]]
        results.append(row)
    return results + [orthogonal_row(problem, side, seeds) for side in SIDES]


def against_bounds(
    problem: Problem, law: str, side: str, rank: int, dim: int, seeds: int
) -> tuple[dict, np.ndarray]:
    """One case at gamma = 1 / L: what was measured over what the theory allows."""
    spec = None
    if rank < dim:
        spec = rl.Spec(rank, side=side, sketch=law, resample_every=1, cache=False)
    lam = 1.0 if spec is None else theory.lambdas(problem.start, spec)[""]
    gamma, links = 1 / problem.smoothness, math.ceil(LENGTH / lam)
    gaps, grads = runs(
        problem, optax.identity(), spec, learning_rate=gamma, links=links, seeds=seeds
    )
    known = {"smoothness": problem.smoothness, "lam": lam}
    start = {"gap": float(gaps[0, 0]), "gamma": gamma}
    squares = np.sum(grads**2, axis=(2, 3)).mean(axis=1)
    bound = theory.Gd(**known).bound(**start, links=links)
    row = {
        "study": "bounds",
        "problem": problem.name,
        "law": law,
        "side": side,
        "rank": rank,
        "lam": lam,
        "links": links,
        "nonconvex_over_bound": float(squares.mean() / bound),
        "nonconvex_over_bound_worst_seed": float(squares.max() / bound),
    }
    if problem.mu is None:
        return row, gaps
    mean = gaps.mean(axis=0)
    contracting = theory.GdPl(**known, mu=problem.mu)
    pl = [contracting.bound(**start, links=t) for t in range(1, links + 1)]
    row["pl_over_bound"] = float(np.max(mean[1:] / pl))
    rate = np.log(mean[-1] / mean[0]) / np.log(pl[-1] / start["gap"])
    row["log_rate_over_bound"] = float(rate)
    if law == "block" and dim % rank == 0:
        turns = dim // rank
        cycles = range(1, links // turns + 1)
        cycling = theory.BlockPl(
            smoothness=problem.smoothness, mu=problem.mu, dim=dim, rank=rank
        )
        whole = [
            [cycling.bound(**start, cycles=cycle, sure=sure) for cycle in cycles]
            for sure in (False, True)
        ]
        at = gaps[:, [cycle * turns for cycle in cycles]]
        row["cycle_over_bound"] = float(np.max(at.mean(axis=0) / whole[0]))
        row["cycle_over_sure_bound_worst_seed"] = float(np.max(at / whole[1]))
    return row, gaps


def orthogonal_row(problem: Problem, side: str, seeds: int) -> dict:
    """The orthogonalised step at the step that makes its bound smallest."""
    rank, links = 2, ORTHOGONAL_LINKS
    spec = rl.Spec(rank, side=side, resample_every=1, cache=False)
    lam = theory.lambdas(problem.start, spec)[""]
    rate = theory.Orthogonal(smoothness=problem.smoothness, lam=lam, rank=rank)
    run = {"gap": float(problem.gap(problem.start)), "links": links}
    eta = rate.best_step(**run)
    other = problem.start.shape[side == "left"]
    _, grads = runs(
        problem,
        rl.orthogonal(),
        spec,
        learning_rate=eta / math.sqrt(max(rank, other)),
        links=links,
        seeds=seeds,
    )
    nuclear = np.linalg.svd(grads, compute_uv=False).sum(axis=2)
    bound = rate.bound(**run, eta=eta)
    return {
        "study": "orthogonalised",
        "problem": problem.name,
        "side": side,
        "rank": rank,
        "lam": lam,
        "links": links,
        "nuclear_over_bound": float(nuclear.mean(axis=0).min() / bound),
    }
