"""The state before the first update: made, placed on a mesh, and checked against."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._chain.boxes import boxed, boxes_of
from raclora_jax._chain.inner import knowing
from raclora_jax._chain.state import (
    InnerStates,
    Plans,
    RacLoraState,
    SketchCache,
    adapted_plans,
    check_values,
    law_of,
)
from raclora_jax._core import paths, rounding
from raclora_jax._core.keys import key_data
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sharding import (
    as_explicit,
    explicit_mesh,
    mesh_of,
    on_mesh,
    zeros,
)
from raclora_jax._core.sides import named, zero_sketch
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, Leaves, OptState, PyTree


@dataclasses.dataclass(frozen=True)
class Start:
    """What a new state is made of, and how.

    Args:
      spec: The spec.
      inner: The rule, as the user gave it.
      masters: Whether weights below float32 have a float32 copy in the state.
    """

    spec: Spec
    inner: optax.GradientTransformation
    masters: bool

    def init(self, key: KeyLike, params: PyTree) -> RacLoraState:
        """The state before the first update, every array where it will live."""
        if isinstance(params, _placeholder_type()):
            # optax.tree.map_params asks which parts mirror the params: none do.
            none: Any = [jnp.zeros((), jnp.int32) for _ in RacLoraState._fields]
            return RacLoraState(*none)
        plans = plan_tree(self.spec, params)
        leaves, _ = paths.flatten(params)
        master = self._master_copy(plans, leaves)
        every, data, boxes = tuple(plans.values()), key_data(key), boxes_of(params)
        tell_lacking(every)
        state = _init_of(self, every)(data, master)
        return boxed(state, plans, boxes) if boxes else state

    def inner_init(self, plans: Plans, mode: str) -> OptState:
        """The state of the inner rule for the leaves of one mode."""
        own = by_name(plan for plan in plans if plan.mode == mode)
        start = {
            path: zeros(plan.trained_shape, plan.wide_dtype, plan.trained_sharding)
            for path, plan in own.items()
        }
        with knowing(own):
            return jax.tree.map(jnp.asarray, self.inner.init(start))

    def check(self, state: RacLoraState, plans: Plans) -> None:
        """Refuses a state that was made for other leaves or another spec."""
        bare = tuple(with_sharding(plan, None) for plan in plans)
        want, got = _expected(self, bare), _types(state)
        for where in [*want, *got]:
            if want.get(where) != got.get(where):
                raise ValueError(
                    f"the RAC-LoRA state does not fit this model and spec: at {where} "
                    f"expected {want.get(where, 'nothing')}, got "
                    f"{got.get(where, 'nothing')}; restore it with the spec it was "
                    "written with, or start a new one with tx.init(params)"
                )
        check_values(state)

    # Not compiled without need: a program of ten thousand zeros compiles for minutes.
    def made(self, data: Array, plans: Plans, master: dict[str, Array]) -> RacLoraState:
        """The state from key data, plans and master copies."""
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
            # Nothing is drawn yet: the first function of the run finds the cache stale.
            sketches=SketchCache(jnp.full((), -1, jnp.int32), values),
            master=master,
            skipped=jnp.zeros((), jnp.int32),
        )

    def abstract(self, plans: Plans) -> RacLoraState:
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
            lambda *args: self.made(args[0], plans, args[1]), data, master
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


def by_name(plans: Iterable[LeafPlan]) -> dict[str, LeafPlan]:
    """The plans of what the inner rule sees, by the names it sees them under."""
    return {name: one for plan in plans for name, one in named(plan).items()}


@functools.lru_cache(maxsize=64)
def _init_of(start: Start, plans: Plans) -> Callable[..., RacLoraState]:
    """``made`` for these plans; compiled for the mesh that the leaves are on, if any."""
    mesh = mesh_of({plan.path: plan.sharding for plan in plans})
    if mesh is None:
        return lambda data, master: start.made(data, plans, master)
    said = [with_sharding(p, p.sharding and as_explicit(p.sharding)) for p in plans]
    with jax.sharding.use_abstract_mesh(explicit_mesh(mesh)):
        shapes = start.abstract(tuple(said))
    out = jax.tree.map(lambda leaf: on_mesh(leaf, mesh), shapes)
    bare = tuple(with_sharding(plan, None) for plan in plans)
    return jax.jit(lambda data, master: start.made(data, bare, master), out_shardings=out)


@functools.lru_cache(maxsize=64)
def _expected(start: Start, plans: Plans) -> dict[str, str]:
    return _types(start.abstract(plans))


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


def tell_lacking(plans: Iterable[LeafPlan]) -> None:
    """One warning for all arrays held in full along mesh axes of their leaves."""
    found = [
        f"the {what} of {paths.show(plan.path)} {shape} along {', '.join(place.lacking)}"
        for plan in plans
        if plan.adapted and plan.sharding is not None
        for one in plan.each
        for what, shape, place in (
            ("factor", one.factor_shape, one.factor_inherited),
            ("sketch", one.sketch_shape, one.sketch_inherited),
        )
        if place is not None and place.lacking
    ]
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        warnings.warn(
            "these arrays are held in full along mesh axes of their leaves, which divide "
            f"none of their axes: {'; '.join(found[:8])}{more}; a mesh with shorter axes "
            "would shard them",
            stacklevel=3,
        )
