"""LoRA-Pro: the directions of both factors whose change is nearest to the gradient."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.methods._algebra import (
    check_full_rank,
    gram,
    matrix,
    product,
    solve,
    sylvester,
    transposed,
)
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Joint, Pair, Pieces

_B1, _B2, _EPS = 0.9, 0.999, 1e-8


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    form: Literal["adam", "sgd"] = "adam",
    key: KeyLike,
) -> Method:
    """LoRA-Pro: the pair steps so that ``W`` moves as near as it can to ``-G``.

    With paper's factors B, A and their gradients,
    ``h_A = (B^T B)^-1 g_A / s^2 + X A`` and
    ``h_B = (I - P_B) g_B (A A^T)^-1 / s^2 - B X``. The change of the weight,
    ``s B h_A + s h_B A = G - (I - P_B) G (I - P_A)``, is the same for every X; the one
    that moves the factors nearest to their own gradients solves
    ``B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2``. Gram matrices have a ridge of 1e-8.

    The form ``"adam"`` keeps Adam's two moments of the equivalent dense gradient, of the
    size of the weights: what LoRA saves in optimizer memory it gives back. Weight
    decay, which the authors' code offers, is left out.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      form: ``"adam"``, or ``"sgd"`` without moments, also for leaves trained in full.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Raises:
      ValueError: If ``form`` is another word; from ``init``, if a rank is above a side.

    Example:
      >>> import jax.numpy as jnp
      >>> W = {"kernel": jnp.zeros((6, 4))}
      >>> [lora_pro(1e-3, 2, form=f, key=0).optimizer_bytes(W) for f in ("sgd", "adam")]
      [0, 200]

    References:
      Wang et al., `LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
      <https://arxiv.org/abs/2407.18242>`_, 2024.
    """
    checks.choice("form", form, ("adam", "sgd"))
    if form == "sgd":
        pieces = Pieces(inner=optax.identity(), gradient=adjusted, check=check_full_rank)
    else:
        pieces = Pieces(joint=Joint(_init, _update), check=check_full_rank)
    return pair_method(learning_rate, spec, pieces, key=key)


def adjusted(plan: LeafPlan, gradients: Pair, pair: Pair) -> Pair:
    """The directions of both factors with the X that keeps them near their gradients."""
    drawn, zero = matrix(pair["drawn"], plan), matrix(pair["zero"], plan)
    of_drawn, of_zero = _outright(plan, gradients, pair)
    known = -product(of_drawn, transposed(drawn))
    x = sylvester(gram(zero), gram(drawn), known)
    return {
        "drawn": (of_drawn + product(x, drawn)).reshape(pair["drawn"].shape),
        "zero": (of_zero - product(transposed(x), zero)).reshape(pair["zero"].shape),
    }


def _outright(plan: LeafPlan, gradients: Pair, pair: Pair) -> tuple[Array, Array]:
    """The directions with X = 0, as matrices."""
    drawn, zero = matrix(pair["drawn"], plan), matrix(pair["zero"], plan)
    of_drawn, of_zero = (matrix(gradients[name], plan) for name in ("drawn", "zero"))
    inside = product(
        transposed(solve(gram(zero), product(zero, transposed(of_zero)))), zero
    )
    square = plan.scaling**2
    return (
        solve(gram(zero), of_drawn) / square,
        solve(gram(drawn), of_zero - inside) / square,
    )


def _init(plan: LeafPlan, pair: Pair) -> PyTree:
    drawn, zero = matrix(pair["drawn"], plan), matrix(pair["zero"], plan)
    moment = jnp.zeros((*drawn.shape[:-2], drawn.shape[-1], zero.shape[-1]), zero.dtype)
    return {
        "count": jnp.zeros((), jnp.int32),
        "first": moment,
        "second": jnp.zeros_like(moment),
    }


def _update(
    plan: LeafPlan, gradients: Pair, state: PyTree, pair: Pair
) -> tuple[Pair, PyTree]:
    """Adam on the equivalent gradient, and its direction taken back to the factors."""
    drawn, zero = matrix(pair["drawn"], plan), matrix(pair["zero"], plan)
    of_drawn, of_zero = _outright(plan, gradients, pair)
    # drawn, of_drawn (batch..., r, n); zero, of_zero (batch..., r, m); the equivalent
    # gradient, its moments and even (batch..., n, m).
    equivalent = product(transposed(of_drawn), zero) + product(transposed(drawn), of_zero)
    equivalent = plan.scaling * equivalent
    count = optax.safe_increment(state["count"])
    first = _B1 * state["first"] + (1 - _B1) * equivalent
    second = _B2 * state["second"] + (1 - _B2) * equivalent**2
    root = jnp.sqrt(second / (1 - _B2**count)) + _EPS
    even = plan.scaling * (first / (1 - _B1**count)) / root
    back = {"drawn": product(zero, transposed(even)), "zero": product(drawn, even)}
    after = {"count": count, "first": first, "second": second}
    return adjusted(plan, back, pair), after
