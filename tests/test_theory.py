"""The paper's theory, checked on problems whose optimum is known in closed form.

Reference: Malinovsky et al., `Randomized Asymmetric Chain of LoRA
<https://arxiv.org/abs/2410.08305>`_, 2024, Sections 3 and 5.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import chequered
from jax import lax

import raclora_jax as rl
from raclora_jax._core.plan import plan_tree

PROJECTORS = ("orthonormal", "gaussian", "rademacher", "coordinate", "block")
SIDES = ("left", "right")
SEEDS = 16
# Compiling is nearly all the time these small programs take.


@pytest.fixture(autouse=True)
def _float64():
    """Optimality gaps far below float32's resolution; the flag is restored after."""
    with jax.enable_x64(True):
        yield


class Problem(NamedTuple):
    """A quadratic f with f - f* = tr(E^T grad) / 2, E the distance to the optimum."""

    hessian: np.ndarray  # acts on vec W if as wide, else on the columns of W
    optimum: np.ndarray
    start: np.ndarray

    def grad(self, W):
        error = W - self.optimum
        flat = error.reshape(self.hessian.shape[0], -1)
        return (self.hessian @ flat).reshape(error.shape)

    def gap(self, W):
        return jnp.sum((W - self.optimum) * self.grad(W)) / 2

    @property
    def smoothness(self):
        return float(np.linalg.eigvalsh(self.hessian)[-1])

    @property
    def strong_convexity(self):
        return float(np.linalg.eigvalsh(self.hessian)[0])


def counterexample():
    """f(W) = x^T M x / 2 + 1^T x with x = vec W and M = Diag(10, 1, ..., 1); L = 10."""
    diagonal = np.r_[10.0, np.ones(8)]
    start = np.random.default_rng(0).standard_normal((3, 3))
    return Problem(np.diag(diagonal), (-1 / diagonal).reshape(3, 3), start)


def least_squares():
    """||X W - Y||^2 / 2N with 200 Gaussian samples, 16 inputs, 8 outputs."""
    rng = np.random.default_rng(1)
    X, Y = rng.standard_normal((200, 16)), rng.standard_normal((200, 8))
    hessian = X.T @ X / 200
    optimum = np.linalg.solve(hessian, X.T @ Y / 200)
    return Problem(hessian, optimum, rng.standard_normal((16, 8)))


PROBLEMS = {"counterexample": counterexample(), "least squares": least_squares()}


def fresh(rank, side, sketch="orthonormal"):
    """A new sketch in every step, so there is nothing to cache."""
    return rl.Spec(rank, side=side, sketch=sketch, resample_every=1, cache=False)


def seed_keys():
    return jax.random.key_data(jax.vmap(jax.random.key)(jnp.arange(SEEDS)))


@functools.cache
def descended(name, spec, steps):
    """Projected GD at 1/L: gaps ``(seeds, steps + 1)``, weights ``(..., rows, cols)``."""
    problem = PROBLEMS[name]

    def one(key):
        tx = rl.raclora(1 / problem.smoothness, spec, inner=optax.identity(), key=key)

        def step(carry, _):
            W, state = carry
            updates, state = tx.update(problem.grad(W), state, W)
            W = optax.apply_updates(W, updates)
            return (W, state), W

        W = jnp.asarray(problem.start)
        _, weights = lax.scan(step, (W, tx.init(W)), None, length=steps)
        weights = jnp.concatenate([W[None], weights])
        return jax.vmap(problem.gap)(weights), weights

    gaps, weights = jax.jit(jax.vmap(one))(seed_keys())
    return np.asarray(gaps), np.asarray(weights)


@pytest.mark.parametrize(("sketch", "side"), chequered(PROJECTORS, SIDES))
def test_projected_steps_reach_the_optimum_of_the_counterexample(side, sketch):
    gaps, _ = descended("counterexample", fresh(1, side, sketch), 1500)
    assert gaps[:, -1].max() < 1e-12


def test_many_steps_per_link_reach_it_too():
    spec = rl.Spec(1, side="right", resample_every=20)
    gaps, _ = descended("counterexample", spec, 6000)
    assert gaps[:, -1].max() < 1e-12


def test_plain_gd_on_a_raw_gaussian_sketch_diverges_at_the_same_step():
    # The squared norm of the sketch stands where a projector has 1; GD on a link is
    # unstable once it exceeds 2, and 20 steps are enough to be thrown far out.
    spec = rl.Spec(1, side="right", sketch="gaussian_raw", resample_every=20)
    gaps, _ = descended("counterexample", spec, 6000)
    assert not (gaps[:, -1] < 1e6).any()


@pytest.mark.parametrize(("rank", "side"), chequered([1, 2, 4], SIDES))
def test_contraction_per_link_is_below_the_pl_bound(side, rank):
    # Theorem 5.5 with gamma = 1/L: E[gap+ | W] <= (1 - lambda mu / L) gap. Given the
    # past, a link's excess over its mean has mean 0, so links count as independent.
    gaps, _ = descended("least squares", fresh(rank, side), 600)
    ratios = gaps[:, 1:41] / gaps[:, :40]
    problem, dim = PROBLEMS["least squares"], {"left": 16, "right": 8}[side]
    bound = 1 - rank / dim * problem.strong_convexity / problem.smoothness
    standard_error = ratios.std(ddof=1) / np.sqrt(ratios.size)
    assert ratios.mean() + 4 * standard_error < bound


@pytest.mark.parametrize(("rank", "side"), chequered([1, 2], SIDES))
def test_doubling_the_rank_halves_the_links(side, rank):
    def mean_links(rank):
        gaps, _ = descended("least squares", fresh(rank, side), 600)
        small = gaps <= 1e-6 * gaps[:, :1]
        assert small.any(axis=1).all()
        return small.argmax(axis=1).mean()

    # Two, and a little more: a wide sketch also gains from the terms that the bound
    # leaves out. The mean of 16 runs is good to a few percent.
    assert 1.75 < mean_links(rank) / mean_links(2 * rank) < 2.6


@pytest.mark.parametrize("side", SIDES)
def test_one_fixed_sketch_stalls_where_fresh_ones_converge(side):
    problem, steps = PROBLEMS["least squares"], 600
    moving, _ = descended("least squares", fresh(2, side), steps)
    spec = rl.Spec(2, side=side, resample_every=steps)
    fixed, weights = descended("least squares", spec, steps)
    assert (moving[:, -1] / moving[:, 0]).max() < 1e-6
    assert (fixed[:, -1] / fixed[:, 0]).min() > 0.3
    # Not slow but done: nothing is left of the gradient in the span of the sketch.
    grad = problem.grad(weights[0, -1])
    sketch = rl.sample_sketch(grad, spec, key=seed_keys()[0])
    assert float(jnp.abs(rl.project(grad, sketch, spec).value).max()) < 1e-12
    assert float(jnp.abs(grad).max()) > 1e-2


def projectors(spec, like, links):
    """H = S^T (S S^T)^+ S of the first links of seed 0, by NumPy's pseudo-inverse."""

    def draw(link):
        return rl.sample_sketch(like, spec, key=seed_keys()[0], link=link)

    draw_all = jax.jit(jax.vmap(draw))
    sketches = draw_all(jnp.arange(links))
    (plan,) = plan_tree(spec, like).values()
    S = reference.explicit(sketches, plan)
    return np.swapaxes(S, 1, 2) @ np.linalg.pinv(S @ np.swapaxes(S, 1, 2)) @ S


@pytest.mark.parametrize(
    ("name", "rank", "sketch", "steps"),
    [("counterexample", 1, sketch, 1500) for sketch in PROJECTORS]
    + [("least squares", 2, "orthonormal", 600)],
)
@pytest.mark.parametrize("side", SIDES)
def test_each_step_is_eq_3_and_descends_as_the_theory_needs(
    name, rank, sketch, steps, side
):
    problem, spec, links = PROBLEMS[name], fresh(rank, side, sketch), 40
    gaps, weights = descended(name, spec, steps)
    gaps, weights = gaps[0, : links + 1], weights[0, : links + 1]
    grads = np.stack([problem.grad(W) for W in weights[:-1]])
    H = projectors(spec, problem.start, links)
    projected = H @ grads if side == "left" else grads @ H
    gamma = 1 / problem.smoothness
    np.testing.assert_allclose(np.diff(weights, axis=0), -gamma * projected, atol=1e-12)
    # Smoothness and a projector give f(W+) <= f(W) - gamma/2 ||H grad||^2 at 1/L.
    descent = gamma / 2 * np.sum(projected**2, axis=(1, 2))
    assert (gaps[1:] <= gaps[:-1] - descent + 1e-12 * gaps[:-1]).all()
