"""Where a run stands: how it starts, what is trained in a round, how a step moves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import as_rule
from raclora_jax._core import paths, rounding
from raclora_jax._core.keys import leaf_key
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.types import KeyLike, LossFn, OptState, PyTree
from raclora_jax._forms.adapter import init_adapter, is_quantised, merge, next_link
from raclora_jax._forms.factor_rules import with_plans
from raclora_jax._forms.unmerged import adapted
from raclora_jax.federated._messages import Arrays, State, Step, Trained
from raclora_jax.federated._pairs import spread
from raclora_jax.federated._strategies import Strategy


def init(strategy: Strategy, params: PyTree, *, key: KeyLike) -> State:
    """Where a run starts.

    Args:
      strategy: The strategy of the run.
      params: The weights, the same for all.
      key: The public key of the sketches: typed threefry key, raw key data or int seed.

    Returns:
      A ``State``.

    Raises:
      ValueError: If the spec does not fit the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax.federated import raclora
      >>> state = init(raclora(2), {"kernel": jnp.ones((6, 4))}, key=0)
      >>> state.factors["kernel"].shape, int(state.round)
      ((2, 6), 0)
    """
    factors, chain = init_adapter(params, strategy.spec, key=key)
    flat, _ = paths.flatten(factors)
    return State(params, flat, chain, jnp.zeros((), jnp.int32))


def params_of(strategy: Strategy, state: State) -> PyTree:
    """The global weights now.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.

    Returns:
      The tree and the dtypes of the weights the run started from.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax.federated import raclora
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> state = init(raclora(2), params, key=0)
      >>> bool((params_of(raclora(2), state)["kernel"] == 1).all())
      True
    """
    return merge(state.base_params, state.factors, state.chain, strategy.spec)


def stamp_of(strategy: Strategy, params: PyTree) -> str:
    """What every member of a run must agree on, as 16 hexadecimal digits.

    Args:
      strategy: The strategy of the run.
      params: The weights; shapes are enough.

    Returns:
      A digest of the strategy and of the plan of every leaf: path, mode, shape, dtype and
      the stamp that factors and chains carry.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax.federated import raclora
      >>> W = {"kernel": jnp.ones((6, 4))}
      >>> stamp_of(raclora(2), W) == stamp_of(raclora(3), W)
      False
    """
    plans = plan_tree(strategy.spec, params).values()
    facts = [strategy.name, strategy.rounds_per_link]
    leaves = [(p.path, p.mode, p.shape, p.dtype, p.adapted and p.stamp) for p in plans]
    # Not hash(): Python salts that of text anew in every process.
    text = json.dumps([facts, leaves])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def start_of(strategy: Strategy, state: State) -> Trained:
    """What a client begins a round with."""
    return Trained(state.factors, dict(state.chain.sketches) if strategy.pair else {})


def rule_of(
    strategy: Strategy, state: State, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """A rule for what is trained.

    Of one factor it sees the tree of the adapter form, so what fits there fits here:
    labels of ``factor_labels``, rules that are told the plans. Of a pair it sees
    ``Trained``.
    """
    if strategy.pair:
        return as_rule(tx)
    rule = with_plans(tx, state.base_params, strategy.spec)
    leaves, treedef = paths.flatten(state.base_params, is_leaf=is_quantised)

    def tree(trained: Trained) -> PyTree:
        own = {path: trained.factors.get(path, optax.MaskedNode()) for path in leaves}
        return paths.unflatten(treedef, own)

    def init(trained: Trained) -> OptState:
        return rule.init(tree(trained))

    def update(
        updates: Trained, opt_state: OptState, trained: Trained, **extra: Any
    ) -> tuple[Trained, OptState]:
        given = tree(updates), opt_state, tree(trained)
        stepped, opt_state = rule.update(*given, **extra)
        return Trained(paths.flatten(stepped)[0], {}), opt_state

    return optax.GradientTransformationExtraArgs(init, update)


def loss_of(strategy: Strategy, loss_fn: LossFn) -> Callable[..., Array]:
    """``loss(trained, state, *batch)``: the loss turned into one of what is trained."""
    loss = adapted(loss_fn, strategy.spec)

    def of_trained(trained: Trained, state: State, *batch: Array) -> Array:
        chain = state.chain
        if strategy.pair:
            chain = chain._replace(sketches=trained.sketches)
        return loss(trained.factors, state.base_params, chain, *batch)

    return of_trained


def advance(strategy: Strategy, state: State, step: Step) -> State:
    """The state after a step: what server and clients compute alike."""
    if step.trained is not None:
        chain = state.chain
        if strategy.pair:
            chain = chain._replace(sketches=step.trained.sketches)
        base = _with_residual(strategy, state, step.residual)
        state = State(base, step.trained.factors, chain, state.round)
    done = state.round + 1
    every = strategy.rounds_per_link
    if every is None:
        return state._replace(round=done)

    def merged(state: State) -> State:
        link = (state.base_params, state.factors, state.chain)
        return State(*next_link(*link, strategy.spec), done)

    if every == 1:
        return merged(state)
    return lax.cond(
        done % every == 0, merged, lambda state: state._replace(round=done), state
    )


def stays_finite(strategy: Strategy, state: State, after: State) -> Array:
    """Whether all weights that are finite now are finite after; a boolean scalar."""
    fine = jnp.ones((), bool)
    now, then = (jax.tree.leaves(params_of(strategy, s)) for s in (state, after))
    for old, new in zip(now, then, strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact):
            fine &= (jnp.isfinite(new) | ~jnp.isfinite(old)).all()
    return fine


def _with_residual(strategy: Strategy, state: State, added: Arrays) -> PyTree:
    if not added:
        return state.base_params
    leaves, treedef = paths.flatten(state.base_params)
    plans = plan_tree(strategy.spec, state.base_params)
    for path, delta in added.items():
        plan, weight = plans[path], leaves[path]
        exact = jnp.asarray(weight, plan.wide_dtype) + spread(delta, plan)
        key = leaf_key(state.chain.key_data, "residual", path)
        # By round and not by link: a strategy with a residual never ends one, and would
        # round by the same draws for ever.
        key = jax.random.fold_in(key, state.round)
        settled = rounding.settle(exact, plan.dtype, strategy.spec.rounding, key)
        leaves[path] = settled.astype(plan.dtype)
    return paths.unflatten(treedef, leaves)
