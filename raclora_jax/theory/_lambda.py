"""lambda, the smallest eigenvalue of the mean projector: exact, mixed, or estimated."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.keys import key_data
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.theory._numbers import (
    check_count,
    check_fraction,
    check_lam,
    check_probability,
)

# Sketches turned into projectors at once.
_AT_ONCE = 64


def lambdas(params: PyTree, spec: Spec | int) -> dict[str, float]:
    """lambda of every adapted leaf, exact for the library's own laws.

    ``rank / dim`` with ``dim`` the size of the sketched side: a law that knows no
    direction spreads a trace of ``rank`` evenly. ``"block"`` has it for every single
    link; the links of a cycle know of each other, see ``BlockPl``.

    Args:
      params: The weights; shapes are enough.
      spec: A ``Spec`` or a rank.

    Returns:
      ``{path: lambda}``. The chain goes at the pace of the smallest.

    Raises:
      ValueError: If the spec does not fit, or a sketch is no projector.

    Example:
      >>> import jax.numpy as jnp
      >>> lambdas({"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}, 2)
      {'kernel': 0.5}

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Assumption 5.1.
    """
    return {path: plan.lam for path, plan in projector_plans(params, spec).items()}


def projector_plans(params: PyTree, spec: Spec | int) -> dict[str, LeafPlan]:
    """Plans of the adapted leaves, none of which may have a raw sketch."""
    plans = plan_tree(as_spec(spec), params)
    for path, plan in plans.items():
        if plan.law == "gaussian_raw":
            raise ValueError(
                f"leaf {paths.show(path)}: sketch='gaussian_raw' is no projector, and "
                "the theory says nothing of it; take sketch='orthonormal', the same "
                "Gaussian whitened"
            )
    return {path: plan for path, plan in plans.items() if plan.adapted}


def bernoulli_lambda(*, rows: int, cols: int, rank: int, p: float) -> float:
    """lambda of a chain that draws the side of its sketch in every link.

    ``p rank / rows + (1 - p) rank / cols``: on the matrix as one long vector the mean
    projector is a multiple of the identity for either side, and so for the mixture.

    Args:
      rows: Rows of the leaf.
      cols: Its columns.
      rank: Rank of either sketch.
      p: Probability of a left sketch, one of the rows, in [0, 1].

    Returns:
      lambda, in (0, 1].

    Raises:
      ValueError: If p is outside [0, 1] or the rank above a side.

    Example:
      >>> bernoulli_lambda(rows=8, cols=4, rank=2, p=0.5)
      0.375

    References:
      Sokolov et al., `Bernoulli-LoRA <https://arxiv.org/abs/2508.03820>`_, 2025.
    """
    check_count(rows=rows, cols=cols, rank=rank)
    check_probability(p=p)
    if rank > min(rows, cols):
        raise ValueError(f"rank = {rank} is above a side of the matrix, {rows} x {cols}")
    return p * rank / rows + (1 - p) * rank / cols


def draws_for(*, dim: int, lam: float, error: float = 0.5, failure: float = 0.01) -> int:
    """Draws after which the mean projector tells lambda of a law.

    ``2 log(dim / failure) / (error^2 lam)``, rounded up. By the matrix Chernoff bound the
    smallest eigenvalue of their mean is then above ``(1 - error) lam``, but for a
    probability of ``failure``. (It is biased downwards, whatever the count.)

    Args:
      dim: Size of the sketched side.
      lam: lambda that the law is thought to have.
      error: Relative error, in (0, 1].
      failure: Probability that it is larger.

    Returns:
      The number of draws.

    Raises:
      ValueError: If a number is out of range.

    Example:
      >>> draws_for(dim=16, lam=0.25)
      237

    References:
      Tropp, `User-friendly tail bounds for sums of random matrices
      <https://arxiv.org/abs/1004.4389>`_, 2012, Corollary 5.2.
    """
    check_count(dim=dim)
    check_lam(lam)
    check_fraction(error=error, failure=failure)
    return math.ceil(2 * math.log(dim / failure) / (error**2 * lam))


def estimate_lambda(
    draw: Callable[[Array], Array],
    *,
    lam: float,
    error: float = 0.5,
    failure: float = 0.01,
    key: KeyLike,
) -> float:
    """lambda of a law of one's own, from enough draws, and a check of what it claims.

    The smallest eigenvalue of the mean of ``draws_for(...)`` projectors on the rows of
    ``draw(key)``. A law whose lambda is ``lam`` or more is refused with a probability of
    ``failure`` at most.

    Args:
      draw: ``draw(key)`` gives a sketch ``(rank, dim)``; its rows need not be
        orthonormal, nor independent.
      lam: lambda that the law is thought to have, such as ``rank / dim``.
      error: Relative error of the estimate, in (0, 1).
      failure: Probability that it is larger.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      The estimate, more often too small than too large.

    Raises:
      ValueError: If the law leaves a direction out (lambda = 0), or its lambda is below
        ``(1 - error) lam``.

    Example:
      >>> import jax
      >>> def draw(key):
      ...     return jax.random.normal(key, (2, 8))
      >>> 0.15 < estimate_lambda(draw, lam=0.25, key=0) <= 0.3
      True

    References:
      Tropp, `User-friendly tail bounds for sums of random matrices
      <https://arxiv.org/abs/1004.4389>`_, 2012, Corollary 5.2.
    """
    start = jax.random.wrap_key_data(key_data(key))
    shape = jax.eval_shape(draw, start).shape
    if len(shape) != 2:
        raise ValueError(f"draw(key) must give a sketch (rank, dim), got shape {shape}")
    draws = draws_for(dim=shape[1], lam=lam, error=error, failure=failure)
    keys = jax.random.split(start, draws)
    projectors = jax.jit(
        lambda keys: jax.lax.map(
            lambda key: _projector(draw(key)), keys, batch_size=_AT_ONCE
        ).mean(axis=0)
    )
    smallest = float(jnp.linalg.eigvalsh(projectors(keys))[0])
    if smallest < (1 - error) * lam:
        raise ValueError(
            f"this law has not lambda = {lam:g}: the mean of {draws} projectors has "
            f"{max(smallest, 0):.2g} as its smallest eigenvalue; some direction is "
            "drawn too rarely or never, and the chain would not train it"
        )
    return smallest


def _projector(sketch: Array) -> Array:
    """The orthogonal projector on the rows, (dim, dim)."""
    exact = jax.lax.Precision.HIGHEST
    # A law of one's own may draw dependent rows, whose Gram matrix has no inverse.
    inverse = jnp.linalg.pinv(
        jnp.matmul(sketch, sketch.T, precision=exact), hermitian=True
    )
    return jnp.matmul(
        sketch.T, jnp.matmul(inverse, sketch, precision=exact), precision=exact
    )
