"""One step in factor coordinates: project, run the inner rule, count."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.clip import clipped
from raclora_jax._chain.inner import (
    ADAM,
    as_rule,
    check_inner,
    emitted,
    in_bases,
    knowing,
    restarted,
    same_type,
    together,
)
from raclora_jax._chain.start import Start, by_name
from raclora_jax._chain.state import (
    InnerStates,
    Now,
    Plans,
    RacLoraState,
    SketchCache,
    adapted_plans,
    law_of,
    plan_gradients,
    sketches_now,
)
from raclora_jax._core import checks, paths
from raclora_jax._core.factor import is_factor
from raclora_jax._core.lowrank import (
    change_of_basis,
    project_leaf,
)
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sides import apart, joined
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import as_spec
from raclora_jax._core.types import (
    Drawn,
    FactorValue,
    Leaves,
    Moments,
    OptState,
    PyTree,
    Scalar,
    TreeDef,
)

_MOMENTS: tuple[str, ...] = get_args(Moments)


class Step(NamedTuple):
    """One step in factor coordinates, before learning rate and decay."""

    state: RacLoraState
    plans: dict[str, LeafPlan]
    grads: Leaves
    treedef: TreeDef
    sketches: dict[str, Drawn]
    directions: dict[str, FactorValue]
    emitted: Array

    @property
    def trained(self) -> Leaves:
        """The gradients of the leaves that are trained."""
        return {p: g for p, g in self.grads.items() if self.plans[p].mode != "frozen"}

    def answer(self, updates: Leaves) -> PyTree:
        """The tree of updates, with zeros for the leaves that are not trained."""
        still = {p: jnp.zeros_like(g) for p, g in self.grads.items() if p not in updates}
        both = still | updates
        return paths.unflatten(self.treedef, {p: both[p] for p in self.grads})


@dataclasses.dataclass(frozen=True)
class Run(Start):
    """Everything static about a run: how it starts, and how it goes on.

    Args:
      moments: What a new link does to them: ``"reset"``, ``"keep"`` or ``"transport"``.
    """

    moments: Moments

    @classmethod
    def of(cls, spec: Any, inner: Any, moments: Moments, *, steps_weights: bool) -> Run:
        """The run that users' arguments describe, checked."""
        spec = as_spec(spec)
        checks.choice("moments", moments, _MOMENTS)
        if inner is None:
            inner = ADAM
        else:
            check_inner(inner)
        masters = steps_weights and spec.rounding == "master"
        return cls(spec=spec, inner=inner, masters=masters, moments=moments)

    def step(
        self,
        updates: PyTree,
        state: RacLoraState,
        params: PyTree,
        extra: Leaves,
        clip_norm: Scalar | None,
    ) -> Step:
        """Projects what comes dense, clips, runs the inner rule, and counts."""
        grads, treedef = paths.flatten(updates, is_leaf=is_factor)
        plans = plan_gradients(self.spec, grads, params)
        state, sketches = self.entered(state, plans)
        groups = self._grouped(grads, plans, sketches)
        if clip_norm is not None:
            groups = clipped(groups, by_name(plans.values()), clip_norm)
        directions, inner, went = self.directions(groups, state.inner_state, plans, extra)
        state = self.counted(state._replace(inner_state=inner), went)
        return Step(state, plans, grads, treedef, sketches, directions, went)

    def entered(
        self, state: RacLoraState, plans: dict[str, LeafPlan]
    ) -> tuple[RacLoraState, dict[str, Drawn]]:
        """The state as the link of the next update finds it, and that link's sketches."""
        self.check(state, tuple(plans.values()))
        now = sketches_now(state, plans.values(), self.spec)
        return self._entered(state, now, adapted_plans(plans.values())), now.sketches

    def counted(self, state: RacLoraState, went: Array) -> RacLoraState:
        """The state after an update, or after one that was held back."""
        return state._replace(
            count=jnp.where(went, optax.safe_increment(state.count), state.count),
            step_in_link=state.step_in_link + went.astype(jnp.int32),
        )

    def _grouped(
        self, grads: Leaves, plans: dict[str, LeafPlan], sketches: dict[str, Drawn]
    ) -> dict[str, dict[str, Array]]:
        """Gradients as the inner rule sees them: factors, and leaves trained in full."""
        groups: dict[str, dict[str, Array]] = {"dense": {}, "lowrank": {}}
        for path, grad in grads.items():
            plan = plans[path]
            if is_factor(grad):
                for name, value in apart(plan, grad.value).items():
                    groups["lowrank"][name] = value.astype(plan.wide_dtype)
            elif plan.adapted:
                factor = project_leaf(grad, sketches[path], plan)
                groups["lowrank"].update(apart(plan, factor))
            elif plan.mode == "dense":
                groups["dense"][path] = grad.astype(plan.wide_dtype)
        return groups

    def directions(
        self,
        groups: dict[str, Any],
        inner_state: InnerStates,
        plans: dict[str, LeafPlan],
        extra: Leaves,
    ) -> tuple[dict[str, FactorValue], InnerStates, Array]:
        """One step of the inner rule on each group that has leaves."""
        # Plans go two ways: ``knowing`` for rules behind a wrapper that drops extra
        # arguments, ``plans=`` for a rule under ``vmap`` or a thread of its own.
        rule = as_rule(self.inner).update
        all_named = by_name(plans.values())
        names = [name for name, group in groups.items() if group]
        old = {name: getattr(inner_state, name) for name in names}
        moved, new = {}, {}
        for name in names:
            own = {path: all_named[path] for path in groups[name]}
            with knowing(own):
                moved[name], after = rule(
                    groups[name], old[name], None, **{**extra, "plans": own}
                )
            new[name] = jax.tree.map(same_type, after, old[name])
        moved, new = together(moved, old, new)
        went = jnp.asarray(True)
        for name in names:
            went = emitted(old[name], new[name])
        found = {path: d for group in moved.values() for path, d in group.items()}
        directions = {
            path: joined(plan, found)
            for path, plan in plans.items()
            if plan.mode != "frozen"
        }
        return directions, inner_state._replace(**new), went

    # Compiled as one piece, so that a step outside jit does not trace it anew.
    @functools.partial(jax.jit, static_argnums=(0, 3))
    def _entered(self, state: RacLoraState, now: Now, plans: Plans) -> RacLoraState:
        """The state as the link of the next update finds it."""
        # A select and no branch for a restart: zeros are cheap, and a conditional would
        # hold moments of both outcomes at once. Re-expressing them is not cheap.
        old = state.inner_state.lowrank
        inner, cache = old, state.sketches
        if self.moments == "reset":
            fresh = restarted(old, self.inner_init(plans, "lowrank"))
            inner = _select(now.begins, fresh, old)
        elif self.moments == "transport":
            moved = lax.cond(
                now.begins & ~now.lost,
                lambda: self._transported(state, now, plans),
                lambda: old,
            )
            fresh = restarted(old, self.inner_init(plans, "lowrank"))
            inner = _select(now.begins & now.lost, fresh, moved)
        if self.spec.cache:
            cache = SketchCache(now.link, now.sketches)
        return state._replace(
            link=now.link,
            step_in_link=jnp.where(now.begins, 0, state.step_in_link),
            law=jnp.where(now.begins, law_of(plans), state.law),
            inner_state=state.inner_state._replace(lowrank=inner),
            sketches=cache,
        )

    def _transported(self, state: RacLoraState, now: Now, plans: Plans) -> OptState:
        """The inner state of the factors, its first moments in the new sketches."""

        def drawn() -> dict[str, Drawn]:
            return draw_all(state.key_data, state.link, plans)

        before = drawn()
        if self.spec.cache:
            kept = state.sketches.link == state.link
            before = lax.cond(kept, lambda: state.sketches.values, drawn)
        adapted = by_name(plans)
        new, old = (
            {n: s for plan in plans for n, s in apart(plan, kept[plan.path]).items()}
            for kept in (now.sketches, before)
        )
        bases = {
            path: change_of_basis(new[path], old[path], plan)
            for path, plan in adapted.items()
        }

        return in_bases(state.inner_state.lowrank, bases, adapted)


def _select(chosen: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(chosen, same_type(n, o), o), new, old)
