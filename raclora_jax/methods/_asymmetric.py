"""Asymmetric LoRA: one pair, the drawn factor frozen for good."""

from __future__ import annotations

import optax

from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


def asymmetric(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """Asymmetric LoRA: the drawn factor of LoRA stays as drawn, the other is trained.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> asymmetric(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      12

    References:
      Zhu et al., `Asymmetry in Low-Rank Adapters of Foundation Models
      <https://arxiv.org/abs/2402.16842>`_, 2024.
    """
    return pair_method(
        learning_rate, spec, Pieces(inner=inner, train_drawn=False), key=key
    )
