"""Chain of LoRA: both factors trained, merged and begun anew."""

from __future__ import annotations

import optax

from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


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
