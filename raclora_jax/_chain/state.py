"""The chain's state: what it holds, where it stands, and the sketches of now."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import DictKey, GetAttrKey

from raclora_jax._chain.boxes import unboxed
from raclora_jax._chain.inner import nothing_accumulated
from raclora_jax._core import paths
from raclora_jax._core.factor import check_factor, is_factor
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_leaves
from raclora_jax._core.sides import named, shapes, sketch_shapes
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import Drawn, Leaf, Leaves, OptState, PyTree

# The plans of a tree's leaves: static and hashable.
Plans = tuple[LeafPlan, ...]


class InnerStates(NamedTuple):
    """Two states of the same inner rule.

    Attributes:
      lowrank: State for the factors, ``{path: factor}``; a new link restarts it. A leaf
        whose side is drawn has two, ``path/left`` and ``path/right``.
      dense: State for the leaves trained in full, ``{path: leaf}``.
    """

    lowrank: OptState
    dense: OptState


class SketchCache(NamedTuple):
    """The sketches of one link; derived, so a checkpoint may drop them.

    Attributes:
      link: int32 scalar, the link the values were drawn for; -1 if there are none.
      values: ``{path: sketch}``; where the side is drawn both sketches, and
        ``is_left``, which says which of them is in use.
    """

    link: Array
    values: dict[str, Drawn]


class RacLoraState(NamedTuple):
    """State of ``raclora`` and ``scale_by_raclora``: arrays only, keyed by path.

    Attributes:
      count: int32 scalar, updates emitted so far.
      link: int32 scalar, the link of the last update.
      step_in_link: int32 scalar, updates emitted in that link.
      law: uint32 scalar, which laws the sketches of that link came from. A run that is
        resumed under another law cannot draw them again, and must know it.
      key_data: uint32 of shape (2,), all the randomness there is.
      inner_state: ``InnerStates`` of the inner rule.
      sketches: ``SketchCache``; it holds no values under ``Spec(cache=False)``.
      master: ``{path: float32 weight}`` under ``rounding="master"``, else empty.
      skipped: int32 scalar, how often a fused step left a matrix as it was, for a loss
        or a gradient that was not finite.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    link: Array
    step_in_link: Array
    law: Array
    key_data: Array
    inner_state: InnerStates
    sketches: SketchCache
    master: dict[str, Array]
    skipped: Array


class Now(NamedTuple):
    """Where the next update finds the chain.

    Attributes:
      link: int32 scalar, its link.
      begins: Whether it is the first of that link.
      lost: Whether the sketches of the link before are neither kept nor known.
      sketches: ``{path: sketch}`` of its link.
    """

    link: Array
    begins: Array
    lost: Array
    sketches: dict[str, Drawn]


def sketches_now(state: RacLoraState, plans: Iterable[LeafPlan], spec: Spec) -> Now:
    """The link that the next update belongs to, and its sketches.

    A link ends once it has had ``spec.resample_every`` updates. Its sketches are those
    the state keeps, or are drawn again. A run resumed with another law goes on
    with the ones kept; where none are, they cannot be drawn again and a link begins.

    Every function of a run calls it with the same arrays: a compiled step draws once.
    """
    adapted = adapted_plans(plans)
    return _sketches_now(
        state.link,
        state.step_in_link,
        state.law,
        nothing_accumulated(state.inner_state.lowrank),
        state.key_data,
        state.sketches,
        adapted,
        spec.resample_every,
        spec.cache,
    )


# Traced and lowered once, whichever functions of the run a program has.
@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _sketches_now(
    link: Array,
    step_in_link: Array,
    law: Array,
    idle: Array,
    data: Array,
    kept: SketchCache,
    plans: Plans,
    resample_every: int,
    cache: bool,
) -> Now:
    lost = (law != law_of(plans)) & (kept.link != link)
    begins = lost | ((step_in_link >= resample_every) & idle)
    link = jnp.where(begins, next_of(link), link)
    if not cache:
        # Fused into its use, a sketch would round otherwise than a cached one.
        drawn = lax.optimization_barrier(draw_all(data, link, plans))
        return Now(link, begins, lost, drawn)
    sketches = lax.cond(
        kept.link == link, lambda: kept.values, lambda: draw_all(data, link, plans)
    )
    return Now(link, begins, lost, sketches)


def next_of(link: Array) -> Array:
    """The link after one; past the last number the sketches are drawn from 0 on again."""
    return jnp.where(link == jnp.iinfo(link.dtype).max, 0, link + 1)


def adapted_plans(plans: Iterable[LeafPlan]) -> Plans:
    """The plans of the adapted leaves, in one order whatever the tree."""
    return tuple(sorted((p for p in plans if p.adapted), key=lambda plan: plan.path))


@functools.lru_cache(maxsize=64)
def _law_word(plans: Plans) -> int:
    """32 bits that tell which law each sketch is drawn from."""
    said = "\n".join(
        f"{plan.path} {plan.law}" + ("" if plan.chance is None else f" {plan.chance}")
        for plan in plans
        if plan.adapted
    )
    digest = hashlib.sha256(said.encode()).digest()
    return int.from_bytes(digest[:4], "big")


def law_of(plans: Plans) -> Array:
    """``_law_word`` as the uint32 scalar that a state holds."""
    return jnp.asarray(_law_word(plans), jnp.uint32)


def find_state(opt_state: PyTree) -> RacLoraState:
    """The one ``RacLoraState`` anywhere inside an optimizer state.

    Args:
      opt_state: State of any optax transformation.

    Returns:
      The ``RacLoraState``.

    Raises:
      ValueError: If there is none, or more than one.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one RacLoraState, found {len(found)}; pass what "
            "tx.init or tx.update returned, where tx contains raclora(...) once"
        )
    state: RacLoraState = unboxed(found[0])
    return state


def is_state(node: Leaf) -> bool:
    """Whether a node is a ``RacLoraState``, for ``is_leaf``."""
    return isinstance(node, RacLoraState)


def check_leaves(state: RacLoraState, plans: dict[str, LeafPlan], spec: Spec) -> None:
    """Refuses a state whose sketches or moments belong to other leaves or plans."""
    adapted = {path: plan for path, plan in plans.items() if plan.adapted}
    way_out = (
        "pass the spec that raclora(...) was given, and the state of tx.init for these "
        "params"
    )
    for path, sketch in state.sketches.values.items():
        want = sketch_shapes(adapted[path]) if path in adapted else None
        if shapes(sketch) != want:
            expected = "none" if want is None else f"one of shape {want}"
            raise ValueError(
                f"leaf {paths.show(path)}: opt_state holds a sketch of shape "
                f"{shapes(sketch)}, this spec and these params expect {expected}; "
                f"{way_out}"
            )
    names = {name for plan in adapted.values() for name in named(plan)}
    # A rule of some leaves, as under ``masked``, holds nothing of the others.
    for path in sorted(_held(state.inner_state.lowrank) - names):
        raise ValueError(
            f"leaf {paths.show(path)} is adapted in opt_state but not in these params; "
            f"{way_out}"
        )
    dense = {path for path, plan in plans.items() if plan.mode == "dense"}
    for path in sorted(_held(state.inner_state.dense) - dense):
        raise ValueError(
            f"leaf {paths.show(path)} is trained in full in opt_state but not in these "
            f"params; {way_out}"
        )
    for path in adapted:
        if spec.cache and path not in state.sketches.values:
            raise ValueError(
                f"leaf {paths.show(path)} is adapted in this spec, but opt_state has no "
                f"sketch for it; {way_out}"
            )


def _held(inner_state: OptState) -> set[str]:
    """The leaves that a state of the inner rule holds something of."""
    return {
        str(keypath[-1].key)
        for keypath, _ in jax.tree_util.tree_leaves_with_path(inner_state)
        if isinstance(keypath[-1], DictKey) and not _is_hyperparam(keypath)
    }


def _is_hyperparam(keypath: tuple[Any, ...]) -> bool:
    """Whether ``inject_hyperparams`` holds it, by a name that is no leaf's."""
    fields = (key.name for key in keypath if isinstance(key, GetAttrKey))
    return any(name.startswith("hyperparams") for name in fields)


def plan_gradients(spec: Spec, grads: Leaves, params: PyTree) -> dict[str, LeafPlan]:
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
            check_factor(grad, plans[path])
        elif jnp.shape(grad) != plans[path].shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected a gradient of shape "
                f"{plans[path].shape}, got {jnp.shape(grad)}"
            )
    return plans


def check_values(state: RacLoraState) -> None:
    """Refuses numbers that no run can have written; traced ones cannot be looked at."""

    def known(value: Leaf) -> bool:
        return not isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)

    def finite(value: Array) -> bool:
        # Known values may be closed over by a trace, in which jnp is traced too.
        with jax.ensure_compile_time_eval():
            return bool(jnp.all(jnp.isfinite(value)))

    way_out = "the checkpoint is damaged: restore another, or start anew with tx.init"
    for name in ("count", "link", "step_in_link", "skipped"):
        value = getattr(state, name)
        if known(value) and int(value) < 0:
            raise ValueError(f"the RAC-LoRA state has {name}={int(value)}; {way_out}")
    for path, sketch in state.sketches.values.items():
        if not all(finite(one) for one in jax.tree.leaves(sketch) if known(one)):
            raise ValueError(
                f"leaf {paths.show(path)}: its cached sketch holds NaN or infinity; "
                f"{way_out}"
            )
