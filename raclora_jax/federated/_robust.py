"""Means that a few forged clients cannot take: trimmed, median, and bounded by a norm."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core import checks
from raclora_jax.federated._messages import Trained
from raclora_jax.federated._strategies import Strategy, mean_rule

Name = Literal["trimmed_mean", "median", "bounded_mean"]


@dataclasses.dataclass(frozen=True)
class Robust:
    """A mean of the clients. Made by ``trimmed_mean``, ``median`` and ``bounded_mean``.

    All clients that take part weigh the same, however many examples they claim. Frozen
    and hashable: a static argument of ``jax.jit``.

    Args:
      name: ``"trimmed_mean"``, ``"median"`` or ``"bounded_mean"``.
      limit: How many clients are trimmed at each end, or the largest norm.
    """

    name: Name
    limit: float = 0

    def check(self, strategy: Strategy) -> None:
        """Refuses a strategy whose clients have no basis in common."""
        plain = strategy.combine is mean_rule
        if plain and (self.name == "bounded_mean" or not strategy.pair):
            return
        why = (
            "whose clients train both factors: the pairs (1, 1) and (-1, -1) are one "
            "product, and the medians with a third client can be another"
            if plain
            else "which sends down more than a mean of factors"
        )
        raise ValueError(
            f"{self.name} is not defined for {strategy.name}, {why}; use raclora, "
            "ffa_lora or fedavg, where all clients share one basis"
        )

    def least(self) -> int:
        """How many clients it takes at least."""
        return 2 * int(self.limit) + 1 if self.name == "trimmed_mean" else 1

    def of(self, stacked: Trained, start: Trained, taking: Array) -> Trained:
        """The mean of those who take part; of too few it means nothing.

        Args:
          stacked: Arrays ``(clients, ...)``, all finite.
          start: Arrays ``(...)``, where the clients began.
          taking: bool ``(clients,)``.

        Returns:
          Arrays ``(...)``.
        """
        number = taking.sum()
        if self.name == "bounded_mean":
            moved = clipped(jax.tree.map(jnp.subtract, stacked, start), self.limit)
            mean, _ = mean_rule({}, moved, taking / jnp.maximum(number, 1))
            return jax.tree.map(jnp.add, start, mean)
        ends = (number - 1) // 2 if self.name == "median" else int(self.limit)
        place = jnp.arange(taking.shape[0])
        kept = (place >= ends) & (place < number - ends)

        def ordered(array: Array) -> Array:
            # Who takes no part is sorted behind the others, and then put to 0: a weight
            # of 0 would make NaN of an infinity.
            last = jnp.where(_column(taking, array), array, jnp.inf)
            return jnp.where(_column(kept, array), jnp.sort(last, axis=0), 0)

        shares = kept / jnp.maximum(number - 2 * ends, 1)
        return mean_rule({}, jax.tree.map(ordered, stacked), shares)[0]


def trimmed_mean(forged: int) -> Robust:
    """The coordinate-wise mean without the ``forged`` smallest and largest numbers.

    Breakdown point: with n clients it withstands ``forged`` that send anything, as long
    as ``n > 2 forged``: every number lies between those of honest clients. One forged
    client more takes the mean. A round of fewer messages is skipped.

    Args:
      forged: How many forged clients it withstands, at least 1.

    Returns:
      A ``Robust``, the ``mean=`` of ``aggregate`` and ``combine``.

    Raises:
      TypeError: If ``forged`` is not an int.
      ValueError: If it is below 1.

    Example:
      >>> trimmed_mean(2).least()
      5

    References:
      Yin et al., `Byzantine-Robust Distributed Learning
      <https://arxiv.org/abs/1803.01498>`_, 2018.
    """
    return Robust("trimmed_mean", checks.count("trimmed_mean: forged", forged))


def median() -> Robust:
    """The coordinate-wise median, of an even number the mean of the middle two.

    Breakdown point: with n clients it withstands ``(n - 1) // 2`` that send anything:
    every number lies between those of honest clients. Half of them take it.

    Returns:
      A ``Robust``, the ``mean=`` of ``aggregate`` and ``combine``.

    Example:
      >>> median().name
      'median'

    References:
      Yin et al., `Byzantine-Robust Distributed Learning
      <https://arxiv.org/abs/1803.01498>`_, 2018.
    """
    return Robust("median")


def bounded_mean(norm: float) -> Robust:
    """The mean of ``clip(F_j - F)`` added to F, F being where the clients began.

    Breakdown point: none. However many are forged, the mean moves by at most ``norm``,
    and f of n clients change it by at most ``2 f norm / n``.

    Args:
      norm: Largest norm of what one client trained in a round, over all its arrays.

    Returns:
      A ``Robust``, the ``mean=`` of ``aggregate`` and ``combine``.

    Raises:
      TypeError: If ``norm`` is not a number.
      ValueError: If it is not positive and finite.

    Example:
      >>> bounded_mean(1.5).limit
      1.5

    References:
      Sun et al., `Can You Really Backdoor Federated Learning?
      <https://arxiv.org/abs/1911.07963>`_, 2019.
    """
    limit = checks.number("bounded_mean: norm", norm, checks.POSITIVE)
    return Robust("bounded_mean", limit)


def clipped(moved: Trained, norm: float) -> Trained:
    """Arrays ``(clients, ...)`` scaled to at most a norm for each client, of any size."""
    leaves = jax.tree.leaves(moved)
    wide = jnp.result_type(jnp.float32, *leaves)

    def over(reduce: str, array: Array) -> Array:
        return getattr(array, reduce)(axis=tuple(range(1, array.ndim)))

    largest = jnp.stack([over("max", jnp.abs(leaf).astype(wide)) for leaf in leaves])
    # Squares of large numbers are infinite, those of small ones zero. A sixteenth: the
    # reciprocal of the largest number is below the smallest normal one.
    unit = jnp.maximum(largest.max(axis=0) / 16, 1e-30)

    def scaled(leaf: Array) -> Array:
        return leaf.astype(wide) / _column(unit, leaf)

    root = jnp.sqrt(sum(over("sum", scaled(leaf) ** 2) for leaf in leaves))
    beyond = root > norm / unit

    def clip(leaf: Array) -> Array:
        short = scaled(leaf) * _column(norm / jnp.where(root > 0, root, 1), leaf)
        return jnp.where(_column(beyond, leaf), short, leaf).astype(leaf.dtype)

    return jax.tree.map(clip, moved)


def _column(values: Array, array: Array) -> Array:
    """One value for each client, beside its array."""
    return values.reshape(-1, *(1,) * (array.ndim - 1))
