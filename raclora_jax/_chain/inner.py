"""What the library knows of the optax rule inside it."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.tree_util import DictKey, GetAttrKey

from raclora_jax._core.lowrank import in_basis
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Leaf, OptState, PyTree

# One object: what is compiled for a rule is found again by the rule's identity, also when
# optax.inject_hyperparams builds the transformation anew in every step.
ADAM = optax.scale_by_adam()

# Fields of optax states that hold a first moment: linear in the gradient, so that a
# change of basis carries them over.
_FIRST_MOMENTS = ("mu", "trace", "momentum")

# What a rule is tried on before it is used: a factor (2, 2), since rules such as
# ``orthogonal`` know matrices, of a plan like those they will be handed.
PROBE = LeafPlan(
    path="probe",
    shape=(4, 2),
    dtype="float32",
    mode="lowrank",
    rows=(0,),
    cols=(1,),
    side="left",
    rank=2,
    law="orthonormal",
)

# ``update`` hands plans over as an extra argument, which ``init`` of optax has not, and
# which a user's wrapper may drop.
_PLANS: contextvars.ContextVar[dict[str, LeafPlan] | None] = contextvars.ContextVar(
    "plans", default=None
)


@contextlib.contextmanager
def knowing(plans: dict[str, LeafPlan]) -> Iterator[None]:
    """Lets an inner rule know the plans of its leaves while it is called."""
    token = _PLANS.set(plans)
    try:
        yield
    finally:
        _PLANS.reset(token)


def known_plans() -> dict[str, LeafPlan] | None:
    """The plans of the leaves a rule is called for; ``None`` outside ``raclora``."""
    return _PLANS.get()


def as_rule(inner: Any) -> optax.GradientTransformationExtraArgs:
    """An inner rule as what takes extra arguments, and drops those it does not know."""
    kinds = [p.kind for p in inspect.signature(inner.update).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        # MultiSteps takes them without saying so by its type.
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    return optax.with_extra_args_support(inner)


def check_inner(inner: object) -> None:
    """Refuses an inner rule that needs params or carries a learning rate.

    Args:
      inner: What the user passed.

    Raises:
      TypeError: If it is no optax transformation.
      ValueError: If it cannot step without params, or answers a constant positive
        gradient with a negative update.
    """
    if not hasattr(inner, "init") or not hasattr(inner, "update"):
        raise TypeError(
            f"inner must be an optax transformation, got {type(inner).__name__}; pass "
            "for example optax.scale_by_adam()"
        )
    rule = as_rule(inner)
    gradient = {PROBE.path: jnp.ones(PROBE.factor_shape, jnp.float32)}
    plans = {PROBE.path: PROBE}

    def probe() -> Array:
        def advance(carry: PyTree) -> PyTree:
            count, state, _ = carry
            with knowing(plans):
                update, new = rule.update(gradient, state, None, plans=plans)
            return count + 1, jax.tree.map(same_type, new, state), update[PROBE.path]

        def waits(carry: PyTree) -> Array:
            count, _, update = carry
            return (count < 4096) & jnp.all(update == 0)

        with knowing(plans):
            start = jax.tree.map(jnp.asarray, rule.init(gradient))
        first = advance((jnp.zeros((), jnp.int32), start, None))
        # MultiSteps holds updates back, and a warm-up may begin at zero.
        return lax.while_loop(waits, advance, first)[2]

    try:
        with jax.ensure_compile_time_eval():
            answer = probe()
    except Exception as error:
        raise ValueError(
            "inner could not take a step without params "
            f"({type(error).__name__}: {error}); use a preconditioner that needs none, "
            "such as optax.scale_by_adam(), and raclora's weight_decay for decay"
        ) from error
    if not isinstance(answer, jax.core.Tracer) and bool(jnp.any(answer < 0)):
        raise ValueError(
            "inner answered a positive gradient with a negative update, so it carries a "
            "learning rate; pass the preconditioner alone, optax.scale_by_adam() in "
            "place of optax.adam(...), and the rate as learning_rate"
        )


def emitted(before: OptState, after: OptState) -> Array:
    """Whether the inner rule let an update through; ``MultiSteps`` holds some back."""
    pairs = zip(_multi_steps(before), _multi_steps(after), strict=True)
    flags = [old.gradient_step != new.gradient_step for old, new in pairs]
    return jnp.all(jnp.asarray(flags)) if flags else jnp.asarray(True)


def together(moved: PyTree, old: OptState, new: OptState) -> tuple[PyTree, OptState]:
    """Lets no group step where ``MultiSteps`` skipped a mini-step of another.

    Factors and dense leaves have an inner state each. With one gradient that is not
    finite, ``should_skip_update_fn`` skips its own group alone: the groups would then
    emit at different mini-steps for the rest of the run.

    Args:
      moved: ``{group: directions}``.
      old: ``{group: inner state}`` before the step.
      new: ``{group: inner state}`` after it.

    Returns:
      ``(moved, new)``; after a skip no direction and no state but what the skip itself
      wrote down.
    """
    skips = {group: _skipped(old[group], new[group]) for group in new}
    if all(skip is None for skip in skips.values()) or len(skips) < 2:
        return moved, new
    flags = {g: jnp.asarray(False) if s is None else s for g, s in skips.items()}
    any_skipped = jnp.any(jnp.stack([*flags.values()]))

    def held(group: str) -> OptState:
        back = any_skipped & ~flags[group]
        return jax.tree.map(
            lambda before, after: jnp.where(back, before, after), old[group], new[group]
        )

    still = jax.tree.map(lambda d: jnp.where(any_skipped, 0, d), moved)
    return still, {group: held(group) for group in new}


def _skipped(before: OptState, after: OptState) -> Array | None:
    """Whether a mini-step was skipped; ``None`` if the rule accumulates nothing."""
    flags = [
        (old.gradient_step == new.gradient_step) & (old.mini_step == new.mini_step)
        for old, new in zip(_multi_steps(before), _multi_steps(after), strict=True)
    ]
    return jnp.any(jnp.asarray(flags)) if flags else None


def nothing_accumulated(inner: OptState) -> Array:
    """Whether no mini-step of ``MultiSteps`` waits for the next emission."""
    flags = [node.mini_step == 0 for node in _multi_steps(inner)]
    return jnp.all(jnp.asarray(flags)) if flags else jnp.asarray(True)


def restarted(old: OptState, fresh: OptState) -> OptState:
    """A fresh state for a new link, with what no link ends.

    That is the schedule of how much ``MultiSteps`` accumulates, moments of the side that
    no sketch touches, noise with its key, and the numbers of ``inject_hyperparams``.
    """

    def outlives(node: Leaf) -> bool:
        return isinstance(node, _OUTLIVING)

    def one(old: OptState, fresh: OptState) -> OptState:
        if _is_multi_steps(old):
            inner = restarted(old.inner_opt_state, fresh.inner_opt_state)
            return fresh._replace(gradient_step=old.gradient_step, inner_opt_state=inner)
        if isinstance(old, OrthogonalState):
            return fresh._replace(count=old.count, second_moment=old.second_moment)
        if isinstance(old, optax.AddNoiseState):
            return old
        if isinstance(old, optax.InjectStatefulHyperparamsState):
            inner = restarted(old.inner_state, fresh.inner_state)
            return fresh._replace(hyperparams=old.hyperparams, inner_state=inner)
        return fresh

    return jax.tree.map(one, old, fresh, is_leaf=outlives)


def in_bases(
    inner: OptState, bases: dict[str, Array], plans: dict[str, LeafPlan]
) -> OptState:
    """An inner state with its first moments in new coordinates, all else as it was.

    Args:
      inner: State of a rule for ``{path: factor}``.
      bases: ``{path: change_of_basis(...)}``.
      plans: ``{path: LeafPlan}`` of the same leaves.

    Returns:
      The state.
    """

    def moved(keypath: tuple[Any, ...], leaf: Array) -> Array:
        match keypath[-2:]:
            case (GetAttrKey(name=name), DictKey(key=path)):
                if name in _FIRST_MOMENTS and path in bases:
                    return in_basis(bases[path], leaf, plans[path])
        return leaf

    return jax.tree_util.tree_map_with_path(moved, inner)


class OrthogonalState(NamedTuple):
    """State of ``orthogonal``: without options it holds nothing for a factor.

    Attributes:
      adam: Adam's state for the leaves that are trained in full.
      momentum: ``{path: array of the factor's shape}``, or empty.
      count: int32 scalar if there is a second moment, else empty.
      second_moment: ``{path: array (batch..., *axes of the other side)}``, or empty. Its
        axes are those no sketch touches, so a new link keeps it.
      seen: int32 scalar, the steps of the link, if there is a memory, else empty.
      gram: ``{path: array (batch..., short, short)}``, the mean of the link's Gram
        matrices in squares of the units, or empty.
      unit: ``{path: array (batch...,)}``, the largest entry of the link's gradients, or
        empty.
    """

    adam: OptState
    momentum: dict[str, Array]
    count: OptState
    second_moment: dict[str, Array]
    seen: OptState
    gram: dict[str, Array]
    unit: dict[str, Array]


_OUTLIVING = (
    OrthogonalState,
    optax.AddNoiseState,
    optax.InjectStatefulHyperparamsState,
    optax.MultiStepsState,
)


def same_type(new: Leaf, old: Leaf) -> Array:
    """Strong types that never drift, whatever the inner rule promotes."""
    return lax.convert_element_type(new, jnp.asarray(old).dtype)


def _multi_steps(inner: OptState) -> list[optax.MultiStepsState]:
    nodes = jax.tree.leaves(inner, is_leaf=_is_multi_steps)
    return [node for node in nodes if _is_multi_steps(node)]


def _is_multi_steps(node: Leaf) -> bool:
    return isinstance(node, optax.MultiStepsState)
