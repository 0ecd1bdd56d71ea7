"""What optax transformations of the adapter form's factors need to be told."""

from __future__ import annotations

from typing import Any

import optax

from raclora_jax._chain.inner import as_rule, knowing, restarted
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_leaves
from raclora_jax._core.sides import named
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import OptState, PyTree
from raclora_jax._forms.adapter import is_quantised


def factor_labels(base_params: PyTree, spec: Spec | int) -> PyTree:
    """The mode of every leaf of ``factors``, as labels for ``optax.partition``.

    A rule that keeps one state for the factors and one for the dense leaves can start
    the first again at a new link and let the second go on; see ``reset_moments``.

    Args:
      base_params: The weights; shapes are enough.
      spec: The spec of the run.

    Returns:
      The tree of ``factors`` with ``"lowrank"`` or ``"dense"`` at each leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> W = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
      >>> factor_labels(W, 2)
      {'bias': 'dense', 'kernel': 'lowrank'}
    """
    leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
    plans = plan_leaves(as_spec(spec), leaves, whole=True)

    def label(plan: LeafPlan) -> PyTree:
        return optax.MaskedNode() if plan.mode == "frozen" else plan.mode

    return paths.unflatten(treedef, {p: label(plan) for p, plan in plans.items()})


def with_plans(
    tx: optax.GradientTransformation, base_params: PyTree, spec: Spec | int
) -> optax.GradientTransformationExtraArgs:
    """Tells the rules inside a transformation of ``factors`` the plan of each leaf.

    ``raclora`` hands the plans of the leaves to its inner rule; in the adapter form the
    rule is yours, and this hands them over: ``orthogonal`` needs them to tell a rank
    axis from a stack, and leaves trained in full from factors.

    Args:
      tx: Any transformation of ``factors`` with such a rule in it.
      base_params: The weights; shapes are enough.
      spec: The spec of the run.

    Returns:
      The transformation, its ``update`` called with ``plans={path: LeafPlan}``.

    Example:
      >>> import jax.numpy as jnp, optax, raclora_jax as rl
      >>> W = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
      >>> factors, chain = rl.init_adapter(W, 2, key=0)
      >>> rule = optax.chain(rl.orthogonal(), optax.scale_by_learning_rate(1e-2))
      >>> opt_state = with_plans(rule, W, 2).init(factors)
    """
    leaves, _ = paths.flatten(base_params, is_leaf=is_quantised)
    whole = plan_leaves(as_spec(spec), leaves, whole=True)
    plans = {name: one for plan in whole.values() for name, one in named(plan).items()}
    rule = as_rule(tx)

    def init(factors: PyTree) -> OptState:
        with knowing(plans):
            return tx.init(factors)

    def update(
        updates: PyTree, state: OptState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, OptState]:
        with knowing(plans):
            return rule.update(updates, state, params, **{**extra, "plans": plans})

    return optax.GradientTransformationExtraArgs(init, update)


def reset_moments(
    opt_state: PyTree, tx: optax.GradientTransformation, factors: PyTree
) -> PyTree:
    """Starts the moments of the factors again; those of dense leaves go on.

    Args:
      opt_state: State of ``tx``.
      tx: ``optax.partition({"lowrank": rule, "dense": rule}, labels)`` with the labels
        of ``factor_labels``, or any rule, which then starts again as a whole.
      factors: The trained tree.

    Returns:
      The state for the first step of a new link.

    Example:
      >>> import jax.numpy as jnp, optax, raclora_jax as rl
      >>> W = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
      >>> factors, chain = rl.init_adapter(W, 2, key=0)
      >>> rules = {"lowrank": optax.adam(1e-3), "dense": optax.adam(1e-3)}
      >>> tx = optax.partition(rules, factor_labels(W, 2))
      >>> opt_state = reset_moments(tx.init(factors), tx, factors)
    """
    fresh = tx.init(factors)
    if not isinstance(opt_state, optax.PartitionState):
        return fresh
    states = dict(opt_state.inner_states)
    states["lowrank"] = restarted(states["lowrank"], fresh.inner_states["lowrank"])
    return opt_state._replace(inner_states=states)
