"""Rates of the chain under exact and stochastic gradients.

One inequality carries them all. With ``W+ = W - gamma H g``, H a fresh projector that
does not know g, smoothness gives

  f(W+) <= f(W) - gamma/2 |H G|^2 - gamma/2 (1 - L gamma) |H g|^2 + gamma/2 |H (g - G)|^2

for ``G = grad f(W)``. The mean over H turns ``|H G|^2`` into at least ``lam |G|^2``.
"""

from __future__ import annotations

import math

from raclora_jax.theory._numbers import (
    check_count,
    check_lam,
    check_not_negative,
    check_pl,
    check_positive,
    check_step,
)


def gamma_of(*, learning_rate: float, scaling: float = 1.0, steps: int = 1) -> float:
    """The step on the projected gradient that plain SGD on the factor takes.

    ``gamma = learning_rate * scaling^2 * steps``: the gradient of the factor carries one
    ``scaling`` and the lift another. The sum over the steps of a link is what it does to
    first order; a single step, ``steps=1``, is what must stay at or below ``1 / L``.

    Args:
      learning_rate: Rate of ``optax.identity()`` inside ``raclora``, or of SGD on the
        factors of the adapter form.
      scaling: ``alpha / rank``; 1 by default, ``sqrt(dim / rank)`` for ``alpha="dim"``.
      steps: Steps of a link.

    Returns:
      gamma, in units of ``|W|^2 / f``.

    Raises:
      ValueError: If an argument is not positive.

    Example:
      >>> gamma_of(learning_rate=0.1, scaling=2.0)
      0.4
    """
    check_positive(learning_rate=learning_rate, scaling=scaling)
    check_count(steps=steps)
    return learning_rate * scaling**2 * steps


def gd_step(*, smoothness: float) -> float:
    """The largest step of ``gd_nonconvex`` and ``gd_pl``, ``1 / L``.

    Args:
      smoothness: L, the Lipschitz constant of the gradient.

    Returns:
      The largest gamma.

    Raises:
      ValueError: If ``smoothness`` is not positive.

    Example:
      >>> gd_step(smoothness=4.0)
      0.25
    """
    check_positive(smoothness=smoothness)
    return 1 / smoothness


def gd_nonconvex(
    *,
    gap: float,
    lam: float,
    gamma: float,
    links: int,
    smoothness: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links, for exact gradients.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)`` for ``gamma <= 1 / L``.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.
      gamma: Step on the projected gradient.
      links: Links, each with a sketch of its own and one step.
      smoothness: L; where it is given, a larger step than ``1 / L`` is refused.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or gamma is above ``1 / smoothness``.

    Example:
      >>> gd_nonconvex(gap=1.0, lam=0.25, gamma=0.5, links=160)
      0.1

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Theorem 5.3; the proof behind this
      function is ours.
    """
    check_not_negative(gap=gap)
    check_lam(lam)
    check_count(links=links)
    check_positive(gamma=gamma)
    if smoothness is not None:
        check_step(gamma, gd_step(smoothness=smoothness))
    return 2 * gap / (lam * gamma * links)


def gd_pl(
    *,
    gap: float,
    lam: float,
    gamma: float,
    mu: float,
    links: int,
    smoothness: float | None = None,
) -> float:
    """Bound on the optimality gap under the Polyak-Lojasiewicz condition.

    ``E f(W_T) - f* <= (1 - gamma mu lam)^links gap`` for ``gamma <= 1 / L`` and
    ``|grad f|^2 >= 2 mu (f - f*)``.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.
      gamma: Step on the projected gradient.
      mu: Constant of the condition; at most L.
      links: Links, each with a sketch of its own and one step.
      smoothness: L; without it a step above ``1 / mu`` is refused, which none may take.

    Returns:
      The bound, in units of f.

    Raises:
      ValueError: If a number is out of range, or mu, smoothness and gamma contradict.

    Example:
      >>> gd_pl(gap=1.0, lam=0.5, gamma=1.0, mu=1.0, links=3)
      0.125

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Theorem 5.5; the proof behind this
      function is ours.
    """
    check_not_negative(gap=gap)
    check_lam(lam)
    check_count(links=links)
    check_pl(gamma, mu, smoothness)
    return gap * _contraction(gamma, mu, lam) ** links


def links_for(
    *,
    gap: float,
    target: float,
    lam: float,
    gamma: float,
    mu: float,
    smoothness: float | None = None,
) -> int:
    """Links after which ``gd_pl`` is at most ``target``.

    ``ceil(log(gap / target) / -log(1 - gamma mu lam))``.

    Args:
      gap: ``f(W_0) - f*``.
      target: The gap wanted.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.
      gamma: Step on the projected gradient.
      mu: Constant of the Polyak-Lojasiewicz condition; at most L.
      smoothness: L, if known.

    Returns:
      The number of links; 0 if the gap is small enough to begin with.

    Raises:
      ValueError: As ``gd_pl``, and if ``target`` is not positive.

    Example:
      >>> links_for(gap=1.0, target=1e-3, lam=0.5, gamma=1.0, mu=1.0)
      10
    """
    check_not_negative(gap=gap)
    check_positive(target=target)
    check_lam(lam)
    check_pl(gamma, mu, smoothness)
    if gap <= target:
        return 0
    factor = _contraction(gamma, mu, lam)
    return math.ceil(math.log(gap / target) / -math.log(factor)) if factor > 0 else 1


def sgd_step(*, smoothness: float, lam: float, lam_max: float | None = None) -> float:
    """The largest step of ``sgd_nonconvex`` and ``sgd_pl``, ``lam / (L lam_max)``.

    Args:
      smoothness: L, the Lipschitz constant of the gradient.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` where the law knows no direction, as with the
        library's own, and then the step is ``1 / L``.

    Returns:
      The largest gamma.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> sgd_step(smoothness=4.0, lam=0.25)
      0.25
    """
    check_positive(smoothness=smoothness)
    return lam / (smoothness * check_lam(lam, lam_max))


def sgd_nonconvex(
    *,
    gap: float,
    lam: float,
    gamma: float,
    links: int,
    smoothness: float,
    variance: float,
    lam_max: float | None = None,
) -> float:
    """Bound on the mean squared gradient over the links, for unbiased gradients.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)
    + L gamma variance lam_max / lam``. The second term is a floor that only a smaller
    step or a larger batch lowers. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      gamma: Step on the projected gradient, at most ``sgd_step``.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the gradient.
      variance: ``E |g - grad f|^2`` of the stochastic gradient g, of the whole matrix.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of ``|grad f|^2``.

    Raises:
      ValueError: If a number is out of range, or gamma above the largest step.

    Example:
      >>> sgd_nonconvex(
      ...     gap=1.0, lam=0.5, gamma=0.25, links=16, smoothness=4.0, variance=0.5
      ... )
      1.5
    """
    check_not_negative(gap=gap, variance=variance)
    check_count(links=links)
    most = check_lam(lam, lam_max)
    check_step(gamma, sgd_step(smoothness=smoothness, lam=lam, lam_max=most))
    return 2 * gap / (lam * gamma * links) + smoothness * gamma * variance * most / lam


def sgd_pl(
    *,
    gap: float,
    lam: float,
    gamma: float,
    mu: float,
    links: int,
    smoothness: float,
    variance: float,
    lam_max: float | None = None,
) -> float:
    """Bound on the optimality gap under the PL condition, for unbiased gradients.

    ``E f(W_T) - f* <= (1 - gamma mu lam)^links gap
    + L gamma variance lam_max / (2 mu lam)``. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector.
      gamma: Step on the projected gradient, at most ``sgd_step``.
      mu: Constant of the Polyak-Lojasiewicz condition; at most L.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the gradient.
      variance: ``E |g - grad f|^2`` of the stochastic gradient g, of the whole matrix.
      lam_max: Largest eigenvalue of the mean projector; ``lam`` by default.

    Returns:
      The bound, in units of f.

    Raises:
      ValueError: If a number is out of range, or mu, smoothness and gamma contradict.

    Example:
      >>> sgd_pl(
      ...     gap=1.0, lam=0.5, gamma=0.5, mu=1.0, links=50, smoothness=2.0, variance=0.2
      ... ).__round__(3)
      0.1
    """
    check_not_negative(gap=gap, variance=variance)
    check_count(links=links)
    most = check_lam(lam, lam_max)
    check_pl(gamma, mu, smoothness)
    check_step(gamma, sgd_step(smoothness=smoothness, lam=lam, lam_max=most))
    floor = smoothness * gamma * variance * most / (2 * mu * lam)
    return gap * _contraction(gamma, mu, lam) ** links + floor


def _contraction(gamma: float, mu: float, lam: float) -> float:
    return max(0.0, 1 - gamma * mu * lam)
