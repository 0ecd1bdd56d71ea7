"""The plain pair: both factors trained, or one, for good or in a chain of merges."""

from __future__ import annotations

import optax

from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


def lora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """LoRA: ``W + (alpha / rank) * left * right`` with both factors trained.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> lora(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.
    """
    return pair_method(learning_rate, spec, Pieces(inner=inner), key=key)


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
    pieces = Pieces(inner=inner, train_drawn=False)
    return pair_method(learning_rate, spec, pieces, key=key)


def cola(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """Chain of LoRA: LoRA merged every ``spec.resample_every`` steps, with a fresh pair.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> cola(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Xia et al., `Chain of LoRA <https://arxiv.org/abs/2401.04151>`_, 2024.
    """
    return pair_method(learning_rate, spec, Pieces(inner=inner, chain=True), key=key)
