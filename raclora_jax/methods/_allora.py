"""ALLoRA: the gradient of each output scaled by how far its weights have moved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks, paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._algebra import gram, matrix, product
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces


def allora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    eta: float,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """ALLoRA: LoRA without scaling, the gradients of outputs multiplied one by one.

    In the gradients of both factors, not in that of the input, output ``i`` counts
    ``1 / sqrt(|row i of B A| + 1 / eta^2)`` times: ``eta`` at the start, less as its
    weights move. Adam nearly cancels it.

    The formula is second hand, restated from the paper by the code of others: whether the
    norm is squared, and whether it is of the change or of the parameters, is unverified.
    Row norms come from ``A A^T`` and ``B``, so ``B A`` is never formed; the gradient of
    one factor needs the other scaled, so products beside the weight have twice the rank.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves and ranks, with scaling 1; ``side`` is the side of the drawn
        factor.
      eta: What the gradients are multiplied by at the start, above 0.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. Its ``init`` raises ``ValueError`` for a leaf with another scaling.

    Raises:
      ValueError: If ``eta`` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> allora(1e-3, Spec(2), eta=4.0, key=0).trained({"kernel": jnp.zeros((6, 4))})
      20

    References:
      Huang and Balestriero, `ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws
      <https://arxiv.org/abs/2410.09692>`_, 2024.
    """
    checks.number("eta", eta, checks.POSITIVE)

    def beside(plan: LeafPlan, pair: Pair) -> tuple[Array, Array]:
        held = {name: jax.lax.stop_gradient(factor) for name, factor in pair.items()}
        inputs, outputs = _sides(plan)
        speed = _speed(plan, held[inputs], held[outputs], eta)
        axis = len(plan.batch)
        # The value is the pair's. Each factor has its gradient in a term of its own,
        # where the outputs are scaled.
        paced = held[outputs] + (pair[outputs] - held[outputs]) * speed
        doubled = {
            inputs: jnp.concatenate(
                [held[inputs], pair[inputs] - held[inputs]], axis=axis
            ),
            outputs: jnp.concatenate([paced, held[outputs] * speed], axis=axis),
        }
        return doubled["drawn"], doubled["zero"]

    pieces = Pieces(inner=inner, beside=beside, check=_check_unscaled)
    return pair_method(learning_rate, spec, pieces, key=key)


def _sides(plan: LeafPlan) -> tuple[str, str]:
    """Which factor has the contracted axes, and which the outputs."""
    return ("drawn", "zero") if plan.side == "left" else ("zero", "drawn")


def _speed(plan: LeafPlan, inputs: Array, outputs: Array, eta: float) -> Array:
    """What each output counts, laid out as the factor that has the outputs."""
    columns = matrix(outputs, plan)
    # columns (batch..., r, out); rounding may leave a square below zero.
    squares = jnp.sum(columns * product(gram(matrix(inputs, plan)), columns), axis=-2)
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    stack = len(plan.batch)
    shape = (*outputs.shape[:stack], 1, *outputs.shape[stack + 1 :])
    return jax.lax.rsqrt(norms + 1 / eta**2).reshape(shape)


def _check_unscaled(plan: LeafPlan) -> None:
    if plan.scaling != 1:
        raise ValueError(
            f"leaf {paths.show(plan.path)} has scaling {plan.scaling}: allora has none; "
            "leave alpha out of the spec"
        )
