"""Rates of the chain on variance-reduced gradient estimators.

The bounds add ``c |g - grad f|^2`` to the inequality of ``_descent``, use the recursion
of each estimator for it, and choose gamma so that the ``|H g|^2`` terms cancel. What is
left is the bound of exact gradients with a smaller step. The derivations are ours; the
estimators are those of the papers named.

``lam_max = None`` stands for a law that knows no direction, ``lam_max = lam``.
"""

from __future__ import annotations

import math

from raclora_jax.theory._descent import gd_nonconvex
from raclora_jax.theory._numbers import (
    check_count,
    check_fraction,
    check_lam,
    check_not_negative,
    check_sample_smoothness,
    check_step,
)


def largest_step(
    smoothness: float, sample_smoothness: float, lam_max: float, spread: float
) -> float:
    """The largest gamma with ``A gamma^2 + L gamma <= 1`` for sure."""
    check_sample_smoothness(smoothness, sample_smoothness)
    check_fraction(lam_max=lam_max)
    return 1 / (smoothness + sample_smoothness * math.sqrt(lam_max * spread))


def page_step(
    *,
    smoothness: float,
    sample_smoothness: float,
    lam_max: float,
    refresh: float,
    batch: int,
) -> float:
    """The largest step of ``page``.

    ``1 / (L + Ls sqrt(lam_max (1 - refresh) / (refresh batch)))``.

    Args:
      smoothness: L, the Lipschitz constant of the full gradient.
      sample_smoothness: Ls, root mean square of the samples' constants; at least L.
      lam_max: Largest eigenvalue of the mean projector.
      refresh: Probability of a full gradient, in (0, 1].
      batch: Samples of a difference otherwise.

    Returns:
      The largest gamma.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> page_step(
      ...     smoothness=1.0, sample_smoothness=2.0, lam_max=0.25, refresh=0.5, batch=1
      ... )
      0.5
    """
    check_fraction(refresh=refresh)
    check_count(batch=batch)
    spread = (1 - refresh) / (refresh * batch)
    return largest_step(smoothness, sample_smoothness, lam_max, spread)


def page(
    *,
    gap: float,
    lam: float,
    gamma: float,
    links: int,
    smoothness: float,
    sample_smoothness: float,
    refresh: float,
    batch: int,
    lam_max: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links with PAGE: no noise floor.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)``, with an exact gradient at
    the start. PAGE takes a full gradient with probability ``refresh`` and otherwise adds
    the difference of two minibatch gradients on the same samples. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      gamma: Step on the projected estimate, at most ``page_step``.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the full gradient.
      sample_smoothness: Ls, root mean square of the samples' constants; at least L.
      refresh: Probability of a full gradient, in (0, 1].
      batch: Samples of a difference otherwise.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or gamma above the largest step.

    Example:
      >>> page(
      ...     gap=1.0, lam=0.25, gamma=0.5, links=160,
      ...     smoothness=1.0, sample_smoothness=2.0, refresh=0.5, batch=1,
      ... )
      0.1

    References:
      Li et al., `PAGE <https://arxiv.org/abs/2008.10898>`_, 2021.
    """
    most = check_lam(lam, lam_max)
    largest = page_step(
        smoothness=smoothness,
        sample_smoothness=sample_smoothness,
        lam_max=most,
        refresh=refresh,
        batch=batch,
    )
    check_step(gamma, largest)
    return gd_nonconvex(gap=gap, lam=lam, gamma=gamma, links=links)


def mvr_step(
    *, smoothness: float, sample_smoothness: float, lam_max: float, weight: float
) -> float:
    """The largest step of ``mvr``.

    ``1 / (L + Ls (1 - weight) sqrt(2 lam_max / weight))``.

    Args:
      smoothness: L, the Lipschitz constant of the full gradient.
      sample_smoothness: Ls, root mean square of the samples' constants; at least L.
      lam_max: Largest eigenvalue of the mean projector.
      weight: Weight of the new gradient in the estimate, in (0, 1].

    Returns:
      The largest gamma.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> mvr_step(smoothness=1.0, sample_smoothness=2.0, lam_max=0.25, weight=0.5)
      0.5
    """
    check_fraction(weight=weight)
    spread = 2 * (1 - weight) ** 2 / weight
    return largest_step(smoothness, sample_smoothness, lam_max, spread)


def mvr(
    *,
    gap: float,
    lam: float,
    gamma: float,
    links: int,
    smoothness: float,
    sample_smoothness: float,
    weight: float,
    variance: float,
    start_error: float = 0.0,
    lam_max: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links with momentum variance reduction.

    ``mean_t E |grad f(W_t)|^2 <= 2 phi / (lam gamma links)
    + 2 weight variance lam_max / lam`` with
    ``phi = gap + gamma lam_max start_error / (2 weight)``. MVR (STORM) is
    ``g+ = g_new(W+) + (1 - weight) (g - g_new(W))`` on one minibatch. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      gamma: Step on the projected estimate, at most ``mvr_step``.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the full gradient.
      sample_smoothness: Ls, root mean square of the samples' constants; at least L.
      weight: Weight of the new gradient in the estimate, in (0, 1].
      variance: ``E |g_new - grad f|^2`` of one minibatch gradient.
      start_error: ``E |g_0 - grad f(W_0)|^2`` of the first estimate.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or gamma above the largest step.

    Example:
      >>> mvr(
      ...     gap=1.0, lam=0.25, gamma=0.5, links=160,
      ...     smoothness=1.0, sample_smoothness=2.0, weight=0.5, variance=0.2,
      ... ).__round__(6)
      0.3

    References:
      Cutkosky and Orabona, `STORM <https://arxiv.org/abs/1905.10018>`_, 2019.
    """
    check_not_negative(variance=variance, start_error=start_error)
    most = check_lam(lam, lam_max)
    largest = mvr_step(
        smoothness=smoothness,
        sample_smoothness=sample_smoothness,
        lam_max=most,
        weight=weight,
    )
    check_step(gamma, largest)
    phi = gap + gamma * most * start_error / (2 * weight)
    return (
        gd_nonconvex(gap=phi, lam=lam, gamma=gamma, links=links)
        + 2 * weight * variance * most / lam
    )
