"""Rates of the chain on compressed gradients of several clients.

The bounds are made as in ``_variance_reduced``.
"""

from __future__ import annotations

import dataclasses
import math

from raclora_jax.theory._variance_reduced import Corrected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marina(Corrected):
    """MARINA: the mean squared gradient over the links, without a floor.

    ``mean_t E |grad f(W_t)|^2 <= 2 gap / (lam gamma links)``, with exact gradients at the
    start. Clients send compressed differences of gradients, and full ones with
    probability ``refresh``, all at once. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the mean gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default.
      sample_smoothness: Ls, root mean square of the clients' constants; at least L.
      refresh: Probability of full gradients from all, in (0, 1].
      compression: omega of the unbiased compressor, ``E |Q(x) - x|^2 <= omega |x|^2``;
        ``d / k - 1`` for k random ones of d numbers.
      clients: How many there are.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number, or ``clients`` not an int.

    Example:
      >>> rate = Marina(
      ...     smoothness=1.0, sample_smoothness=2.0, lam=0.25,
      ...     refresh=0.5, compression=9.0, clients=9,
      ... )
      >>> rate.largest_step, rate.bound(gap=1.0, gamma=0.5, links=160)
      (0.5, 0.1)

    References:
      Gorbunov et al., `MARINA <https://arxiv.org/abs/2102.07845>`_, 2021.
    """

    refresh: float
    compression: float
    clients: int

    @property
    def largest_step(self) -> float:
        """``1 / (L + Ls sqrt(lam_max spread))``, for gamma.

        With ``spread = (1 - refresh) compression / (refresh clients)``.
        """
        # Clients are compressed apart: their mean has 1 / clients of the variance.
        sent = (1 - self.refresh) * self.compression
        return self._step_for(sent / (self.refresh * self.clients))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ef21(Corrected):
    """EF21: the mean squared gradient over the links, without a floor.

    ``mean_t E |grad f(W_t)|^2 <= 2 phi / (lam gamma links)`` with
    ``phi = gap + gamma lam_max start_error / (2 theta)`` and
    ``theta = 1 - sqrt(1 - contraction)``. Each client sends its compressed correction,
    ``g_j+ = g_j + C(grad f_j(W+) - g_j)``. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the mean gradient, in ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default.
      sample_smoothness: Ls, root mean square of the clients' constants; at least L.
      contraction: a of the compressor, ``E |C(x) - x|^2 <= (1 - a) |x|^2``, in (0, 1];
        ``k / d`` for the k largest of d numbers.
      start_error: ``mean_j E |g_j - grad f_j(W_0)|^2`` of the first estimates.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number.

    Example:
      >>> rate = Ef21(smoothness=1.0, sample_smoothness=2.0, lam=0.25, contraction=0.75)
      >>> rate.largest_step, rate.bound(gap=1.0, gamma=0.5, links=160)
      (0.5, 0.1)

    References:
      Richtarik et al., `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021.
    """

    contraction: float
    start_error: float = 0.0

    @property
    def _theta(self) -> float:
        """Of ``v+ <= (1 - theta) v + beta |change|^2``, v the mean error of a client."""
        return 1 - math.sqrt(1 - self.contraction)

    @property
    def largest_step(self) -> float:
        """``1 / (L + Ls sqrt(lam_max beta / theta))``, for gamma.

        With ``beta = (1 - contraction) / theta``, ``theta = 1 - sqrt(1 - contraction)``.
        """
        # Young's inequality with s = 1 / sqrt(1 - a) - 1: theta is
        # 1 - (1 - a)(1 + s), and beta is (1 - a)(1 + 1 / s).
        beta = (1 - self.contraction) / self._theta
        return self._step_for(beta / self._theta)

    def bound(self, *, gap: float, gamma: float, links: int) -> float:
        self._check_run(gap, gamma, links)
        phi = gap + gamma * self._most * self.start_error / (2 * self._theta)
        return super().bound(gap=phi, gamma=gamma, links=links)
