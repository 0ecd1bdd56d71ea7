"""Updates on their way to the weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from raclora_jax._core import paths
from raclora_jax._core.factor import is_factor, plan_of_update
from raclora_jax._core.merge import merge_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Leaf, Leaves, PyTree


def apply_updates(params: PyTree, updates: PyTree, *gone: Any) -> PyTree:
    """Adds updates to the weights: ``W + lift(value) - decay * W``, rounded once.

    Dense leaves are added as ``optax.apply_updates`` does. A ``Factor`` is lifted on the
    sketch that made it, which it knows itself, as it knows how its weight is rounded.
    Frozen leaves stay.

    Args:
      params: The parameters.
      updates: What ``tx.update`` returned.
      *gone: State and spec are no arguments any more, and are refused.

    Returns:
      The new parameters, dtypes kept.

    Raises:
      ValueError: If an update does not belong to its leaf, is a gradient, or was changed
        by a rule after ``raclora`` that does more than scale it; or if there is a third
        argument.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W, tx = jnp.zeros((6, 4)), rl.raclora(0.1, 2, key=0)
      >>> state = tx.init(W)
      >>> grads = rl.project(jnp.ones((6, 4)), rl.sample_sketch(W, 2, key=0), 2)
      >>> updates, state = tx.update(grads, state, W)
      >>> rl.apply_updates(W, updates).shape
      (6, 4)
    """
    if gone:
        raise ValueError(
            f"apply_updates takes params and updates, got {2 + len(gone)} arguments: an "
            "update knows its sketch, so state and spec are not handed over; write "
            "rl.apply_updates(params, updates)"
        )
    leaves, treedef = paths.flatten(params)
    steps, _ = paths.flatten(updates, is_leaf=is_factor)
    return paths.unflatten(treedef, applied(leaves, steps))


def applied(leaves: Leaves, steps: Leaves) -> Leaves:
    """``apply_updates`` of leaves by path; those without an update stay.

    Args:
      leaves: ``{path: weight}``.
      steps: ``{path: update}`` of some of them.

    Returns:
      ``{path: new weight}``.
    """
    plans = _plans_of_updates(steps, leaves)

    def one(path: str, weight: Leaf) -> Leaf:
        step = steps.get(path)
        if step is None:
            return weight
        if not is_factor(step):
            return optax.apply_updates(weight, step)
        plan = plans[path]
        read = step.origin.read(plan)
        if read.master is not None:
            return jnp.where(read.gone, weight, read.master.astype(weight.dtype))
        return merge_leaf(
            weight, step.value, read.sketch, step.decay, plan, plan.rounding, read.key
        )

    return {p: one(p, w) for p, w in leaves.items()}


def _plans_of_updates(steps: Leaves, leaves: Leaves) -> dict[str, LeafPlan]:
    """The plans of the factors, once all updates are found to belong to the weights."""
    plans = {}
    for path, step in steps.items():
        if path not in leaves:
            raise ValueError(
                f"the update of {paths.show(path)} has no leaf in params; apply updates "
                "to the tree whose gradients tx.update took"
            )
        weight = leaves[path]
        if is_factor(step):
            plans[path] = plan_of_update(path, step, weight)
        elif jnp.shape(step) != jnp.shape(weight):
            raise ValueError(
                f"leaf {paths.show(path)}: expected an update of shape "
                f"{jnp.shape(weight)}, got {jnp.shape(step)}; apply what tx.update "
                "returned"
            )
    return plans
