"""What every method of comparison is: five functions around one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core.types import LossFn, PyTree


class Method(NamedTuple):
    """One way to fine-tune, usable in any jitted loop.

    Attributes:
      init: ``init(params) -> state``.
      step: ``step(state, loss_fn, *args) -> (state, loss)``, one step on
        ``loss_fn(params, *args)``.
      params: ``params(state) -> params``, the weights as the model sees them.
      trained: ``trained(params) -> int``, how many numbers the method trains.
      optimizer_bytes: ``optimizer_bytes(params) -> int``, bytes of its moments.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Array]]
    params: Callable[[Any], Any]
    trained: Callable[[Any], int]
    optimizer_bytes: Callable[[Any], int]


class DenseState(NamedTuple):
    """State of a method that steps the weights themselves.

    Attributes:
      params: The weights.
      opt_state: State of the optax transformation.
    """

    params: PyTree
    opt_state: PyTree


def from_transform(
    tx: optax.GradientTransformation,
    *,
    trained: Callable[[Any], int],
    moments: Callable[[Any], Any],
) -> Method:
    """The method that feeds dense gradients to an optax transformation.

    Args:
      tx: Any optax transformation, with its learning rate.
      trained: ``trained(params) -> int``, how many numbers it trains.
      moments: ``moments(opt_state) -> tree``, the part of its state that counts as
        optimizer memory.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> method = from_transform(
      ...     optax.lion(1e-4),
      ...     trained=lambda params: sum(leaf.size for leaf in params.values()),
      ...     moments=lambda opt_state: opt_state,
      ... )
      >>> method.trained({"kernel": jnp.zeros((6, 4))})
      24
    """

    def init(params: PyTree) -> DenseState:
        params = jax.tree.map(jnp.asarray, params)
        return DenseState(params, tx.init(params))

    def step(state: DenseState, loss_fn: LossFn, *args: Any) -> tuple[DenseState, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, *args)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return DenseState(optax.apply_updates(state.params, updates), opt_state), loss

    def optimizer_bytes(params: PyTree) -> int:
        # By shapes, so that a model too large for this machine has its bytes told too.
        return nbytes(moments(jax.eval_shape(tx.init, params)))

    return Method(init, step, lambda state: state.params, trained, optimizer_bytes)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: Array) -> Array:
    """The learning rate of one step."""
    return jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)


def size(tree: PyTree) -> int:
    """Numbers in a tree of arrays or abstract arrays."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays or abstract arrays."""
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
