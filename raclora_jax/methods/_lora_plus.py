"""LoRA+: the zero factor at a multiple of the drawn one's learning rate."""

from __future__ import annotations

import optax

from raclora_jax._core import checks
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    ratio: float = 16.0,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """LoRA+: LoRA whose zero factor has ``ratio`` times the learning rate.

    Of one rate for both, the drawn factor's share of the change vanishes as the width
    grows. A ratio of 1 is LoRA. Leaves trained in full have the rate itself.

    Args:
      learning_rate: Of the drawn factor, a float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      ratio: The zero factor's rate over the drawn one's, positive; 16 in the paper's
        code.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Raises:
      ValueError: If ``ratio`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> lora_plus(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Hayou et al., `LoRA+: Efficient Low Rank Adaptation of Large Models
      <https://arxiv.org/abs/2402.12354>`_, 2024.
    """
    checks.number("ratio", ratio, checks.POSITIVE)
    inner = optax.scale_by_adam() if inner is None else inner
    # Behind the rule: a factor of the gradient is lost in Adam.
    faster = optax.chain(inner, optax.scale(ratio))
    pieces = Pieces(inner=inner, rules={"zero": faster})
    return pair_method(learning_rate, spec, pieces, key=key)
