"""RAC-LoRA as its authors ran it on networks."""

from __future__ import annotations

import dataclasses

import optax

from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


def published_raclora(
    learning_rate: optax.ScalarOrSchedule, spec: Spec | int, *, key: KeyLike
) -> Method:
    """RAC-LoRA as published: a raw N(0, 1) sketch, the factor trained by AdamW.

    The moments live on through the merges, and the decay of 0.01 acts on the factor,
    so it pulls towards the last merge. The step is no projection: its size grows with
    the width of the layer.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks, scaling and length of a link; its ``sketch`` is replaced.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> method = published_raclora(2e-4, Spec(2), key=0)
      >>> method.trained({"kernel": jnp.zeros((6, 4))})
      12

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Section 6.2.2; optimizer and scale as
      their code has them.
    """
    spec = as_spec(spec)
    rules = tuple(dataclasses.replace(rule, sketch=None) for rule in spec.rules)
    pieces = Pieces(
        inner=optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01)),
        train_drawn=False,
        chain=True,
        restart=False,
    )
    raw = dataclasses.replace(spec, sketch="gaussian_raw", rules=rules)
    return pair_method(learning_rate, raw, pieces, key=key)
