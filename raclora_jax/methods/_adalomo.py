"""AdaLomo: a factored second moment and steps as long as the weights say."""

from __future__ import annotations

import optax

from raclora_jax.methods._method import Method, from_transform, size


def adalomo(learning_rate: optax.ScalarOrSchedule) -> Method:
    """AdaLomo: ``W <- W - lr max(1e-3, rms(W)) u / max(1, rms(u))``, ``u = G / V^1/2``.

    V is Adafactor's, the means over rows and columns of ``G^2``, decayed by
    ``1 - t^-0.8``; there is no first moment, so a matrix (m, n) keeps m + n numbers. The
    paper's step is fused with the backward pass, so that no two gradients exist at once.
    Here all exist, and what compares is its state and its steps: the scale by the weight
    needs the weight, which ``raclora_jax.fused_step`` does not hand to its rule. LOMO is
    the same fusion of plain descent, ``full(lr, inner=optax.identity())``.

    Args:
      learning_rate: A float or a schedule; relative to the size of the weights.

    Returns:
      A ``Method``, which trains every number.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = adalomo(1e-3), {"kernel": jnp.zeros((60, 40))}
      >>> method.trained(params), method.optimizer_bytes(params)
      (2400, 408)

    References:
      Lv et al., `AdaLomo: Low-memory Optimization with Adaptive Learning Rate
      <https://arxiv.org/abs/2310.10195>`_, 2023.
    """
    tx = optax.chain(
        # optax factors sides from 128 on only: smaller leaves would hold full moments.
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
        optax.scale_by_learning_rate(learning_rate),
    )
    return from_transform(tx, trained=size, moments=lambda opt_state: opt_state[0])
