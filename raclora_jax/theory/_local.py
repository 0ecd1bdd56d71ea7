"""One link of Fed-RAC-LoRA: local steps of several clients on one shared sketch."""

from __future__ import annotations

import math

from raclora_jax.theory._numbers import (
    check_count,
    check_lam,
    check_not_negative,
    check_positive,
    check_step,
)


def fed_step(*, smoothness: float, local_steps: int) -> float:
    """The largest local step of ``fed_link`` and ``fed_nonconvex``, ``1 / (L E)``.

    Args:
      smoothness: L, the largest Lipschitz constant of a client's gradient.
      local_steps: E, steps of every client in a link.

    Returns:
      The largest eta.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> fed_step(smoothness=4.0, local_steps=5)
      0.05
    """
    check_positive(smoothness=smoothness)
    check_count(local_steps=local_steps)
    return 1 / (smoothness * local_steps)


def fed_link(
    *,
    captured: float,
    dissimilarity: float,
    eta: float,
    local_steps: int,
    smoothness: float,
) -> float:
    """Bound on the change of the loss over one link of Fed-RAC-LoRA.

    ``f(W+) - f(W) <= -gamma/2 (1 - c) captured + gamma/2 c dissimilarity`` with
    ``gamma = eta E`` and ``c = ((e - 1) L eta (E - 1) / 2)^2``: every client takes E
    exact gradient steps on the factor of one shared sketch, and the factors are averaged.
    With one step there is no drift. Our derivation, without the noise of minibatches.

    Args:
      captured: ``|H grad f(W)|^2``, what the sketch holds of the mean gradient.
      dissimilarity: ``mean_j |H (grad f_j(W) - grad f(W))|^2`` over the clients.
      eta: Local step, at most ``fed_step``.
      local_steps: E, steps of every client in a link.
      smoothness: L, the largest Lipschitz constant of a client's gradient.

    Returns:
      The bound, in units of f; negative where descent is guaranteed.

    Raises:
      ValueError: If a number is out of range, or eta above the largest step.

    Example:
      >>> fed_link(
      ...     captured=2.0, dissimilarity=1.0, eta=0.25, local_steps=1, smoothness=4.0
      ... )
      -0.25
    """
    check_not_negative(captured=captured, dissimilarity=dissimilarity)
    drift = _drift(eta, local_steps, smoothness)
    gamma = eta * local_steps
    return gamma / 2 * (drift * dissimilarity - (1 - drift) * captured)


def fed_nonconvex(
    *,
    gap: float,
    lam: float,
    eta: float,
    local_steps: int,
    links: int,
    smoothness: float,
    dissimilarity: float,
    lam_max: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links of Fed-RAC-LoRA.

    ``mean_t E |grad f(W_t)|^2 <= (2 gap / (lam gamma links)
    + c (lam_max / lam) dissimilarity) / (1 - c)`` with gamma and c of ``fed_link``. Our
    derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      eta: Local step, at most ``fed_step``.
      local_steps: E, steps of every client in a link.
      links: Links, each with one sketch shared by all.
      smoothness: L, the largest Lipschitz constant of a client's gradient.
      dissimilarity: Upper bound on ``mean_j |grad f_j - grad f|^2`` along the run.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or eta above the largest step.

    Example:
      >>> fed_nonconvex(
      ...     gap=1.0, lam=0.5, eta=0.25, local_steps=1, links=160, smoothness=4.0,
      ...     dissimilarity=1.0,
      ... )
      0.1
    """
    check_not_negative(gap=gap, dissimilarity=dissimilarity)
    check_count(links=links)
    most = check_lam(lam, lam_max)
    drift = _drift(eta, local_steps, smoothness)
    start = 2 * gap / (lam * eta * local_steps * links)
    return (start + drift * most / lam * dissimilarity) / (1 - drift)


def _drift(eta: float, local_steps: int, smoothness: float) -> float:
    """c, below 0.74 for every step that is allowed."""
    check_step(eta, fed_step(smoothness=smoothness, local_steps=local_steps), "eta")
    return ((math.e - 1) / 2 * smoothness * eta * (local_steps - 1)) ** 2
