"""Full fine-tuning: every number, every step."""

from __future__ import annotations

import optax

from raclora_jax.methods._method import Method, from_transform, size


def full(
    learning_rate: optax.ScalarOrSchedule,
    *,
    inner: optax.GradientTransformation | None = None,
) -> Method:
    """Full fine-tuning: ``W <- W - lr * inner(G)``.

    Args:
      learning_rate: A float or a schedule.
      inner: Preconditioner without learning rate; Adam by default.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> full(1e-3).trained({"kernel": jnp.zeros((6, 4))})
      24
    """
    inner = optax.scale_by_adam() if inner is None else inner
    tx = optax.chain(inner, optax.scale_by_learning_rate(learning_rate))

    return from_transform(tx, trained=size, moments=lambda opt_state: opt_state)
