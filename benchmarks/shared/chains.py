"""Many seeds of one chain in one compiled program: what the convex studies share."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import raclora_jax as rl
from benchmarks.shared import rows


def arguments(description: str | None, program: str) -> argparse.Namespace:
    """The options of a study: where results go, beside its ``__file__``; the seeds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=pathlib.Path, default=rows.folder(program))
    parser.add_argument("--seeds", type=int, default=20)
    return parser.parse_args()


def projected_gd(
    gamma: Array | float, spec: rl.Spec, key: Array
) -> optax.GradientTransformation:
    """Eq. 3 or 4 of the paper: ``W <- W - gamma H grad``, by the library.

    An identity inside makes the library's step ``learning_rate * scaling^2 * H grad``.
    Specs here have ``alpha=None``, so scaling is 1 and gamma is the learning rate.

    Args:
      gamma: Step size, at most 1/L for the theory.
      spec: Rank, side, distribution, and steps per link.
      key: Raw key data or a key; may be traced, so that seeds can be vmapped.

    Returns:
      An optax transformation for dense gradients.

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Section 5.1.
    """
    return rl.raclora(gamma, spec, inner=optax.identity(), key=key)


def trajectory(
    tx: optax.GradientTransformation,
    start: Array,
    grad: Callable[[Array], Array],
    gap: Callable[[Array], Array],
    steps: int,
) -> Array:
    """The gap before the first step and after each one, ``(steps + 1,)``."""

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        W, state = carry
        updates, state = tx.update(grad(W), state, W)
        W = optax.apply_updates(W, updates)
        return (W, state), gap(W)

    _, gaps = lax.scan(step, (start, tx.init(start)), None, length=steps)
    return jnp.concatenate([gap(start)[None], gaps])


def seed_keys(seeds: int) -> Array:
    """Keys of the runs, ``(seeds,)``; every method of a study sees the same ones."""
    return jax.vmap(jax.random.key)(jnp.arange(seeds))


def quartiles(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower quartile, median and upper quartile over runs, a lost run counting as +inf.

    Args:
      curves: ``(runs, points)``; entries may be NaN or infinite.

    Returns:
      Three arrays ``(points,)``.
    """
    filled = np.where(np.isfinite(curves), curves, np.inf)
    # An order statistic, because interpolating towards inf gives NaN.
    low, middle, high = np.percentile(filled, [25, 50, 75], axis=0, method="higher")
    return low, middle, high
