"""Rates of the library's own steps: orthogonalised ones, and cycles of blocks."""

from __future__ import annotations

import dataclasses
import math

from raclora_jax.theory._descent import Rate
from raclora_jax.theory._numbers import check_range, check_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(Rate):
    """Orthogonalised steps: the smallest nuclear norm of the gradient.

    ``min_t E |grad f(W_t)|_* <= gap / (lam eta links) + eta L rank / (2 lam)`` for
    ``W+ = W - eta S^T polar(S grad f)``: by convexity of the nuclear norm
    ``E |S G|_* >= lam |G|_*``. At ``eta = best_step(...)`` it is
    ``sqrt(2 L rank gap / links) / lam``. Our derivation, for exact gradients and an exact
    polar factor; the one of ``orthogonal()`` is within 0.7 % for singular values of at
    least 0.05 of their 8-norm.

    Args:
      smoothness: L, the Lipschitz constant of the gradient in the Frobenius norm, in
        ``f / |W|^2``.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.
      rank: Rank of the sketch; summed over the leaves, if there are several.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If one is not a number, or ``rank`` not an int.

    Example:
      >>> rate = Orthogonal(smoothness=2.0, lam=0.5, rank=4)
      >>> eta = rate.best_step(gap=1.0, links=25)
      >>> eta, rate.bound(gap=1.0, eta=eta, links=25)
      (0.1, 1.6)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """

    lam: float
    rank: int

    def best_step(self, *, gap: float, links: int) -> float:
        """The step that makes the bound smallest, ``sqrt(2 gap / (L rank links))``.

        Args:
          gap: ``f(W_0) - f*``.
          links: Links of the run.

        Returns:
          eta, the length of every singular value of a step.

        Raises:
          ValueError: If a number is out of range.
          TypeError: If one is not a number, or ``links`` not an int.
        """
        check_range(gap=gap, links=links)
        return math.sqrt(2 * gap / (self.smoothness * self.rank * links))

    def bound(self, *, gap: float, eta: float, links: int) -> float:
        """The bound on the smallest nuclear norm.

        Args:
          gap: ``f(W_0) - f*``.
          eta: Length of every singular value of a step: under ``orthogonal()``
            ``learning_rate * scaling * sqrt(max(rank, n))`` for a factor of
            ``(rank, n)``.
          links: Links, each with a sketch of its own and one step.

        Returns:
          The bound, in units of ``|grad f|_*``.

        Raises:
          ValueError: If a number is out of range.
          TypeError: If one is not a number, or ``links`` not an int.
        """
        check_range(gap=gap, eta=eta, links=links)
        curved = eta * self.smoothness * self.rank / (2 * self.lam)
        return gap / (self.lam * eta * links) + curved


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPl(Rate):
    """Whole cycles of ``sketch="block"`` under the PL condition: the optimality gap.

    A cycle of ``C = dim / rank`` links covers every row once, so its links know of each
    other and ``GdPl`` does not speak of them. Under the Polyak-Lojasiewicz condition

      ``f(W) - f* <= (1 - gamma mu / (2 (1 + gamma^2 L^2 h)))^cycles gap``

    in the mean, with ``h = 1 + 1/2 + ... + 1/(C - 1)``; for every order of the blocks,
    without a mean, it holds with C in the place of h. Our derivation.

    Args:
      smoothness: L, the Lipschitz constant of the gradient, in ``f / |W|^2``.
      mu: Constant of the condition, in the units of L; at most L.
      dim: Size of the sketched side.
      rank: Rank of the sketch; it must divide ``dim``.

    Raises:
      ValueError: If a number is out of range, or ``rank`` does not divide ``dim``.
      TypeError: If one is not a number, or ``dim`` or ``rank`` not an int.

    Example:
      >>> rate = BlockPl(smoothness=1.0, mu=1.0, dim=4, rank=2)
      >>> rate.bound(gap=1.0, gamma=rate.largest_step, cycles=1)
      0.75
    """

    mu: float
    dim: int
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.rank:
            raise ValueError(
                f"rank = {self.rank} does not divide dim = {self.dim}: then some rows "
                "wait for the next cycle, and this bound does not hold; take a rank that "
                "divides it"
            )

    @property
    def largest_step(self) -> float:
        """The largest gamma for which the bound holds, ``1 / L``."""
        return 1 / self.smoothness

    def bound(
        self, *, gap: float, gamma: float, cycles: int, sure: bool = False
    ) -> float:
        """The bound on the optimality gap after whole cycles.

        Args:
          gap: ``f(W_0) - f*``.
          gamma: Step on the projected gradient, at most ``largest_step``.
          cycles: Cycles of ``dim / rank`` links, one step each.
          sure: Whether to bound the worst order of the blocks instead of the mean.

        Returns:
          The bound, in units of f.

        Raises:
          ValueError: If a number is out of range, or gamma above the largest step.
          TypeError: If one is not a number, or ``cycles`` not an int.
        """
        check_range(gap=gap, cycles=cycles)
        check_step(gamma, self.largest_step)
        turns = self.dim // self.rank
        growth = turns if sure else sum(1 / turn for turn in range(1, turns))
        rate = gamma * self.mu / (2 * (1 + (gamma * self.smoothness) ** 2 * growth))
        return gap * (1 - rate) ** cycles
