"""LoRA-RITE: a second moment that does not depend on how the product is split."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.methods._algebra import check_full_rank, matrix, product, transposed
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Joint, Pair, Pieces

_B1, _B2, _EPS = 0.9, 0.999, 1e-6


def lora_rite(
    learning_rate: optax.ScalarOrSchedule, spec: Spec | int, *, key: KeyLike
) -> Method:
    """LoRA-RITE: moments of each factor in an orthonormal basis of the other.

    The other factor is ``Q R`` (tall, QR), so ``g R^+`` is the gradient of a factor
    without the other's size. Its second moment is a small matrix
    ``V <- b2 P V P^T + (1 - b2) gb^T gb / rows`` with ``P = Q_new^T Q_old``, the first
    is of ``gb V^-1/2``, and the factor moves by ``M R^{+T}``. The weights then do not
    depend on the split: ``(B T, T^-1 A)`` gives the same run. While one factor is zero
    the other rests.

    The algorithm is that of a port of the authors' code, whose escaped mass, skip by root
    mean square and clip are left out. Where its epsilon of 1e-6 stands is unverified:
    here it is added to the root of ``V``. The decays are Adam's, corrected as
    ``b (1 - b^(t-1)) / (1 - b^t)``. One QR and one SVD of rank x rank a factor and step.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. Leaves trained in full get Adam. Its ``init`` raises ``ValueError`` if
      a rank is above a side.

    Example:
      >>> import jax.numpy as jnp
      >>> lora_rite(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Yen et al., `LoRA Done RITE <https://arxiv.org/abs/2410.20625>`_, 2024.
    """
    pieces = Pieces(joint=Joint(_init, update), check=check_full_rank)
    return pair_method(learning_rate, spec, pieces, key=key)


def _init(plan: LeafPlan, pair: Pair) -> PyTree:
    def one(factor: Array, other: Array) -> PyTree:
        small = (*factor.shape[:-1], factor.shape[-2])
        return {
            "basis": jnp.zeros_like(transposed(other)),
            "first": jnp.zeros_like(factor),
            "second": jnp.zeros(small, factor.dtype),
        }

    drawn, zero = matrix(pair["drawn"], plan), matrix(pair["zero"], plan)
    count = jnp.zeros((), jnp.int32)
    return {"count": count, "drawn": one(drawn, zero), "zero": one(zero, drawn)}


def update(
    plan: LeafPlan, gradients: Pair, state: PyTree, pair: Pair
) -> tuple[Pair, PyTree]:
    """One step of both factors from the same point."""
    count = optax.safe_increment(state["count"])
    moved: Pair = {}
    after = {"count": count}
    for name, other in (("drawn", "zero"), ("zero", "drawn")):
        gradient, factor = matrix(gradients[name], plan), matrix(pair[other], plan)
        direction, after[name] = _one(gradient, factor, state[name], count)
        moved[name] = direction.reshape(pair[name].shape)
    return moved, after


def _one(
    gradient: Array, other: Array, state: PyTree, count: Array
) -> tuple[Array, PyTree]:
    """The direction of one factor; rows of rank, where the paper has columns."""
    # gradient (..., r, n), other (..., r, m): basis is (..., m, r), upper and turn are
    # (..., r, r). pinv, since upper is zero as long as the other factor is.
    basis, upper = jnp.linalg.qr(transposed(other))
    inverse = jnp.linalg.pinv(upper)
    plain = product(transposed(inverse), gradient)
    turn = product(transposed(basis), state["basis"])
    # Both are 0 in the first step, so that the zeros of a new basis do not count.
    b1, b2 = (b * (1 - b ** (count - 1)) / (1 - b**count) for b in (_B1, _B2))
    second = product(product(turn, state["second"]), transposed(turn))
    fresh = product(plain, transposed(plain)) / plain.shape[-1]
    second = b2 * second + (1 - b2) * fresh
    values, vectors = jnp.linalg.eigh(second)
    root = jnp.sqrt(jnp.maximum(values, 0)) + _EPS
    even = product(vectors, product(transposed(vectors), plain) / root[..., None])
    first = b1 * product(turn, state["first"]) + (1 - b1) * even
    return product(inverse, first), {"basis": basis, "first": first, "second": second}
