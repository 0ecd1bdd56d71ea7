"""Rates of the chain on variance-reduced gradient estimators.

The bounds add ``c |g - grad f|^2`` to the inequality of ``_descent``, use the recursion
of each estimator for it, and choose gamma so that the ``|H g|^2`` terms cancel. What is
left is the bound of exact gradients with a smaller step. The derivations are ours; the
estimators are those of the papers named.
"""

from __future__ import annotations

import dataclasses
import math

from raclora_jax.theory._descent import Inexact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrected(Inexact):
    """What the rates on estimates that are corrected from link to link share."""

    sample_smoothness: float

    def _step_for(self, spread: float) -> float:
        """A gamma with ``A gamma^2 + L gamma <= 1`` for ``A = Ls^2 lam_max spread``."""
        # Simpler than the root, and at least half of it.
        root = math.sqrt(self._most * spread)
        return 1 / (self.smoothness + self.sample_smoothness * root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page(Corrected):
    """PAGE: the mean squared gradient over the links, without a noise floor.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)``, with an exact gradient at
    the start. PAGE takes a full gradient with probability ``refresh`` and otherwise adds
    the difference of two minibatch gradients on the same samples. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the full gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default.
      sample_smoothness: Ls, root mean square of the samples' constants; at least L.
      refresh: Probability of a full gradient, in (0, 1].
      batch: Samples of a difference otherwise.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number, or ``batch`` not an int.

    Example:
      >>> rate = Page(
      ...     smoothness=1.0, sample_smoothness=2.0, lam=0.25, refresh=0.5, batch=1
      ... )
      >>> rate.largest_step, rate.bound(gap=1.0, gamma=0.5, links=160)
      (0.5, 0.1)

    References:
      Li et al., `PAGE <https://arxiv.org/abs/2008.10898>`_, 2021.
    """

    refresh: float
    batch: int

    @property
    def largest_step(self) -> float:
        """``1 / (L + Ls sqrt(lam_max (1 - refresh) / (refresh batch)))``, for gamma."""
        return self._step_for((1 - self.refresh) / (self.refresh * self.batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mvr(Corrected):
    """Momentum variance reduction: the mean squared gradient over the links.

    ``mean_t E |grad f(W_t)|^2 <= 2 phi / (lam gamma links)
    + 2 weight variance lam_max / lam`` with
    ``phi = gap + gamma lam_max start_error / (2 weight)``. MVR (STORM) is
    ``g+ = g_new(W+) + (1 - weight) (g - g_new(W))`` on one minibatch. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the full gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default.
      sample_smoothness: Ls, root mean square of the samples' constants; at least L.
      weight: Weight of the new gradient in the estimate, in (0, 1].
      variance: ``E |g_new - grad f|^2`` of one minibatch gradient.
      start_error: ``E |g_0 - grad f(W_0)|^2`` of the first estimate.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number.

    Example:
      >>> rate = Mvr(
      ...     smoothness=1.0, sample_smoothness=2.0, lam=0.25, weight=0.5, variance=0.2
      ... )
      >>> rate.largest_step, round(rate.bound(gap=1.0, gamma=0.5, links=160), 6)
      (0.5, 0.3)

    References:
      Cutkosky and Orabona, `STORM <https://arxiv.org/abs/1905.10018>`_, 2019.
    """

    weight: float
    variance: float
    start_error: float = 0.0

    @property
    def largest_step(self) -> float:
        """``1 / (L + Ls (1 - weight) sqrt(2 lam_max / weight))``, for gamma."""
        return self._step_for(2 * (1 - self.weight) ** 2 / self.weight)

    def bound(self, *, gap: float, gamma: float, links: int) -> float:
        self._check_run(gap, gamma, links)
        phi = gap + gamma * self._most * self.start_error / (2 * self.weight)
        floor = 2 * self.weight * self.variance * self._most / self.lam
        return super().bound(gap=phi, gamma=gamma, links=links) + floor
