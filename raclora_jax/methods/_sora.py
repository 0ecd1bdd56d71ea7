"""SoRA: a gate for each direction of the pair, closed by soft thresholds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces


def sora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    threshold: float = 3e-4,
    weight_decay: float = 0.1,
    key: KeyLike,
) -> Method:
    """SoRA: ``W + scaling * left * diag(gate) * right`` with gates that close.

    Gates start as N(0, 1) and step by Adam without decay; after each step
    ``gate <- sign(gate) max(|gate| - threshold, 0)``, the threshold not multiplied by the
    learning rate. A gate at 0 whose gradient is 0 stays shut, and its direction may be
    cut out without a change of the output. Adam with decay trains the factors, Adam
    alone what is trained in full, which is held here as a difference. The L1 term on
    gates that the authors' code adds to the loss is left to the loss.

    Args:
      learning_rate: A float or a schedule of the steps; 8e-4 in the authors' runs.
      spec: Which leaves, ranks and scaling; rank 8 and alpha 16 in the authors' runs.
      threshold: What a gate loses in each step, at least 0.
      weight_decay: Decoupled decay of the factors, at least 0.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Raises:
      ValueError: If a number is below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> sora(8e-4, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      22

    References:
      Ding et al., `Sparse Low-rank Adaptation of Pre-trained Language Models
      <https://arxiv.org/abs/2311.11696>`_, 2023; numbers as their code has them.
    """
    checks.number("threshold", threshold, checks.NOT_NEGATIVE)
    checks.number("weight_decay", weight_decay, checks.NOT_NEGATIVE)

    def settle(plan: LeafPlan, pair: Pair) -> Pair:
        del plan
        gate = pair["gate"]
        shrunk = jnp.sign(gate) * jnp.maximum(jnp.abs(gate) - threshold, 0)
        return pair | {"gate": shrunk}

    adam = optax.scale_by_adam()
    pieces = Pieces(
        inner=optax.chain(adam, optax.add_decayed_weights(weight_decay)),
        rules={"gate": adam, "dense": adam},
        extra=_gate,
        beside=_gated,
        settle=settle,
    )
    return pair_method(learning_rate, spec, pieces, key=key)


def _gate(plan: LeafPlan, weight: Array, key: Array) -> Pair:
    del weight
    shape = (*plan.batch_shape, plan.rank)
    return {"gate": jax.random.normal(key, shape, plan.wide_dtype)}


def _gated(plan: LeafPlan, pair: Pair) -> tuple[Array, Array]:
    gate, zero = pair["gate"], pair["zero"]
    # gate (batch..., r) beside zero (batch..., r, kept...).
    gate = gate.reshape(*gate.shape, *(1,) * (zero.ndim - gate.ndim))
    return pair["drawn"], gate * zero
