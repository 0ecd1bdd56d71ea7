"""The library's own RAC-LoRA, as a ``Method`` beside the others."""

from __future__ import annotations

from typing import Any

import optax

from raclora_jax._chain.state import find_state
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax._forms import optimizer
from raclora_jax.methods._method import Method, from_transform


def raclora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    key: KeyLike,
    **options: Any,
) -> Method:
    """``raclora_jax.raclora`` in the shape of a ``Method``.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: A ``Spec`` or a rank.
      key: Typed threefry key, raw key data, or int seed.
      **options: As ``raclora_jax.raclora`` takes them: ``inner``, ``moments``, ...

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> raclora(1e-3, Spec(2), key=0).trained({"kernel": jnp.zeros((6, 4))})
      12
    """
    tx = optimizer.raclora(learning_rate, spec, key=key, **options)

    def trained(params: PyTree) -> int:
        plans = plan_tree(spec, params).values()
        return sum(plan.trained_size for plan in plans)

    return from_transform(
        tx, trained=trained, moments=lambda opt_state: find_state(opt_state).inner_state
    )
