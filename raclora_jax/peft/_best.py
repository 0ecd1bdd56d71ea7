"""The best adapter of low rank for a change of full rank, and what it loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._core import checks, paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.peft._pairs import Adapter, Pair

_OVERSAMPLED = 8  # columns a random range has beyond the rank
_PASSES = 3  # of the matrix over that range


class Kept(NamedTuple):
    """How much of a leaf's change its pair of low rank keeps.

    Attributes:
      rank: The rank.
      energy: Share of the squared change that is kept, between 0 and 1.
      error: Norm of what is lost over the norm of the change.
    """

    rank: int
    energy: float
    error: float


def best(
    base_params: PyTree,
    params: PyTree,
    spec: Spec | int,
    *,
    rank: int | None = None,
    energy: float | None = None,
    key: KeyLike,
    report: Callable[[str], None] = print,
) -> tuple[Adapter, dict[str, Kept]]:
    """The best adapter of a rank, or of a share of energy, for what training did.

    The leading singular triplets of ``params - base_params``, leaf by leaf, by subspace
    iteration from a random range: a chain moves its weights in full rank, so something
    is lost, and how much is said.

    Args:
      base_params: The weights before.
      params: The weights after.
      spec: Says the views of the leaves, and which are changed in low rank.
      rank: Of every leaf; a leaf with a smaller side has that.
      energy: In place of a rank: the smallest that keeps this share of a leaf's squared
        change, found by doubling.
      key: Of the random range.
      report: Called with one line a leaf; ``print`` unless told.

    Returns:
      ``(adapter, {path: Kept})``.

    Raises:
      ValueError: If not exactly one of rank and energy is given, or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> before, after = {"kernel": jnp.ones((6, 4))}, {"kernel": jnp.zeros((6, 4))}
      >>> adapter, kept = best(before, after, 2, rank=1, key=0)
      kernel: rank 1 keeps 100.00 % of the change, error 0.0000
      >>> round(kept["kernel"].energy, 3)
      1.0

    References:
      Halko, Martinsson and Tropp, `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithm 4.4.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give rank or energy, got rank={rank} and energy={energy}")
    if rank is not None:
        checks.count("rank", rank)
    if energy is not None:
        checks.number("energy", energy, checks.SHARE)
    plans = plan_tree(spec, base_params)
    before, _ = paths.flatten(base_params)
    after, _ = paths.flatten(params)
    pairs, dense, kept = {}, {}, {}
    for path, plan in plans.items():
        if plan.mode == "frozen":
            continue
        change = jnp.asarray(after[path], plan.wide_dtype) - before[path]
        if not plan.adapted:
            dense[path] = change
            continue
        pairs[path], kept[path] = _best_pair(
            change, plan, rank, energy, leaf_key(key_data(key), "best", path)
        )
        found = kept[path]
        report(
            f"{path}: rank {found.rank} keeps {100 * found.energy:.2f} % of the change, "
            f"error {found.error:.4f}"
        )
    return Adapter(pairs, dense), kept


def _best_pair(
    change: Array, plan: LeafPlan, rank: int | None, energy: float | None, key: Array
) -> tuple[Pair, Kept]:
    order = (*plan.batch, *plan.rows, *plan.cols)
    sides = plan.size_of(plan.rows), plan.size_of(plan.cols)
    # matrices (batch..., in, out); left (batch..., in, size), values (batch..., size),
    # right (batch..., size, out). One rank for the whole stack, as its pair is one array.
    matrices = jnp.transpose(change, order).reshape(*plan.batch_shape, *sides)
    most, tried = min(sides), rank or 1
    total = float(jnp.sum(matrices**2))
    while True:
        size = min(tried, most)
        left, values, right = _leading(matrices, size, key)
        held = np.cumsum(
            np.asarray(jnp.sum(values**2, axis=tuple(range(values.ndim - 1))))
        )
        share = held / total if total else np.ones_like(held)
        if energy is None or share[-1] >= energy or size == most:
            break
        # Doubled: all tries together cost about twice the last one.
        tried *= 2
    if energy is not None:
        size = min(int(np.searchsorted(share, energy)) + 1, size)
    down = (left[..., :size] * values[..., None, :size]).mT
    up = right[..., :size, :]
    batch, shape = plan.batch_shape, plan.shape
    pair = Pair(
        down.reshape(*batch, size, *(shape[axis] for axis in plan.rows)),
        up.reshape(*batch, size, *(shape[axis] for axis in plan.cols)),
        len(batch),
    )
    # Measured on the pair itself: values from a random range are below the true ones.
    lost = float(jnp.sum((matrices - jnp.matmul(down.mT, up)) ** 2))
    lost = lost / total if total else 0.0
    return pair, Kept(size, 1 - lost, math.sqrt(lost))


def _leading(matrices: Array, rank: int, key: Array) -> tuple[Array, Array, Array]:
    """``(U, s, V^T)`` of the leading triplets."""
    width = min(rank + _OVERSAMPLED, *matrices.shape[-2:])
    start = jax.random.normal(key, (matrices.shape[-1], width), matrices.dtype)
    precise = jax.lax.Precision.HIGHEST
    basis = jnp.linalg.qr(jnp.matmul(matrices, start, precision=precise))[0]
    for _ in range(_PASSES):
        other = jnp.linalg.qr(jnp.matmul(matrices.mT, basis, precision=precise))[0]
        basis = jnp.linalg.qr(jnp.matmul(matrices, other, precision=precise))[0]
    small = jnp.matmul(basis.mT, matrices, precision=precise)
    left, values, right = jnp.linalg.svd(small, full_matrices=False)
    whole = jnp.matmul(basis, left, precision=precise)
    return whole[..., :rank], values[..., :rank], right[..., :rank, :]
