"""One step in factor coordinates: project, run the inner rule, count."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.boxes import boxed, boxes_of
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
from raclora_jax._chain.start import tell_lacking
from raclora_jax._chain.state import (
    InnerStates,
    Now,
    Plans,
    RacLoraState,
    SketchCache,
    adapted_plans,
    check_values,
    law_of,
    plan_gradients,
    sketches_now,
)
from raclora_jax._core import paths, rounding
from raclora_jax._core.factor import is_factor
from raclora_jax._core.keys import key_data
from raclora_jax._core.lowrank import (
    change_of_basis,
    lift_leaf,
    project_leaf,
)
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sharding import (
    as_explicit,
    explicit_mesh,
    mesh_of,
    on_mesh,
    zeros,
)
from raclora_jax._core.sides import apart, joined, named, zero_sketch
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import (
    Drawn,
    FactorValue,
    KeyLike,
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

    def lifted(self, path: str, value: FactorValue) -> Array:
        """A leaf-shaped delta, whichever way the leaf is trained."""
        if self.plans[path].mode == "dense":
            return value
        return lift_leaf(value, self.sketches[path], self.plans[path])

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
class Run:
    """Everything static about a run, and what both transformations do with it.

    Args:
      spec: The spec.
      inner: The rule, as the user gave it.
      moments: What a new link does to them: ``"reset"``, ``"keep"`` or ``"transport"``.
      masters: Whether weights below float32 have a float32 copy in the state.
    """

    spec: Spec
    inner: optax.GradientTransformation
    moments: Moments
    masters: bool

    @classmethod
    def of(cls, spec: Any, inner: Any, moments: Moments, *, steps_weights: bool) -> Run:
        """The run that users' arguments describe, checked."""
        spec = as_spec(spec)
        if moments not in _MOMENTS:
            known = ", ".join(map(repr, _MOMENTS))
            raise ValueError(f"moments must be one of {known}, got {moments!r}")
        if inner is None:
            inner = ADAM
        else:
            check_inner(inner)
        return cls(spec, inner, moments, steps_weights and spec.rounding == "master")

    def init(self, key: KeyLike, params: PyTree) -> RacLoraState:
        """The state before the first update."""
        if isinstance(params, _placeholder_type()):
            # optax.tree.map_params asks which parts mirror the params: none do.
            none: Any = [jnp.zeros((), jnp.int32) for _ in RacLoraState._fields]
            return RacLoraState(*none)
        plans = plan_tree(self.spec, params)
        leaves, _ = paths.flatten(params)
        master = self._master_copy(plans, leaves)
        every, data = tuple(plans.values()), key_data(key)
        boxes = boxes_of(params)
        state = self._placed(every, data, master)
        return boxed(state, plans, boxes) if boxes else state

    def _placed(
        self, plans: Plans, data: Array, master: dict[str, Array]
    ) -> RacLoraState:
        """``_init``, with every array where it will live."""
        tell_lacking(plans)
        if mesh_of({plan.path: plan.sharding for plan in plans}) is None:
            return self._init(data, plans, master)
        return self._born(plans)(data, master)

    @functools.lru_cache(maxsize=64)  # noqa: B019, a run is a value
    def _born(self, plans: Plans) -> Callable[..., RacLoraState]:
        """``_init`` compiled for the mesh that the leaves are on."""
        mesh = mesh_of({plan.path: plan.sharding for plan in plans})
        assert mesh is not None
        said = [with_sharding(p, p.sharding and as_explicit(p.sharding)) for p in plans]
        with jax.sharding.use_abstract_mesh(explicit_mesh(mesh)):
            shapes = self._abstract(tuple(said))
        out = jax.tree.map(lambda leaf: on_mesh(leaf, mesh), shapes)
        bare = tuple(with_sharding(plan, None) for plan in plans)
        return jax.jit(
            lambda data, master: self._init(data, bare, master), out_shardings=out
        )

    # Not compiled without need: a program of ten thousand zeros compiles for minutes.
    def _init(self, data: Array, plans: Plans, master: dict[str, Array]) -> RacLoraState:
        values = {
            plan.path: zero_sketch(plan)
            for plan in plans
            if plan.adapted and self.spec.cache
        }
        lowrank, dense = (self.inner_init(plans, mode) for mode in ("lowrank", "dense"))
        return RacLoraState(
            count=jnp.zeros((), jnp.int32),
            link=jnp.zeros((), jnp.int32),
            step_in_link=jnp.zeros((), jnp.int32),
            law=law_of(adapted_plans(plans)),
            key_data=jnp.array(data),  # a copy: states are donated
            inner_state=InnerStates(lowrank, dense),
            # Nothing is drawn yet: the first door finds the cache stale.
            sketches=SketchCache(jnp.full((), -1, jnp.int32), values),
            master=master,
            skipped=jnp.zeros((), jnp.int32),
        )

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
            groups = clipped(groups, _named(plans.values()), clip_norm)
        directions, inner, went = self.directions(groups, state.inner_state, plans, extra)
        state = self.counted(state._replace(inner_state=inner), went)
        return Step(state, plans, grads, treedef, sketches, directions, went)

    def entered(
        self, state: RacLoraState, plans: dict[str, LeafPlan]
    ) -> tuple[RacLoraState, dict[str, Drawn]]:
        """The state as the link of the next update finds it, and that link's sketches."""
        self._check(state, tuple(plans.values()))
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
        rule = as_rule(self.inner).update
        all_named = _named(plans.values())
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
        adapted = _named(plans)
        new, old = (
            {n: s for plan in plans for n, s in apart(plan, kept[plan.path]).items()}
            for kept in (now.sketches, before)
        )
        bases = {
            path: change_of_basis(new[path], old[path], plan)
            for path, plan in adapted.items()
        }

        return in_bases(state.inner_state.lowrank, bases, adapted)

    def inner_init(self, plans: Plans, mode: str) -> OptState:
        own = _named(plan for plan in plans if plan.mode == mode)
        start = {
            path: zeros(plan.trained_shape, plan.wide_dtype, plan.trained_sharding)
            for path, plan in own.items()
        }
        with knowing(own):
            return jax.tree.map(jnp.asarray, self.inner.init(start))

    def _check(self, state: RacLoraState, plans: Plans) -> None:
        """Refuses a state that was made for other leaves or another spec."""
        bare = tuple(with_sharding(plan, None) for plan in plans)
        want, got = self._expected(bare), _types(state)
        for where in [*want, *got]:
            if want.get(where) != got.get(where):
                raise ValueError(
                    f"the RAC-LoRA state does not fit this model and spec: at {where} "
                    f"expected {want.get(where, 'nothing')}, got "
                    f"{got.get(where, 'nothing')}; restore it with the spec it was "
                    "written with, or start a new one with tx.init(params)"
                )
        check_values(state)

    @functools.lru_cache(maxsize=64)  # noqa: B019, a run is a value
    def _expected(self, plans: Plans) -> dict[str, str]:
        return _types(self._abstract(plans))

    def _abstract(self, plans: Plans) -> RacLoraState:
        """The state before the first update, as shapes."""
        data = jax.ShapeDtypeStruct((2,), jnp.uint32)
        master = {
            plan.path: jax.ShapeDtypeStruct(
                plan.shape, plan.wide_dtype, sharding=plan.sharding
            )
            for plan in plans
            if self._has_master(plan)
        }
        shapes: RacLoraState = jax.eval_shape(
            lambda *args: self._init(args[0], plans, args[1]), data, master
        )
        return shapes

    def _has_master(self, plan: LeafPlan) -> bool:
        """Whether the state holds a float32 copy of this leaf."""
        return self.masters and plan.mode != "frozen" and rounding.is_low(plan.dtype)

    def _master_copy(
        self, plans: dict[str, LeafPlan], leaves: Leaves
    ) -> dict[str, Array]:
        """The float32 copies a run starts with."""
        copies = {}
        for path, plan in plans.items():
            if not self._has_master(plan):
                continue
            if isinstance(leaves[path], jax.ShapeDtypeStruct):
                raise TypeError(
                    f"leaf {paths.show(path)} is abstract, but rounding='master' copies "
                    "the weights; use jax.eval_shape(tx.init, params)"
                )
            copies[path] = jnp.asarray(leaves[path], plan.wide_dtype)
        return copies


def _named(plans: Iterable[LeafPlan]) -> dict[str, LeafPlan]:
    """The plans of what the inner rule sees, by the names it sees them under."""
    return {name: one for plan in plans for name, one in named(plan).items()}


def _select(chosen: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(chosen, same_type(n, o), o), new, old)


def _types(tree: PyTree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)} of shape {jnp.shape(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def _placeholder_type() -> type:
    """The type optax.tree.map_params calls ``init`` with, asked of itself."""
    seen: list[type] = []

    def init(params: PyTree) -> tuple[()]:
        seen.append(type(params))
        return ()

    optax.tree.map_params(init, None, ())
    return seen[0]
