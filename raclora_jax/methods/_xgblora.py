"""XGBLoRA: boosters of rank 1, each on a few leaves drawn at random."""

from __future__ import annotations

import dataclasses

import jax
import optax
from jax import Array

from raclora_jax._core import checks
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces, Subset


def xgblora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    boosters: int,
    steps: int,
    leaves: int,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """XGBLoRA: pairs of rank 1, merged and begun anew on other leaves.

    A booster trains for ``steps / boosters`` steps on ``leaves`` leaves drawn anew; all
    others rest. A merge takes the whole change (a step size of 1). One booster on all
    leaves is LoRA of rank 1. Leaves trained in full go on through all boosters.

    From the abstract and from summaries, no code found: how a booster restarts (here
    factors and moments), and its length, are unverified; the penalty on the norms that
    the paper offers is left out. A stacked leaf is one leaf here, where the paper draws
    layers. Moments of leaves at rest keep their place in memory and are counted.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves and scaling, of rank 1; ``resample_every`` is replaced.
      boosters: How many boosters the run has; it divides ``steps``.
      steps: Steps of the whole run.
      leaves: How many adapted leaves a booster trains.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``; its trained numbers are the most that one booster can have.

    Raises:
      ValueError: If a count is below 1, ``boosters`` does not divide ``steps``, or a rank
        is not 1; from ``init``, if there are fewer leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> method = xgblora(1e-3, Spec(1), boosters=5, steps=100, leaves=1, key=0)
      >>> method.trained({"up": jnp.zeros((6, 4)), "down": jnp.zeros((4, 6))})
      10

    References:
      Zhang et al., `Less is More: Extreme Gradient Boost Rank-1 Adaption
      <https://arxiv.org/abs/2410.19694>`_, 2024.
    """
    spec, data = as_spec(spec), key_data(key)
    for name, value in (("boosters", boosters), ("steps", steps), ("leaves", leaves)):
        checks.count(name, value)
    if steps % boosters:
        raise ValueError(
            f"boosters={boosters} does not divide steps={steps}; each booster has the "
            "same number of steps"
        )
    for rank in (spec.rank, *(rule.rank for rule in spec.rules)):
        if rank not in (1, None):
            raise ValueError(f"a booster has rank 1, got a spec of rank {rank}")
    each = steps // boosters

    def size(known: int) -> int:
        if leaves > known:
            raise ValueError(
                f"leaves={leaves} is more than the {known} leaves the spec adapts"
            )
        return leaves

    def init(known: int) -> PyTree:
        size(known)
        return ()

    def drawn(
        state: PyTree, count: Array, gradients: dict[str, Pair], pairs: dict[str, Pair]
    ) -> tuple[Array, PyTree]:
        del gradients
        own = jax.random.fold_in(leaf_key(data, "boosters", ""), count // each)
        # Exactly so many each time; a coin for each leaf would be so many in the mean.
        return jax.random.permutation(own, len(pairs)) < leaves, state

    subset = Subset(size, init, drawn)
    pieces = Pieces(inner=inner, chain=True, subset=subset)
    spec = dataclasses.replace(spec, resample_every=each)
    return pair_method(learning_rate, spec, pieces, key=key)
