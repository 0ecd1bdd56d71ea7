"""The chain's state: what it holds, how it starts, and what a new link does to it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.tree_util import DictKey, GetAttrKey

from raclora_jax._chain.inner import keep_gradient_steps, nothing_accumulated, same_type
from raclora_jax._core import paths, rounding
from raclora_jax._core.lowrank import change_of_basis, in_basis
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec

# The plans of a tree's leaves, in tree order: static and hashable.
Plans = tuple[LeafPlan, ...]

# Fields of optax states that hold a first moment: linear in the gradient, so that a
# change of basis carries them over.
_FIRST_MOMENTS = ("mu", "trace", "momentum")


class InnerStates(NamedTuple):
    """Two states of the same inner rule.

    Attributes:
      lowrank: State for the factors, ``{path: factor}``; a new link restarts it.
      dense: State for the leaves trained in full, ``{path: leaf}``.
    """

    lowrank: Any
    dense: Any


class SketchCache(NamedTuple):
    """The sketches of one link; derived, so a checkpoint may drop them.

    Attributes:
      link: int32 scalar, the link the values were drawn for; -1 if there are none.
      values: ``{path: sketch}``.
    """

    link: Array
    values: dict[str, Array]


class RacLoraState(NamedTuple):
    """State of ``raclora`` and ``scale_by_raclora``: arrays only, keyed by path.

    Attributes:
      count: int32 scalar, updates emitted so far; the running link is
        ``count // resample_every``.
      key_data: uint32 of shape (2,), all the randomness there is.
      inner_state: ``InnerStates`` of the inner rule.
      sketches: ``SketchCache``; it holds no values under ``Spec(cache=False)``.
      master: ``{path: float32 weight}`` under ``rounding="master"``, else empty.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    key_data: Array
    inner_state: InnerStates
    sketches: SketchCache
    master: dict[str, Array]


def link_of(count: Array, spec: Spec) -> Array:
    """The link that an update with this count belongs to, int32 scalar."""
    return jnp.asarray(count) // spec.resample_every


@dataclasses.dataclass(frozen=True)
class Chain:
    """A spec, an inner rule, and what happens to its moments at a new link.

    Args:
      spec: The spec.
      inner: The rule, as the user gave it.
      moments: ``"reset"``, ``"keep"`` or ``"transport"``.
      masters: Whether weights below float32 have a float32 copy in the state.
    """

    spec: Spec
    inner: optax.GradientTransformation
    moments: str
    masters: bool

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def init(self, data: Array, plans: Plans, master: dict[str, Array]) -> RacLoraState:
        """The state before the first update, from shapes and dtypes alone."""
        values = {
            plan.path: jnp.zeros(plan.sketch_shape, plan.wide_dtype)
            for plan in plans
            if plan.mode == "lowrank" and self.spec.cache
        }
        inner_state = InnerStates(
            self._inner_init(plans, "lowrank"), self._inner_init(plans, "dense")
        )
        # Nothing is drawn yet: the first update finds the cache stale and fills it.
        cache = SketchCache(jnp.full((), -1, jnp.int32), values)
        return RacLoraState(jnp.zeros((), jnp.int32), data, inner_state, cache, master)

    # Compiled as one piece, so that a step outside jit does not trace its cond anew.
    @functools.partial(jax.jit, static_argnums=(0, 2))
    def enter_link(
        self, state: RacLoraState, plans: Plans
    ) -> tuple[dict[str, Array], RacLoraState]:
        """The sketches of the running link, and the state as that link finds it.

        Everything a new link changes sits in one scalar ``cond`` whose outputs are
        factor-sized. A cache that was dropped is filled again by the same branch.
        """
        link = link_of(state.count, self.spec)
        stale = state.sketches.link != link
        begins = (state.count > 0) & (state.count % self.spec.resample_every == 0)
        begins &= nothing_accumulated(state.inner_state.lowrank)
        # A mini-step that MultiSteps skips comes again: a second reset changes nothing,
        # a second transport would.
        again = stale if self.moments == "transport" else self.moments == "reset"
        restarts = begins & again

        def refresh(cache: SketchCache, inner: Any) -> tuple[SketchCache, Any]:
            values = draw_all(state.key_data, link, plans) if self.spec.cache else {}
            fresh = self._carry(state, inner, plans)
            inner = jax.tree.map(
                lambda new, old: lax.select(restarts, same_type(new, old), old),
                fresh,
                inner,
            )
            return SketchCache(link, values), inner

        def stay(cache: SketchCache, inner: Any) -> tuple[SketchCache, Any]:
            return cache, inner

        cache, inner = lax.cond(
            (stale & self.spec.cache) | restarts,
            refresh,
            stay,
            state.sketches,
            state.inner_state.lowrank,
        )
        inner_state = state.inner_state._replace(lowrank=inner)
        state = state._replace(sketches=cache, inner_state=inner_state)
        if self.spec.cache:
            return cache.values, state
        # Fused into its use, a sketch would round otherwise than a cached one.
        return lax.optimization_barrier(draw_all(state.key_data, link, plans)), state

    def check(self, state: RacLoraState, plans: Plans) -> None:
        """Refuses a state that was made for other leaves or another spec."""
        want = self._expected(plans)
        got = _shapes(state)
        for where in [*want, *got]:
            if want.get(where) != got.get(where):
                raise ValueError(
                    f"the RAC-LoRA state does not fit this model and spec: at {where} "
                    f"expected {_shown(want.get(where))}, got "
                    f"{_shown(got.get(where))}; restore it with the spec it was "
                    "written with, or start a new one with tx.init(params)"
                )

    @functools.lru_cache(maxsize=64)  # noqa: B019, a chain is a value
    def _expected(self, plans: Plans) -> dict[str, tuple[int, ...]]:
        data = jax.ShapeDtypeStruct((2,), jnp.uint32)
        master = {
            plan.path: jax.ShapeDtypeStruct(plan.shape, plan.wide_dtype)
            for plan in plans
            if self.has_master(plan)
        }
        init = jax.eval_shape(
            lambda *args: self.init(args[0], plans, args[1]), data, master
        )
        return _shapes(init)

    def has_master(self, plan: LeafPlan) -> bool:
        """Whether the state holds a float32 copy of this leaf."""
        return self.masters and plan.mode != "frozen" and rounding.is_low(plan.dtype)

    def master_copy(
        self, plans: dict[str, LeafPlan], leaves: dict[str, Any]
    ) -> dict[str, Array]:
        """The float32 copies a run starts with."""
        copies = {}
        for path, plan in plans.items():
            if not self.has_master(plan):
                continue
            if isinstance(leaves[path], jax.ShapeDtypeStruct):
                raise TypeError(
                    f"leaf {paths.show(path)} is abstract, but rounding='master' copies "
                    "the weights; use jax.eval_shape(tx.init, params)"
                )
            copies[path] = jnp.asarray(leaves[path], plan.wide_dtype)
        return copies

    def _inner_init(self, plans: Plans, mode: str) -> Any:
        zeros = {
            plan.path: jnp.zeros(
                plan.factor_shape if mode == "lowrank" else plan.shape, plan.wide_dtype
            )
            for plan in plans
            if plan.mode == mode
        }
        return jax.tree.map(jnp.asarray, self.inner.init(zeros))

    def _carry(self, state: RacLoraState, inner: Any, plans: Plans) -> Any:
        """The inner state of the factors as a new link starts with it."""
        if self.moments == "reset":
            return keep_gradient_steps(inner, self._inner_init(plans, "lowrank"))
        link = link_of(state.count, self.spec)
        adapted = {plan.path: plan for plan in plans if plan.mode == "lowrank"}
        new = draw_all(state.key_data, link, plans)
        old = draw_all(state.key_data, jnp.maximum(link - 1, 0), plans)
        bases = {
            path: change_of_basis(new[path], old[path], plan)
            for path, plan in adapted.items()
        }

        def transport(keypath: tuple[Any, ...], leaf: Array) -> Array:
            match keypath[-2:]:
                case (GetAttrKey(name=name), DictKey(key=path)):
                    if name in _FIRST_MOMENTS and path in bases:
                        return in_basis(bases[path], leaf, adapted[path])
            return leaf

        return jax.tree_util.tree_map_with_path(transport, inner)


def find_state(opt_state: Any) -> RacLoraState:
    """The one ``RacLoraState`` anywhere inside an optimizer state.

    Args:
      opt_state: State of any optax transformation.

    Returns:
      The ``RacLoraState``.

    Raises:
      ValueError: If there is none, or more than one.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, RacLoraState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one RacLoraState, found {len(found)}; pass what "
            "tx.init or tx.update returned, where tx contains raclora(...) once"
        )
    return found[0]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in pairs}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"an array of shape {shape}"
