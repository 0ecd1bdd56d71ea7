"""How many bytes a message will have, before there is one."""

from __future__ import annotations

import math

import jax.numpy as jnp

from raclora_jax._core import checks
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import PyTree
from raclora_jax.follow._numbers import NUMBERS, Numbers


def message_bytes(
    params: PyTree, spec: Spec | int, *, numbers: Numbers = "float32"
) -> int:
    """Bytes of the arrays in a message of one step, where every leaf moves.

    The header comes on top: some 400 bytes for each leaf, and 20 where the message has
    digests. A message of a fused step is as large as one whose numbers have the dtype of
    the weights.

    Args:
      params: The weights, or their shapes.
      spec: A ``Spec`` or a rank.
      numbers: As in ``encode``.

    Returns:
      Bytes; of a leaf whose side is drawn those of the larger factor.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> params = {"kernel": jnp.zeros((64, 512)), "bias": jnp.zeros(512)}
      >>> message_bytes(params, 4, numbers="int8")  # 4 x 512, 4 x 2, and the bias
      4104
    """
    checks.choice("numbers", numbers, NUMBERS)
    each = jnp.dtype(numbers).itemsize
    total = 0
    for plan in plan_tree(as_spec(spec), params).values():
        if plan.adapted:
            scales = 2 * plan.rank * math.prod(plan.batch_shape) * (numbers == "int8")
            total += scales + each * max(math.prod(p.factor_shape) for p in plan.each)
        elif plan.mode == "dense":
            total += math.prod(plan.shape) * jnp.dtype(plan.dtype).itemsize
    return total
