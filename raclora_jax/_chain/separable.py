"""Rules that act on each matrix by itself, and their states leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey

from raclora_jax._chain.inner import PROBE, as_rule, knowing, same_type
from raclora_jax._core.types import Leaf, OptState


class PerMatrix(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax is untyped
    """A rule that acts on each matrix by itself, as ``per_matrix`` says of one."""


def per_matrix(rule: optax.GradientTransformation) -> PerMatrix:
    """Says of an inner rule that it acts on each matrix by itself.

    A fused step updates one matrix at a time, so it takes a rule for which the update of
    a matrix depends on that matrix's gradient and state alone, also where several are
    stacked. What works number by number, such as ``optax.scale_by_adam()``, is seen to be
    of that kind, and ``raclora_jax.orthogonal`` says so itself. Of any other rule its
    author has to. A state may hold numbers common to all, such as a count, if they do not
    depend on gradients; all else it keeps for each matrix.

    Args:
      rule: An optax transformation, to be passed as ``inner``.

    Returns:
      The same rule, which a fused step takes.

    Raises:
      TypeError: If it is no optax transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, raclora_jax as rl
      >>> def unit(updates, state, params=None):
      ...     def one(factor):
      ...         size = jnp.linalg.norm(factor, axis=(-2, -1), keepdims=True)
      ...         return factor / jnp.maximum(size, 1e-12)
      ...     return jax.tree.map(one, updates), state
      >>> rule = per_matrix(optax.GradientTransformation(lambda p: (), unit))
      >>> tx = rl.raclora(0.1, 2, inner=rule, key=0)
    """
    if not hasattr(rule, "init") or not hasattr(rule, "update"):
        raise TypeError(
            f"per_matrix takes an optax transformation, got {type(rule).__name__}"
        )
    return PerMatrix(rule.init, as_rule(rule).update)


def check_separable(inner: optax.GradientTransformation) -> None:
    """Refuses a rule that is not known to act on each matrix by itself.

    Raises:
      ValueError: With the way out.
    """
    if isinstance(inner, PerMatrix):
        return
    found = _what_mixes(inner)
    if found is not None:
        raise ValueError(
            "a fused step updates one matrix at a time, and inner does more than work "
            f"number by number ({found}); if it acts on each matrix by itself say so, "
            "with inner=rl.per_matrix(rule). What needs the gradients of all leaves at "
            "once (a clip by the global norm, MultiSteps, apply_if_finite) needs "
            "rl.value_and_grad, tx.update and rl.apply_updates in place of a fused step"
        )


def _what_mixes(inner: optax.GradientTransformation) -> str | None:
    """The operation by which a rule joins numbers of a leaf, if there is one."""
    rule, plans = as_rule(inner), {PROBE.path: PROBE}
    gradient = {PROBE.path: jax.ShapeDtypeStruct(PROBE.factor_shape, jnp.float32)}

    def update(gradient: Any, state: OptState) -> Any:
        with knowing(plans):
            return rule.update(gradient, state, None, plans=plans)

    with knowing(plans):
        state = jax.eval_shape(inner.init, gradient)
    closed = jax.make_jaxpr(update)(gradient, state)
    numbers = [_shape(v) == PROBE.factor_shape for v in closed.jaxpr.invars]
    return _mixed(closed.jaxpr, numbers)[0]


# What JAX calls operations that work number by number.
# fmt: off
_ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "nextafter", "not", "or", "pow", "reduce_precision", "rem",
    "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan",
    "tanh", "xor",
])
# fmt: on
_CALLS = frozenset(
    ["jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "custom_jvp_call"]
)


def _mixed(jaxpr: jex.Jaxpr, numbers: list[bool]) -> tuple[str | None, list[bool]]:
    """What joins numbers, and which outputs have one for each of the gradient's.

    Args:
      jaxpr: The program of a rule.
      numbers: Which inputs are arrays of the gradient's shape.
    """
    each = dict(zip(jaxpr.invars, numbers, strict=True))
    # Numbers common to all, and arrays made of one of them, are no matter.
    common = {v for v in jaxpr.invars if not each[v]}

    def is_each(var: Any) -> bool:
        return not isinstance(var, jex.Literal) and each.get(var, False)

    def is_common(var: Any) -> bool:
        return isinstance(var, jex.Literal) or var in common

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if not any(map(is_each, eqn.invars)):
            one = name in _ELEMENTWISE or name == "broadcast_in_dim"
            scalars = all(is_common(v) for v in eqn.invars)
            small = all(_shape(v) == () for v in eqn.outvars)
            if scalars and (one or small):
                common |= {*eqn.outvars}
            continue
        if name in _CALLS:
            inner = next(
                eqn.params[n]
                for n in ("jaxpr", "call_jaxpr", "fun_jaxpr")
                if n in eqn.params
            )
            body = getattr(inner, "jaxpr", inner)
            found, outs = _mixed(body, [is_each(v) for v in eqn.invars])
            if found is not None:
                return found, []
            each |= dict(zip(eqn.outvars, outs, strict=True))
            continue
        beside = all(is_each(v) or is_common(v) for v in eqn.invars)
        if name not in _ELEMENTWISE or not beside:
            return name, []
        each |= dict.fromkeys(eqn.outvars, True)
    return None, [is_each(v) for v in jaxpr.outvars]


def is_common(keypath: tuple[Any, ...], name: str) -> bool:
    """Whether a place in the state of one leaf holds what all leaves have in common."""
    return DictKey(name) not in keypath


def _shape(var: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = var.aval.shape
    return shape


def parts_of(whole: OptState, template: OptState) -> OptState:
    """The part of an inner state that has another one's leaves.

    Args:
      whole: State of a rule for many leaves.
      template: State of the same rule for some of them, shapes are enough.

    Returns:
      A tree like ``template``.
    """
    held = dict(jax.tree_util.tree_leaves_with_path(whole))
    return jax.tree_util.tree_map_with_path(lambda keypath, _: held[keypath], template)


def joined_parts(whole: OptState, parts: Iterable[OptState]) -> OptState:
    """An inner state with what its parts hold in the places they came from."""
    new: dict[tuple[Any, ...], Leaf] = {}
    for part in parts:
        new |= dict(jax.tree_util.tree_leaves_with_path(part))
    return jax.tree_util.tree_map_with_path(
        lambda keypath, old: same_type(new[keypath], old) if keypath in new else old,
        whole,
    )
