"""The rate of Fed-RAC-LoRA: local steps of several clients on one shared sketch."""

from __future__ import annotations

import dataclasses
import math

from raclora_jax.theory._descent import Rate
from raclora_jax.theory._numbers import check_range, check_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class FedRacLora(Rate):
    """Fed-RAC-LoRA: the change of the loss over a link, and the mean squared gradient.

    Every client takes E exact gradient steps on the factor of one shared sketch, and the
    factors are averaged. With ``gamma = eta E`` and
    ``c = ((e - 1) L eta (E - 1) / 2)^2``, a link does

      ``f(W+) - f(W) <= -gamma/2 (1 - c) captured + gamma/2 c dissimilarity``

    and all of them ``mean_t E |grad f(W_t)|^2 <= (2 gap / (lam gamma links)
    + c (lam_max / lam) dissimilarity) / (1 - c)``. With one step there is no drift. Our
    derivation, without the noise of minibatches.

    Args:
      smoothness: L, the largest Lipschitz constant of a client's gradient, in
        ``f / |W|^2``.
      local_steps: E, steps of every client in a link.
      lam: Smallest eigenvalue of the mean projector.
      lam_max: Its largest one; ``lam`` by default.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number, or ``local_steps`` not an int.

    Example:
      >>> rate = FedRacLora(smoothness=4.0, local_steps=1, lam=0.5)
      >>> rate.link_bound(captured=2.0, dissimilarity=1.0, eta=rate.largest_step)
      -0.25
      >>> rate.bound(gap=1.0, eta=0.25, links=160, dissimilarity=1.0)
      0.1
    """

    local_steps: int
    lam: float
    lam_max: float | None = None

    @property
    def largest_step(self) -> float:
        """The largest eta for which the bounds hold, ``1 / (L E)``."""
        return 1 / (self.smoothness * self.local_steps)

    def link_bound(self, *, captured: float, dissimilarity: float, eta: float) -> float:
        """The bound on the change of the loss over one link.

        Args:
          captured: ``|H grad f(W)|^2``, what the sketch holds of the mean gradient.
          dissimilarity: ``mean_j |H (grad f_j(W) - grad f(W))|^2`` over the clients.
          eta: Local step, at most ``largest_step``; in units of ``|W|^2 / f``.

        Returns:
          The bound, in units of f; negative where descent is guaranteed.

        Raises:
          ValueError: If a number is out of range, or eta above the largest step.
          TypeError: If one is not a number.
        """
        check_range(captured=captured, dissimilarity=dissimilarity)
        drift = self._drift(eta)
        gamma = eta * self.local_steps
        return gamma / 2 * (drift * dissimilarity - (1 - drift) * captured)

    def bound(self, *, gap: float, eta: float, links: int, dissimilarity: float) -> float:
        """The bound on the mean squared gradient over the links.

        Args:
          gap: ``f(W_0) - f*``.
          eta: Local step, at most ``largest_step``; in units of ``|W|^2 / f``.
          links: Links, each with one sketch shared by all.
          dissimilarity: Upper bound on ``mean_j |grad f_j - grad f|^2`` along the run.

        Returns:
          The bound, in units of ``|grad f|^2``.

        Raises:
          ValueError: If a number is out of range, or eta above the largest step.
          TypeError: If one is not a number, or ``links`` not an int.
        """
        check_range(gap=gap, links=links, dissimilarity=dissimilarity)
        drift = self._drift(eta)
        most = self.lam if self.lam_max is None else self.lam_max
        start = 2 * gap / (self.lam * eta * self.local_steps * links)
        return (start + drift * most / self.lam * dissimilarity) / (1 - drift)

    def _drift(self, eta: float) -> float:
        """c, below 0.74 for every step that is allowed."""
        check_step(eta, self.largest_step, "eta")
        # After k steps a client has drifted by (1 + L eta)^k - 1 at most, which is below
        # (e - 1) L eta k for L eta E <= 1; k is (E - 1) / 2 in the mean.
        return ((math.e - 1) / 2 * self.smoothness * eta * (self.local_steps - 1)) ** 2
