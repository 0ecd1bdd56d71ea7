"""One step in factor coordinates: project, run the inner rule, count."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._chain.inner import ADAM, check_inner, emitted, same_type
from raclora_jax._chain.state import Chain, RacLoraState
from raclora_jax._core import paths
from raclora_jax._core.keys import key_data
from raclora_jax._core.lowrank import check_factor, is_factor, lift_leaf, project_leaf
from raclora_jax._core.plan import LeafPlan, plan_leaves, plan_tree
from raclora_jax._core.spec import Spec, as_spec

_MOMENTS = ("reset", "keep", "transport")


class Step(NamedTuple):
    """One step in factor coordinates, before learning rate and decay."""

    state: RacLoraState
    plans: dict[str, LeafPlan]
    grads: dict[str, Any]
    treedef: Any
    sketches: dict[str, Array]
    directions: dict[str, Array]
    emitted: Array

    def lifted(self, path: str, value: Array) -> Array:
        """A leaf-shaped delta, whichever way the leaf is trained."""
        if self.plans[path].mode == "dense":
            return value
        return lift_leaf(value, self.sketches[path], self.plans[path])

    def answer(self, one: Callable[[str, Any], Any]) -> Any:
        """The updates tree: ``one(path, grad)`` per trained leaf, zeros for frozen."""

        def each(path: str, grad: Any) -> Any:
            frozen = self.plans[path].mode == "frozen"
            return jnp.zeros_like(grad) if frozen else one(path, grad)

        return paths.unflatten(
            self.treedef, {p: each(p, g) for p, g in self.grads.items()}
        )


@dataclasses.dataclass(frozen=True)
class Core:
    """What both transformations share: init, and a step up to the learning rate."""

    spec: Spec
    chain: Chain
    key_data: Array

    @classmethod
    def of(
        cls, spec: Any, inner: Any, moments: str, key: Any, steps_weights: bool = False
    ) -> Core:
        spec = as_spec(spec)
        if moments not in _MOMENTS:
            known = ", ".join(map(repr, _MOMENTS))
            raise ValueError(f"moments must be one of {known}, got {moments!r}")
        if inner is None:
            inner = ADAM
        else:
            check_inner(inner)
        masters = steps_weights and spec.rounding == "master"
        return cls(spec, Chain(spec, inner, moments, masters), key_data(key))

    def init(self, params: Any) -> RacLoraState:
        if isinstance(params, _placeholder_type()):
            # optax.tree.map_params asks which parts mirror the params: none do.
            zeros: Any = [jnp.zeros((), jnp.int32) for _ in RacLoraState._fields]
            return RacLoraState(*zeros)
        plans = plan_tree(self.spec, params)
        leaves, _ = paths.flatten(params)
        master = self.chain.master_copy(plans, leaves)
        return self.chain.init(self.key_data, tuple(plans.values()), master)

    def step(
        self, updates: Any, state: RacLoraState, params: Any, extra: dict[str, Any]
    ) -> Step:
        grads, treedef = paths.flatten(updates, is_leaf=is_factor)
        plans = _plan_gradients(self.spec, grads, params)
        self.chain.check(state, tuple(plans.values()))
        sketches, state = self.chain.enter_link(state, tuple(plans.values()))
        factors: dict[str, Array] = {}
        dense: dict[str, Array] = {}
        directions: dict[str, Array] = {}
        for path, grad in grads.items():
            plan = plans[path]
            if is_factor(grad):
                factors[path] = grad.value.astype(plan.wide_dtype)
            elif plan.mode == "lowrank":
                factors[path] = project_leaf(grad, sketches[path], plan)
            elif plan.mode == "dense":
                dense[path] = grad.astype(plan.wide_dtype)
        before = after = state.inner_state
        rule = optax.with_extra_args_support(self.chain.inner).update
        went = jnp.asarray(True)
        for field, group in (("dense", dense), ("lowrank", factors)):
            if group:
                old = getattr(before, field)
                moved, new = rule(group, old, None, **extra)
                directions |= moved
                after = after._replace(**{field: jax.tree.map(same_type, new, old)})
                went = emitted(old, new)
        count = jnp.where(went, optax.safe_increment(state.count), state.count)
        state = state._replace(count=count, inner_state=after)
        return Step(state, plans, grads, treedef, sketches, directions, went)


def _plan_gradients(
    spec: Spec, grads: dict[str, Any], params: Any
) -> dict[str, LeafPlan]:
    """Plans the leaves that came with a gradient, by the params where given."""
    like = grads
    if params is not None:
        leaves, _ = paths.flatten(params)
        missing = [path for path in grads if path not in leaves]
        if missing:
            raise ValueError(
                f"the gradient of {paths.show(missing[0])} has no leaf in params; take "
                "gradients with respect to the tree that tx.init saw"
            )
        like = {path: leaves[path] for path in grads}
    elif any(map(is_factor, grads.values())):
        raise ValueError(
            "Factor gradients need params to know their leaves; call "
            "tx.update(grads, state, params)"
        )
    plans = plan_leaves(spec, like)
    for path, grad in grads.items():
        if is_factor(grad):
            check_factor(grad.value, plans[path])
        elif jnp.shape(grad) != plans[path].shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected a gradient of shape "
                f"{plans[path].shape}, got {jnp.shape(grad)}"
            )
    return plans


@functools.cache
def _placeholder_type() -> type:
    """The type optax.tree.map_params calls ``init`` with, asked of itself."""
    seen: list[type] = []

    def init(params: Any) -> tuple[()]:
        seen.append(type(params))
        return ()

    optax.tree.map_params(init, None, ())
    return seen[0]
