"""The lazy (NTK) regime: ranks that suffice there, and how far a run is from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core.types import PyTree
from raclora_jax.theory._numbers import check_count, check_positive


def ntk_rank(outputs: int) -> int:
    """Smallest rank at which two-factor LoRA has no spurious minima in the lazy regime.

    The smallest r with ``r (r + 1) / 2 > outputs``. It concerns joint training of both
    factors. With one factor frozen the lazy problem is convex at every rank, and the
    rank only sets the pace, by lambda.

    Args:
      outputs: K N, numbers per example times examples.

    Returns:
      The rank.

    Raises:
      ValueError: If ``outputs`` is below 1.

    Example:
      >>> ntk_rank(1000)
      45

    References:
      Jang, Lee and Ryu, `LoRA Training in the NTK Regime has No Spurious Local Minima
      <https://arxiv.org/abs/2402.11867>`_, 2024; the condition as its summary states it.
    """
    check_count(outputs=outputs)
    # r of r (r + 1) / 2 = outputs, rounded down, and one more. In integers, since a
    # float's root is off for large counts.
    return (math.isqrt(8 * outputs + 1) - 1) // 2 + 1


def capacity_rank(outputs: int, *, rows: int, cols: int, constant: float = 1.35) -> int:
    """Smallest rank whose matrices have more freedom than there are outputs to fit.

    The smallest r with ``r (rows + cols) - r^2 > constant * outputs``, the dimension of
    the matrices of rank r on the left. Lazy regime, squared loss, both factors trained.

    Args:
      outputs: K N, numbers per example times examples.
      rows: Rows of the leaf.
      cols: Its columns.
      constant: 1.35 for Gaussian features.

    Returns:
      The rank.

    Raises:
      ValueError: If not even the full rank suffices.

    Example:
      >>> capacity_rank(1000, rows=64, cols=64)
      12

    References:
      `Rethinking the Rank Threshold for LoRA Fine-Tuning
      <https://arxiv.org/abs/2605.03724>`_, 2026; the condition as its abstract states it.
    """
    check_count(outputs=outputs, rows=rows, cols=cols)
    check_positive(constant=constant)
    for rank in range(1, min(rows, cols) + 1):
        if rank * (rows + cols) - rank**2 > constant * outputs:
            return rank
    raise ValueError(
        f"no rank of a {rows} x {cols} matrix has more freedom than {constant:g} * "
        f"{outputs} outputs"
    )


def lazy_check(
    fn: Callable[..., Any], params: PyTree, delta: PyTree, *args: Any
) -> Array:
    """How far a change of the weights leaves the lazy regime.

    ``|f(W + D) - f(W) - J D| / |J D|`` with J the Jacobian of the outputs at W: well
    below 1 where the network acts as its linearisation, on which ``ntk_rank`` and
    ``capacity_rank`` rest.

    Args:
      fn: ``fn(params, *args)``, the outputs of the model: an array or a tree of them.
      params: W, the weights to linearise at.
      delta: D, the change of the weights, in the tree of ``params``; its dtypes are
        cast to theirs.
      *args: The other arguments of ``fn``.

    Returns:
      Scalar array.

    Raises:
      ValueError: If ``delta`` does not have the tree of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> W, D = jnp.ones((3, 2)), jnp.full((3, 2), 0.1)
      >>> float(lazy_check(lambda W, x: x @ W, W, D, jnp.ones((4, 3)))) < 1e-5
      True

    References:
      Jang, Lee and Ryu, `LoRA Training in the NTK Regime has No Spurious Local Minima
      <https://arxiv.org/abs/2402.11867>`_, 2024.
    """

    def outputs(params: PyTree) -> PyTree:
        return fn(params, *args)

    # jax.jvp takes no tangent of another dtype than its primal's.
    tangent = jax.tree.map(lambda W, D: jnp.asarray(D, jnp.result_type(W)), params, delta)
    before, linear = jax.jvp(outputs, (params,), (tangent,))
    after = outputs(jax.tree.map(jnp.add, params, tangent))
    rest = jax.tree.map(lambda a, b, c: a - b - c, after, before, linear)
    return _norm(rest) / _norm(linear)


def _norm(tree: PyTree) -> Array:
    squares = [jnp.vdot(leaf, leaf).real for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))
