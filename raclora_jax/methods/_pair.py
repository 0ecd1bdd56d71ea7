"""Methods that train a pair of factors beside frozen weights.

One factor of each adapted leaf is drawn, the other starts at zero; in the words of the
plan, the drawn one has the shape of the sketch and the other that of the factor. LoRA,
Asymmetric LoRA, Chain of LoRA and RAC-LoRA as published differ in three switches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import as_rule, knowing
from raclora_jax._core import paths
from raclora_jax._core.keys import key_data
from raclora_jax._core.lowrank import formed, lift_leaf
from raclora_jax._core.plan import LeafPlan, plan_tree
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike, LossFn, PyTree
from raclora_jax._forms.unmerged import unmerged
from raclora_jax.methods._method import Method, nbytes, rate_at, size


class PairState(NamedTuple):
    """State of a pair method; every dict is keyed by path.

    Attributes:
      base: The weights the pair is added to.
      drawn: The factors that start random.
      zero: The factors that start at zero.
      dense: Trained differences of the leaves that are not adapted.
      inner: ``{group: state}`` of the inner rule for each trained group.
      count: int32 scalar, steps taken.
    """

    base: PyTree
    drawn: dict[str, Array]
    zero: dict[str, Array]
    dense: dict[str, Array]
    inner: dict[str, Any]
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def pair_method(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None,
    train_drawn: bool,
    chain: bool,
    restart: bool,
    key: KeyLike,
) -> Method:
    """A method with the pair ``W + scaling * drawn * zero``.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks, scaling, law of the drawn factor and length of a link.
      inner: Preconditioner without learning rate; Adam by default.
      train_drawn: Whether the drawn factor is trained too.
      chain: Whether the pair is merged and begun anew every ``spec.resample_every``.
      restart: Whether the moments of the pair start again with it.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.
    """
    spec, data = as_spec(spec), key_data(key)
    for side in (spec.side, *(rule.side for rule in spec.rules)):
        if isinstance(side, float):
            raise ValueError(
                f"side={side} draws the side for each link, but a pair has one "
                "drawn and one zero factor for good; give side='left' or 'right', or "
                "use methods.raclora"
            )
    inner = optax.scale_by_adam() if inner is None else inner
    rule = as_rule(inner)
    groups = ("zero", "drawn", "dense") if train_drawn else ("zero", "dense")

    def begin(
        params: PyTree, link: Array | int
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        plans = {p: plan for p, plan in plan_tree(spec, params).items() if plan.adapted}
        drawn = {
            path: formed(sketch, plans[path])
            for path, sketch in draw_all(data, link, plans.values()).items()
        }
        zero = {
            path: jnp.zeros(plan.factor_shape, plan.wide_dtype)
            for path, plan in plans.items()
        }
        return drawn, zero

    def init(params: PyTree) -> PairState:
        leaves, treedef = paths.flatten(params)
        base = paths.unflatten(treedef, {p: jnp.asarray(w) for p, w in leaves.items()})
        drawn, zero = begin(base, 0)
        dense = {
            path: jnp.zeros(plan.shape, plan.wide_dtype)
            for path, plan in plan_tree(spec, base).items()
            if plan.mode == "dense"
        }
        state = PairState(base, drawn, zero, dense, {}, jnp.zeros((), jnp.int32))
        with knowing(plan_tree(spec, base)):
            inner = {g: rule.init(getattr(state, g)) for g in groups}
        return state._replace(inner=inner)

    def params(state: PairState) -> PyTree:
        plans = _explicit(plan_tree(spec, state.base))
        leaves, treedef = paths.flatten(state.base)
        merged = {p: _effective(plans[p], weight, state) for p, weight in leaves.items()}
        return paths.unflatten(treedef, merged)

    def next_link(state: PairState) -> PairState:
        base = params(state._replace(dense=jax.tree.map(jnp.zeros_like, state.dense)))
        drawn, zero = begin(base, state.count // spec.resample_every)
        state = state._replace(base=base, drawn=drawn, zero=zero)
        if not restart:
            return state
        with knowing(plan_tree(spec, base)):
            fresh = {g: rule.init(getattr(state, g)) for g in groups if g != "dense"}
        return state._replace(inner={**state.inner, **fresh})

    def step(state: PairState, loss_fn: LossFn, *args: Any) -> tuple[PairState, Array]:
        if chain:
            ends = (state.count > 0) & (state.count % spec.resample_every == 0)
            state = lax.cond(ends, next_link, lambda state: state, state)
        trained = {group: getattr(state, group) for group in groups}

        plans = plan_tree(spec, state.base)

        def loss(trained: dict[str, Any]) -> Array:
            now = state._replace(**trained)
            beside = unmerged(loss_fn, _explicit(plans), now.zero | now.dense, now.drawn)
            return beside(now.base, *args)

        value, grads = jax.value_and_grad(loss)(trained)
        rate = rate_at(learning_rate, state.count)
        states = {}
        for group in groups:
            with knowing(plans):
                moved, states[group] = rule.update(
                    grads[group], state.inner[group], trained[group], plans=plans
                )
            moved = jax.tree.map(lambda u: -rate * u, moved)
            trained[group] = optax.apply_updates(trained[group], moved)
        count = optax.safe_increment(state.count)
        return state._replace(**trained, inner=states, count=count), value

    def trained(params: PyTree) -> int:
        state = jax.eval_shape(init, params)
        return sum(size(getattr(state, group)) for group in groups)

    def optimizer_bytes(params: PyTree) -> int:
        return nbytes(jax.eval_shape(init, params).inner)

    return Method(init, step, params, trained, optimizer_bytes)


def _effective(plan: LeafPlan, weight: Array, state: PairState) -> Array:
    if plan.mode == "frozen":
        return weight
    if plan.mode == "dense":
        delta = state.dense[plan.path]
    else:
        delta = lift_leaf(state.zero[plan.path], state.drawn[plan.path], plan)
    return (weight.astype(plan.wide_dtype) + delta).astype(weight.dtype)


def _explicit(plans: dict[str, LeafPlan]) -> dict[str, LeafPlan]:
    """The plans of a pair, whose drawn factor is an array whatever law it came from."""
    return {path: dataclasses.replace(plan, sketch="") for path, plan in plans.items()}
