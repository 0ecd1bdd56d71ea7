"""Rates of the library's own steps: orthogonalised ones, and cycles of blocks."""

from __future__ import annotations

import math

from raclora_jax.theory._numbers import (
    check_count,
    check_lam,
    check_not_negative,
    check_pl,
    check_positive,
)


def orthogonal_step(*, gap: float, smoothness: float, rank: int, links: int) -> float:
    """The step that makes ``orthogonal_nonconvex`` smallest.

    ``sqrt(2 gap / (L rank links))``.

    Args:
      gap: ``f(W_0) - f*``.
      smoothness: L, the Lipschitz constant of the gradient in the Frobenius norm.
      rank: Rank of the sketch; summed over the leaves, if there are several.
      links: Links of the run.

    Returns:
      eta, the length of every singular value of a step.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> orthogonal_step(gap=1.0, smoothness=2.0, rank=4, links=25)
      0.1
    """
    check_not_negative(gap=gap)
    check_positive(smoothness=smoothness)
    check_count(rank=rank, links=links)
    return math.sqrt(2 * gap / (smoothness * rank * links))


def orthogonal_nonconvex(
    *, gap: float, lam: float, eta: float, links: int, smoothness: float, rank: int
) -> float:
    """Bound on the smallest nuclear norm of the gradient under orthogonalised steps.

    ``min_t E |grad f(W_t)|_* <= gap / (lam eta links) + eta L rank / (2 lam)`` for
    ``W+ = W - eta S^T polar(S grad f)``: by convexity of the nuclear norm
    ``E |S G|_* >= lam |G|_*``. At ``eta = orthogonal_step(...)`` it is
    ``sqrt(2 L rank gap / links) / lam``. Our derivation, for exact gradients and an exact
    polar factor; the one of ``orthogonal()`` is within 1.3 % for
    singular values of at least 0.01 of the norm.

    Args:
      gap: ``f(W_0) - f*``.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``.
      eta: Length of every singular value of a step: under ``orthogonal()``
        ``learning_rate * scaling * sqrt(max(rank, n))`` for a factor of ``(rank, n)``.
      links: Links, each with a sketch of its own and one step.
      smoothness: L, the Lipschitz constant of the gradient in the Frobenius norm.
      rank: Rank of the sketch; summed over the leaves, if there are several.

    Returns:
      The bound, in units of ``|grad f|_*``.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> orthogonal_nonconvex(
      ...     gap=1.0, lam=0.5, eta=0.1, links=25, smoothness=2.0, rank=4
      ... )
      1.6

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    check_not_negative(gap=gap)
    check_lam(lam)
    check_positive(eta=eta, smoothness=smoothness)
    check_count(links=links, rank=rank)
    return gap / (lam * eta * links) + eta * smoothness * rank / (2 * lam)


def block_pl(
    *,
    gap: float,
    gamma: float,
    mu: float,
    smoothness: float,
    dim: int,
    rank: int,
    cycles: int,
    sure: bool = False,
) -> float:
    """Bound on the optimality gap after whole cycles of ``sketch="block"``.

    A cycle of ``C = dim / rank`` links covers every row once, so its links know of each
    other and ``gd_pl`` does not speak of them. Under the Polyak-Lojasiewicz condition

      ``f(W) - f* <= (1 - gamma mu / (2 (1 + gamma^2 L^2 h)))^cycles gap``

    in the mean, with ``h = 1 + 1/2 + ... + 1/(C - 1)``; for every order of the blocks,
    without a mean, it holds with C in the place of h. Our derivation.

    Args:
      gap: ``f(W_0) - f*``.
      gamma: Step on the projected gradient, at most ``1 / L``.
      mu: Constant of the condition; at most L.
      smoothness: L, the Lipschitz constant of the gradient.
      dim: Size of the sketched side.
      rank: Rank of the sketch; it must divide ``dim``.
      cycles: Cycles of ``dim / rank`` links, one step each.
      sure: Whether to bound the worst order of the blocks instead of the mean.

    Returns:
      The bound, in units of f.

    Raises:
      ValueError: If a number is out of range, or ``rank`` does not divide ``dim``.

    Example:
      >>> block_pl(
      ...     gap=1.0, gamma=1.0, mu=1.0, smoothness=1.0, dim=4, rank=2, cycles=1
      ... )
      0.75
    """
    check_not_negative(gap=gap)
    check_count(dim=dim, rank=rank, cycles=cycles)
    check_pl(gamma, mu, smoothness)
    if dim % rank:
        raise ValueError(
            f"rank = {rank} does not divide dim = {dim}: then some rows wait for the "
            "next cycle, and this bound does not hold; take a rank that divides it"
        )
    turns = dim // rank
    growth = turns if sure else sum(1 / turn for turn in range(1, turns))
    rate = gamma * mu / (2 * (1 + (gamma * smoothness) ** 2 * growth))
    return gap * (1 - rate) ** cycles
