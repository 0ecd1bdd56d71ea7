"""Rows made orthonormal: what the laws of sketches that are arrays have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._core.cholesky import inverse_cholesky
from raclora_jax._core.polar import NEWTON_SCHULZ, POLYNOMIALS, matmul, polynomial

_Steps = tuple[tuple[float, float, float], ...]


def orthonormal(draws: Sequence[Array]) -> list[Array]:
    """Orthonormal rows: the polar factors of draws of normal numbers, or of signs.

    That of a Gaussian matrix turns with it, so it is Haar.

    Args:
      draws: Stacks ``(n, rank, dim)``.

    Returns:
      Stacks of the same shapes.
    """
    together: dict[_Steps, list[int]] = {}
    for place, draw in enumerate(draws):
        together.setdefault(_steps(*draw.shape[1:]), []).append(place)

    def turn(stacks: list[Array], coefficients: Array) -> tuple[list[Array], None]:
        def one(rows: Array) -> Array:
            own = coefficients.astype(rows.dtype)
            return matmul(polynomial(own, _gram(rows)), rows)

        return [one(rows) for rows in stacks], None

    made: dict[int, Array] = {}
    for steps, places in together.items():
        start = [draws[place] / _largest(*draws[place].shape[1:]) for place in places]
        # A loop, so that a step is compiled once.
        done, _ = lax.scan(turn, start, jnp.asarray(steps, jnp.result_type(*start)))
        made |= dict(zip(places, done, strict=True))
    return [made[place] for place in range(len(draws))]


def signs(numbers: Array) -> Array:
    """Signs of normal numbers, and the numbers themselves where those are singular.

    Both laws, and being singular, are blind to permutations and signs of the axes, so the
    mean projector stays (rank / dim) I.

    Args:
      numbers: Stack ``(n, rank, dim)``.

    Returns:
      Stack of the same shape.
    """
    of_one = jnp.where(numbers < 0, -1, 1).astype(numbers.dtype)
    inverse = inverse_cholesky(_gram(of_one) / numbers.shape[-1])
    # A diagonal of L above 1e-2; NaN compares false.
    diagonal = jnp.diagonal(inverse, axis1=1, axis2=2)
    regular = jnp.all(diagonal < 1e2, axis=1)[:, None, None]
    return jnp.where(regular, of_one, numbers)


def _steps(rank: int, dim: int) -> _Steps:
    """The polynomials that make a draw of this size orthonormal."""
    steps = [*POLYNOMIALS]
    if not _well_conditioned(rank, dim):
        # What was below a hundredth has grown by 150 each time, and what was near one is
        # above it by 1.3 %.
        (a, b, c), *others = POLYNOMIALS
        again = (a / 1.02, b / 1.02**3, c / 1.02**5)
        steps += [again, *others] * 3
    return (*steps, *[NEWTON_SCHULZ] * 4)


def _largest(rank: int, dim: int) -> float:
    """What the largest singular value exceeds in fewer than e^-72 of all draws."""
    return math.sqrt(dim) + math.sqrt(rank) + 12


def _well_conditioned(rank: int, dim: int) -> bool:
    """Whether the least singular value of a draw is above a hundredth of ``_largest``.

    Of all Gaussian draws but one in 10^9, by Theorem 4.5 of Chen and Dongarra, `Condition
    numbers of Gaussian random matrices <https://arxiv.org/abs/0810.0800>`_, 2005.
    """
    allowed = 100 * (math.sqrt(dim) + math.sqrt(rank)) / _largest(rank, dim)
    free = dim - rank + 1
    return (6.414 * dim / (free * allowed)) ** free < 1e-9


def _gram(sketches: Array) -> Array:
    """S S^T of each sketch, (n, rank, rank)."""
    return jnp.einsum("nri,nsi->nrs", sketches, sketches, precision=lax.Precision.HIGHEST)
