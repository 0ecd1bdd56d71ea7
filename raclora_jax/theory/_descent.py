"""Rates of the chain under exact and stochastic gradients.

One inequality carries them all. With ``W+ = W - gamma H g``, H a fresh projector that
does not know g, smoothness gives

  f(W+) <= f(W) - gamma/2 |H G|^2 - gamma/2 (1 - L gamma) |H g|^2 + gamma/2 |H (g - G)|^2

for ``G = grad f(W)``. The mean over H turns ``|H G|^2`` into at least ``lam |G|^2``.

The fields of a rate are constants of the problem, the law and the estimator; where a run
starts, its step and its links are arguments of ``bound``.
"""

from __future__ import annotations

import dataclasses
import math

from raclora_jax.theory._numbers import (
    check_count,
    check_order,
    check_positive,
    check_range,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """What every rate has: L, and constants that are checked as it is made."""

    smoothness: float

    def __post_init__(self) -> None:
        check_range(**vars(self))
        check_order(vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gd(Rate):
    """Gradient descent: the mean squared gradient over the links.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)`` for ``gamma <= 1 / L`` and
    exact gradients.

    Args:
      smoothness: L, the Lipschitz constant of the gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number.

    Example:
      >>> rate = Gd(smoothness=2.0, lam=0.25)
      >>> rate.bound(gap=1.0, gamma=rate.largest_step, links=160)
      0.1

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Theorem 5.3; the proof behind this
      class is ours.
    """

    lam: float

    @property
    def largest_step(self) -> float:
        """The largest gamma for which the bound holds, ``1 / L``."""
        return 1 / self.smoothness

    def bound(self, *, gap: float, gamma: float, links: int) -> float:
        """The bound after ``links`` links.

        Args:
          gap: ``f(W_0) - f*``.
          gamma: Step on the projected gradient, or on the projected estimate of it, at
            most ``largest_step``; in units of ``|W|^2 / f``.
          links: Links, each with a sketch of its own and one step.

        Returns:
          The bound, in units of ``|grad f|^2`` for a mean squared gradient and of f for
          an optimality gap.

        Raises:
          ValueError: If a number is out of range, or gamma above the largest step.
          TypeError: If one is not a number, or ``links`` not an int.
        """
        self._check_run(gap, gamma, links)
        return 2 * gap / (self.lam * gamma * links)

    def _check_run(self, gap: float, gamma: float, links: int) -> None:
        check_range(gap=gap, links=links)
        check_step(gamma, self.largest_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GdPl(Gd):
    """Gradient descent under the Polyak-Lojasiewicz condition: the optimality gap.

    ``E f(W_T) - f* <= (1 - gamma mu lam)^links gap`` for ``gamma <= 1 / L``, exact
    gradients and ``|grad f|^2 >= 2 mu (f - f*)``.

    Args:
      smoothness: L, the Lipschitz constant of the gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.
      mu: Constant of the condition, in the units of L; at most L.

    Raises:
      ValueError: If a number is out of range, or mu above L.
      TypeError: If one is not a number.

    Example:
      >>> rate = GdPl(smoothness=1.0, lam=0.5, mu=1.0)
      >>> rate.bound(gap=1.0, gamma=rate.largest_step, links=3)
      0.125

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Theorem 5.5; the proof behind this
      class is ours.
    """

    mu: float

    def bound(self, *, gap: float, gamma: float, links: int) -> float:
        self._check_run(gap, gamma, links)
        return gap * _contraction(gamma, self.mu, self.lam) ** links

    def links_for(self, *, gap: float, target: float, gamma: float) -> int:
        """Links after which the bound is at most ``target``.

        ``ceil(log(gap / target) / -log(1 - gamma mu lam))``.

        Args:
          gap: ``f(W_0) - f*``.
          target: The gap wanted, in units of f.
          gamma: Step on the projected gradient, at most ``largest_step``.

        Returns:
          The number of links; 0 if the gap is small enough to begin with.

        Raises:
          ValueError: If a number is out of range, or gamma above the largest step.
          TypeError: If one is not a number.

        Example:
          >>> rate = GdPl(smoothness=1.0, lam=0.5, mu=1.0)
          >>> rate.links_for(gap=1.0, target=1e-3, gamma=1.0)
          10
        """
        check_range(gap=gap, target=target)
        check_step(gamma, self.largest_step)
        if gap <= target:
            return 0
        factor = _contraction(gamma, self.mu, self.lam)
        return math.ceil(math.log(gap / target) / -math.log(factor)) if factor > 0 else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inexact(Gd):
    """What rates on estimates share: errors are projected too, by ``lam_max`` at most."""

    lam_max: float | None = None

    @property
    def _most(self) -> float:
        return self.lam if self.lam_max is None else self.lam_max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Inexact):
    """Stochastic gradient descent: the mean squared gradient over the links.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)
    + L gamma variance lam_max / lam`` for unbiased gradients. The second term is a floor
    that only a smaller step or a larger batch lowers. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default, as for a law that knows no direction.
        The library's own know none.
      variance: ``E |g - grad f|^2`` of the stochastic gradient g, of the whole matrix.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number.

    Example:
      >>> rate = Sgd(smoothness=4.0, lam=0.5, variance=0.5)
      >>> rate.bound(gap=1.0, gamma=rate.largest_step, links=16)
      1.5
    """

    variance: float

    @property
    def largest_step(self) -> float:
        """The largest gamma for which the bound holds, ``lam / (L lam_max)``."""
        return self.lam / (self.smoothness * self._most)

    def bound(self, *, gap: float, gamma: float, links: int) -> float:
        start = super().bound(gap=gap, gamma=gamma, links=links)
        return start + self.smoothness * gamma * self.variance * self._most / self.lam


@dataclasses.dataclass(frozen=True, kw_only=True)
class SgdPl(Sgd):
    """Stochastic gradient descent under the PL condition: the optimality gap.

    ``E f(W_T) - f* <= (1 - gamma mu lam)^links gap
    + L gamma variance lam_max / (2 mu lam)`` for unbiased gradients. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default.
      variance: ``E |g - grad f|^2`` of the stochastic gradient g, of the whole matrix.
      mu: Constant of the Polyak-Lojasiewicz condition, in the units of L; at most L.

    Raises:
      ValueError: If a number is out of range, or mu above L.
      TypeError: If one is not a number.

    Example:
      >>> rate = SgdPl(smoothness=2.0, lam=0.5, variance=0.2, mu=1.0)
      >>> round(rate.bound(gap=1.0, gamma=rate.largest_step, links=50), 3)
      0.1
    """

    mu: float

    def bound(self, *, gap: float, gamma: float, links: int) -> float:
        self._check_run(gap, gamma, links)
        spread = self.smoothness * gamma * self.variance * self._most
        floor = spread / (2 * self.mu * self.lam)
        return gap * _contraction(gamma, self.mu, self.lam) ** links + floor


def _contraction(gamma: float, mu: float, lam: float) -> float:
    # Below zero by rounding alone: gamma <= 1 / L, mu <= L and lam <= 1.
    return max(0.0, 1 - gamma * mu * lam)
