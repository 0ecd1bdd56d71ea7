"""LoRA-FA: the drawn factor frozen, the other one's gradient corrected for it."""

from __future__ import annotations

import optax

from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._algebra import gram, matrix, solve
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """LoRA-FA: asymmetric LoRA with ``g' = g (A A^T + 1e-8 I)^-1 / scaling^2``.

    ``scaling * g' A`` is the gradient projected on the rows of the drawn ``A``, for any
    ``A``: with ``inner=optax.identity()`` a step is a link of RAC-LoRA whose gamma is the
    learning rate. This is the form of the PEFT library; the paper's own, without the
    inverse, is ``asymmetric``.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      inner: Preconditioner without learning rate; by default Adam with ``eps=1e-6``, as
        PEFT has it.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> lora_fa(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      12

    References:
      Zhang et al., `LoRA-FA <https://arxiv.org/abs/2308.03303>`_, 2023.
    """
    inner = optax.scale_by_adam(eps=1e-6) if inner is None else inner
    pieces = Pieces(inner=inner, train_drawn=False, gradient=_projected)
    return pair_method(learning_rate, spec, pieces, key=key)


def _projected(plan: LeafPlan, gradients: Pair, pair: Pair) -> Pair:
    zero = gradients["zero"]
    corrected = solve(gram(matrix(pair["drawn"], plan)), matrix(zero, plan))
    return {"zero": (corrected / plan.scaling**2).reshape(zero.shape)}
