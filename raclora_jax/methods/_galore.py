"""GaLore: moments in the leading directions of the gradient."""

from __future__ import annotations

import optax

from raclora_jax._core.spec import Spec
from raclora_jax.methods._method import Method
from raclora_jax.methods._projected import of_one_side, projected_method, top_directions


def galore(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
) -> Method:
    """GaLore: ``W <- W - lr * scaling * P inner(P^T G)``, P from the SVD of G.

    P holds the ``rank`` leading singular vectors of the gradient on its smaller side and
    is computed anew every ``spec.resample_every`` steps; the moments live on unchanged,
    counters too. Published runs of a 60M model: rank 128, ``resample_every=200``, scaling
    0.25 (``alpha = rank / 4``), learning rate 0.01; on GLUE rank 4,
    ``resample_every=500``, scaling 4. The gradient is formed in full. There is no
    guarantee under noise: where it outweighs the gradient, P follows the noise, see
    ``golore``.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, ranks, scaling, and the steps a basis lives; its ``sketch`` is
        not used. The default side is GaLore's.
      inner: Preconditioner without learning rate; Adam by default.

    Returns:
      A ``Method``. Its trained numbers are the coordinates it steps in, and the basis
      counts as optimizer memory.

    Raises:
      ValueError: If the side is drawn, a rank exceeds a side, or ``inner`` needs params.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = galore(1e-3, Spec(2)), {"kernel": jnp.zeros((6, 4))}
      >>> method.trained(params), method.optimizer_bytes(params)
      (12, 132)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    return projected_method(
        learning_rate,
        of_one_side(spec),
        inner=inner,
        choose=lambda grads, plans, count: top_directions(grads, plans),
    )
