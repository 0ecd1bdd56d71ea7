"""Rates of the chain on compressed gradients of several clients.

The bounds are made as in ``_variance_reduced``.
"""

from __future__ import annotations

import math

from raclora_jax.theory._descent import gd_nonconvex
from raclora_jax.theory._numbers import (
    check_count,
    check_fraction,
    check_lam,
    check_not_negative,
    check_step,
)
from raclora_jax.theory._variance_reduced import largest_step


def marina_step(
    *,
    smoothness: float,
    sample_smoothness: float,
    lam_max: float,
    refresh: float,
    compression: float,
    clients: int,
) -> float:
    """The largest step of ``marina``.

    ``1 / (L + Ls sqrt(lam_max (1 - refresh) compression / (refresh clients)))``.

    Args:
      smoothness: L, the Lipschitz constant of the mean gradient.
      sample_smoothness: Ls, root mean square of the clients' constants; at least L.
      lam_max: Largest eigenvalue of the mean projector.
      refresh: Probability of full gradients from all, in (0, 1].
      compression: omega of the unbiased compressor, ``E |Q(x) - x|^2 <= omega |x|^2``;
        ``d / k - 1`` for k random ones of d numbers.
      clients: How many there are.

    Returns:
      The largest gamma.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> marina_step(
      ...     smoothness=1.0, sample_smoothness=2.0, lam_max=0.25,
      ...     refresh=0.5, compression=9.0, clients=9,
      ... )
      0.5
    """
    check_fraction(refresh=refresh)
    check_not_negative(compression=compression)
    check_count(clients=clients)
    spread = (1 - refresh) * compression / (refresh * clients)
    return largest_step(smoothness, sample_smoothness, lam_max, spread)


def marina(
    *,
    gap: float,
    lam: float,
    gamma: float,
    links: int,
    smoothness: float,
    sample_smoothness: float,
    refresh: float,
    compression: float,
    clients: int,
    lam_max: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links with MARINA: no floor.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)``, with exact gradients at the
    start. Clients send compressed differences of gradients, and full ones with
    probability ``refresh``, all at once. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      gamma: Step on the projected estimate, at most ``marina_step``.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the mean gradient.
      sample_smoothness: Ls, root mean square of the clients' constants; at least L.
      refresh: Probability of full gradients from all, in (0, 1].
      compression: omega of the unbiased compressor.
      clients: How many there are.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or gamma above the largest step.

    Example:
      >>> marina(
      ...     gap=1.0, lam=0.25, gamma=0.5, links=160, smoothness=1.0,
      ...     sample_smoothness=2.0, refresh=0.5, compression=9.0, clients=9,
      ... )
      0.1

    References:
      Gorbunov et al., `MARINA <https://arxiv.org/abs/2102.07845>`_, 2021.
    """
    most = check_lam(lam, lam_max)
    largest = marina_step(
        smoothness=smoothness,
        sample_smoothness=sample_smoothness,
        lam_max=most,
        refresh=refresh,
        compression=compression,
        clients=clients,
    )
    check_step(gamma, largest)
    return gd_nonconvex(gap=gap, lam=lam, gamma=gamma, links=links)


def ef21_step(
    *, smoothness: float, sample_smoothness: float, lam_max: float, contraction: float
) -> float:
    """The largest step of ``ef21``.

    ``1 / (L + Ls sqrt(lam_max beta / theta))`` with
    ``theta = 1 - sqrt(1 - contraction)`` and ``beta = (1 - contraction) / theta``.

    Args:
      smoothness: L, the Lipschitz constant of the mean gradient.
      sample_smoothness: Ls, root mean square of the clients' constants; at least L.
      lam_max: Largest eigenvalue of the mean projector.
      contraction: a of the compressor, ``E |C(x) - x|^2 <= (1 - a) |x|^2``, in (0, 1];
        ``k / d`` for the k largest of d numbers.

    Returns:
      The largest gamma.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> ef21_step(smoothness=1.0, sample_smoothness=2.0, lam_max=0.25, contraction=0.75)
      0.5
    """
    theta, beta = _ef21_constants(contraction)
    return largest_step(smoothness, sample_smoothness, lam_max, beta / theta)


def ef21(
    *,
    gap: float,
    lam: float,
    gamma: float,
    links: int,
    smoothness: float,
    sample_smoothness: float,
    contraction: float,
    start_error: float = 0.0,
    lam_max: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links with EF21: no floor.

    ``mean_t E |grad f(W_t)|^2 <= 2 phi / (lam gamma links)`` with
    ``phi = gap + gamma lam_max start_error / (2 theta)`` and
    ``theta = 1 - sqrt(1 - contraction)``. Each client sends its compressed correction,
    ``g_j+ = g_j + C(grad f_j(W+) - g_j)``. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      gamma: Step on the projected estimate, at most ``ef21_step``.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the mean gradient.
      sample_smoothness: Ls, root mean square of the clients' constants; at least L.
      contraction: a of the compressor, in (0, 1].
      start_error: ``mean_j E |g_j - grad f_j(W_0)|^2`` of the first estimates.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or gamma above the largest step.

    Example:
      >>> ef21(
      ...     gap=1.0, lam=0.25, gamma=0.5, links=160,
      ...     smoothness=1.0, sample_smoothness=2.0, contraction=0.75,
      ... )
      0.1

    References:
      Richtarik et al., `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021.
    """
    check_not_negative(start_error=start_error)
    most = check_lam(lam, lam_max)
    largest = ef21_step(
        smoothness=smoothness,
        sample_smoothness=sample_smoothness,
        lam_max=most,
        contraction=contraction,
    )
    check_step(gamma, largest)
    theta, _ = _ef21_constants(contraction)
    return gd_nonconvex(
        gap=gap + gamma * most * start_error / (2 * theta),
        lam=lam,
        gamma=gamma,
        links=links,
    )


def _ef21_constants(contraction: float) -> tuple[float, float]:
    """theta and beta of ``v+ <= (1 - theta) v + beta |change|^2``."""
    check_fraction(contraction=contraction)
    theta = 1 - math.sqrt(1 - contraction)
    return theta, (1 - contraction) / theta
