"""rsLoRA: LoRA scaled by the root of the rank."""

from __future__ import annotations

import dataclasses
import math

import optax

from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Alpha, KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


def rslora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """rsLoRA: LoRA with the scaling ``alpha / sqrt(rank)``.

    The change of the output in a first step of gradient descent is then the same at
    every rank, where ``alpha / rank`` lets it fall as ``1 / rank``.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and ``alpha``, a number; ``side`` is the side of the drawn
        factor.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Raises:
      ValueError: If ``alpha`` is no number, in the spec or in a rule.

    Example:
      >>> import jax.numpy as jnp
      >>> rslora(1e-3, Spec(2, alpha=16), key=0).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Kalajdzievski, `A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
      <https://arxiv.org/abs/2312.03732>`_, 2023.
    """
    spec = as_spec(spec)
    rules = tuple(
        dataclasses.replace(
            rule, alpha=_rooted(rule.alpha or spec.alpha, rule.rank or spec.rank)
        )
        if rule.mode == "lowrank"
        else rule
        for rule in spec.rules
    )
    rooted = dataclasses.replace(spec, alpha=_rooted(spec.alpha, spec.rank), rules=rules)
    return pair_method(learning_rate, rooted, Pieces(inner=inner), key=key)


def _rooted(alpha: Alpha, rank: int) -> float:
    """The alpha for which ``alpha / rank`` is what ``alpha / sqrt(rank)`` was."""
    if not isinstance(alpha, float):
        raise ValueError(
            f"rslora scales by alpha / sqrt(rank) and needs a number, got "
            f"alpha={alpha!r}; write for example Spec({rank}, alpha=16)"
        )
    return alpha * math.sqrt(rank)
