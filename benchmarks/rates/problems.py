"""The three problems of the rate study, with the constants that the bounds ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.rates.counterexample import SIZE, Quadratic
from benchmarks.rates.linear_regression import LeastSquares

# Compiling is nearly all the time that these small programs take.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
INPUTS, OUTPUTS, SAMPLES = 16, 8, 200
CLASSES, REGULARISER = 5, 0.1
# Full gradient steps that say how low the logistic loss goes.
SETTLED = 5_000


@dataclasses.dataclass(frozen=True)
class Problem:
    """One function of a matrix, and what is known of it.

    Args:
      name: What people read.
      start: W_0.
      gap: ``f - f*``.
      grad: Its gradient.
      smoothness: L.
      mu: Constant of the PL condition; None where there is none.
    """

    name: str
    start: Array
    gap: Callable[[Array], Array]
    grad: Callable[[Array], Array]
    smoothness: float
    mu: float | None = None


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian inputs and targets that no weights fit, and a start."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((SAMPLES, INPUTS))
    Y = rng.standard_normal((SAMPLES, OUTPUTS))
    return X, Y, rng.standard_normal((INPUTS, OUTPUTS))


def least_squares() -> Problem:
    """``|X W - Y|^2 / 2N``."""
    X, Y, start = data()
    problem = LeastSquares.of(X, Y)
    curvatures = np.linalg.eigvalsh(problem.hessian)
    return Problem(
        "least squares",
        jnp.asarray(start),
        problem.gap,
        problem.grad,
        float(curvatures[-1]),
        float(curvatures[0]),
    )


def counterexample() -> Problem:
    """The paper's quadratic on which LoRA fails, at c = 1/2."""
    problem = Quadratic(0.5)
    start = np.random.default_rng(0).standard_normal((SIZE, SIZE))
    return Problem(
        "counterexample",
        jnp.asarray(start),
        problem.gap,
        problem.grad,
        float(problem.smoothness),
        1.0,
    )


@functools.cache
def logistic() -> Problem:
    """Cross-entropy of a linear model plus ``a sum w^2 / (1 + w^2)``, not convex.

    The Hessian of the cross-entropy in the logits is at most 1/2, that of the
    regulariser at most 2 a. f* is the lowest value that full gradient steps reach: the
    proofs need no more than that a run does not go below it.
    """
    rng = np.random.default_rng(1)
    X = rng.standard_normal((SAMPLES, INPUTS))
    classes = np.argmax(X @ rng.standard_normal((INPUTS, CLASSES)), axis=1)
    classes = np.where(rng.random(SAMPLES) < 0.2, rng.integers(0, CLASSES), classes)
    start = jnp.asarray(rng.standard_normal((INPUTS, CLASSES)))
    L = float(np.linalg.eigvalsh(X.T @ X / SAMPLES)[-1]) / 2 + 2 * REGULARISER

    def loss(W: Array) -> Array:
        logits = jax.nn.log_softmax(jnp.asarray(X) @ W)
        own = jnp.take_along_axis(logits, jnp.asarray(classes)[:, None], axis=1)
        return -jnp.mean(own) + REGULARISER * jnp.sum(W**2 / (1 + W**2))

    settled = jax.jit(
        lambda W: jax.lax.fori_loop(0, SETTLED, lambda _, W: W - jax.grad(loss)(W) / L, W)
    )(start)
    lowest = float(loss(settled))
    return Problem(
        "logistic, non-convex", start, lambda W: loss(W) - lowest, jax.grad(loss), L
    )


PROBLEMS = (counterexample, least_squares, logistic)
