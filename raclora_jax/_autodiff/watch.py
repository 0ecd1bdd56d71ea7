"""Reads a model's program for what it does with its leaves, without computing it.

What is made of leaves and constants alone is followed through every operation, because
it may still be a matrix of the model: a standardised kernel, kernels side by side, one
plus a scale. What data has entered is an activation, and is followed no further: else
the scale of a norm would look contracted by the layer behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array

from raclora_jax._autodiff import consume
from raclora_jax._autodiff.axes import Axis, Part
from raclora_jax._autodiff.interpret import RULES
from raclora_jax._autodiff.reads import handed_on_by, scan_operands, while_operands
from raclora_jax._autodiff.stage import Eqn, Program, aval, body_of, called
from raclora_jax._autodiff.weight import Leaf, Operand, Weight

T = TypeVar("T")


class Seen(NamedTuple):
    """A value made of leaves and constants; one that data has entered is ``None``.

    Attributes:
      members: A watching weight for every leaf in it, all of the value's shape.
      lost: Leaves in it whose axes are no longer told apart, and by which operation.
    """

    members: tuple[Weight, ...] = ()
    lost: tuple[tuple[Leaf, str], ...] = ()


Value = Seen | None


def watch(
    program: Program, values: Sequence[Value], closed_over: Value = None
) -> list[Value]:
    """Writes down the uses of the leaves in a program.

    Args:
      program: A jaxpr, open or closed.
      values: What each of its inputs is.
      closed_over: What the arrays it closes over are.

    Returns:
      What each of its outputs is.
    """
    jaxpr = body_of(program)
    env: dict[jex.Var, Value] = dict.fromkeys(jaxpr.constvars, closed_over)
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(var: jex.Var | jex.Literal) -> Value:
        return Seen() if isinstance(var, jex.Literal) else env[var]

    for eqn in jaxpr.eqns:
        out = _apply(eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _apply(eqn: Eqn, operands: list[Value]) -> list[Value]:
    """One equation."""
    name = eqn.primitive.name
    data = any(value is None for value in operands)
    if not any(value is not None and any(value) for value in operands):
        return [None if data else Seen()] * len(eqn.outvars)
    if name in _SAME:
        return operands
    if name in _CALLS:
        return _CALLS[name](eqn, operands)
    # Three questions. Does the operation keep the leaf's axes, so that it can be followed
    # on? Does it sum over any, so that losing them loses the view? And is data in it, so
    # that what comes out is an activation, whose uses say nothing of the leaf?
    sums = name not in _QUIET and not _is_map(eqn)
    lost = _union(v.lost for v in operands if v is not None)
    kept: list[list[Weight]] = [[] for _ in eqn.outvars]
    for place, value in enumerate(operands):
        for member in value.members if value is not None else ():
            made = _by_rule(eqn, place, member)
            # Without data it may still be a matrix: W / |W|, W + 1, a mean over taps.
            if made is None and not data:
                made = _by_shape(eqn, member)
            if made is None and (sums or not data):
                lost += ((member.leaf, name),)
            for group, weight in zip(kept, made or (), strict=False):
                group.append(weight)
    if sums and (data or name in consume.RULES):
        for leaf, operation in lost:
            leaf.uses.lost.setdefault(leaf.path, operation)
    return [
        None if data and not group else Seen(_distinct(group), () if data else lost)
        for group in kept
    ]


def _by_rule(eqn: Eqn, place: int, member: Weight) -> list[Weight] | None:
    """What the gradient's own rule makes of a leaf: nothing, where it uses it up."""
    name = eqn.primitive.name
    rule = RULES.get(name)
    if rule is None or name in _COLLECTIVES or name in _SUMS:
        return None
    operands: list[Operand] = [_blank(aval(var)) for var in eqn.invars]
    operands[place] = member
    out = rule(eqn, *operands)
    if out is None:
        return None
    made = out if isinstance(out, list) else [out]
    return [value for value in made if isinstance(value, Weight)]


def _by_shape(eqn: Eqn, member: Weight) -> list[Weight] | None:
    """A leaf after an operation that keeps its axes where they are, adds or sums some."""
    name, gone = eqn.primitive.name, eqn.params.get("axes", ())
    if name == "reshape" or name in consume.RULES:
        return None
    axes = member.axes
    if name == "stack":
        place = eqn.params["axis"]
        axes = (*axes[:place], (), *axes[place:])
    elif len(aval(eqn.outvars[0]).shape) != len(axes):
        axes = tuple(axis for i, axis in enumerate(axes) if i not in gone)
    if any(len(aval(var).shape) != len(axes) for var in eqn.outvars):
        return None
    return [_reshaped(member, axes, aval(var)) for var in eqn.outvars]


def _is_map(eqn: Eqn) -> bool:
    """Whether the operation acts entry by entry, by the look of its shapes."""
    out = aval(eqn.outvars[0]).shape
    shapes = {aval(var).shape for var in eqn.invars} - {()}
    alike = all(
        len(shape) == len(out)
        and all(size in (1, made) for size, made in zip(shape, out, strict=True))
        for shape in shapes
    )
    return alike and eqn.primitive.name not in _SOLVES


def _reshaped(member: Weight, axes: Sequence[Axis], like: jax.core.ShapedArray) -> Weight:
    fitted = tuple(map(_fitted, axes, like.shape))
    return member.replace(base=_blank(like), axes=fitted)


def _fitted(axis: Axis, size: int) -> Axis:
    """An axis that got another size; its parts only have to be named from here on."""
    if math.prod(part.size for part in axis) == size:
        return axis
    if not axis:
        return (Part((-1,), size),)
    first, *rest = axis
    return (Part(first.atom, size), *(Part(part.atom, 1) for part in rest))


def _blank(like: jax.core.ShapedArray) -> Array:
    return jnp.zeros(like.shape, like.dtype)


def _distinct(members: Iterable[Weight]) -> tuple[Weight, ...]:
    return tuple({(member.leaf.path, member.axes): member for member in members}.values())


def _union(groups: Iterable[Sequence[T]]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(entry for group in groups for entry in group))


def _call(eqn: Eqn, operands: list[Value]) -> list[Value]:
    return watch(called(eqn), operands, Seen())


def _cond(eqn: Eqn, operands: list[Value]) -> list[Value]:
    _, *rest = operands
    branches = [watch(program, rest, Seen()) for program in eqn.params["branches"]]
    return [_either(values) for values in zip(*branches, strict=True)]


def _either(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    members = _distinct(member for value in known for member in value.members)
    return Seen(members, _union(value.lost for value in known))


def _scan(eqn: Eqn, operands: list[Value]) -> list[Value]:
    program = eqn.params["jaxpr"]
    constants, carry, xs = scan_operands(eqn.params, operands)
    same = {place: operands[own] for place, own in handed_on_by(eqn).items()}
    now = [same.get(place) for place in range(len(carry))]
    inputs = program.jaxpr.invars[len(constants) + len(carry) :]
    slices = [_slice(x, aval(var)) for x, var in zip(xs, inputs, strict=True)]
    out = watch(program, [*constants, *now, *slices], Seen())
    ys = enumerate(out[len(carry) :], len(carry))
    return [*now, *(same[i] if i in same else _forgotten(y, "scan") for i, y in ys)]


def _while(eqn: Eqn, operands: list[Value]) -> list[Value]:
    params = eqn.params
    of_test, of_body, carry = while_operands(params, operands)
    same = {place: operands[own] for place, own in handed_on_by(eqn).items()}
    # Inside it a loop's state is data, but for what it hands on as it is.
    now = [same.get(place) for place in range(len(carry))]
    watch(params["cond_jaxpr"], [*of_test, *now], Seen())
    watch(params["body_jaxpr"], [*of_body, *now], Seen())
    return now


def _slice(value: Value, like: jax.core.ShapedArray) -> Value:
    """One step's slice of what a scan runs over: its first axis stacks matrices."""
    if value is None:
        return None
    for member in value.members:
        member.saw((), [part.atom for part in member.axes[0]])
    members = tuple(_reshaped(m, m.axes[1:], like) for m in value.members)
    return Seen(members, value.lost)


def _forgotten(value: Value, operation: str) -> Value:
    if value is None:
        return None
    lost = [(member.leaf, operation) for member in value.members]
    return Seen((), _union([value.lost, lost]))


def _shard_map(eqn: Eqn, operands: list[Value]) -> list[Value]:
    program = body_of(eqn.params["jaxpr"])

    def shard(value: Value, like: jax.core.ShapedArray) -> Value:
        if value is None:
            return None
        members = (_reshaped(member, member.axes, like) for member in value.members)
        return Seen(tuple(members), value.lost)

    values = [
        shard(value, aval(var))
        for value, var in zip(operands, program.invars, strict=True)
    ]
    out = watch(program, values, Seen())
    return [_forgotten(value, "shard_map") for value in out]


# What a matrix is added to may be data.
_SUMS = {"add", "add_any", "sub"}
# Outputs are the operands, one by one.
_SAME = {"copy", "copy_p", "name", "optimization_barrier", "pvary", "sharding_constraint"}
# Not to be bound outside the mesh they belong to.
_COLLECTIVES = {"all_gather"}
# Operations that put a leaf among data, or look it up, and sum nothing. A convolution
# without a rule is one in groups, whose kernel is no matrix.
_QUIET = {
    "concatenate",
    "conv_general_dilated",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "pad",
    "scatter",
    "scatter-add",
    "scatter_add",
}
# Alike in the shapes of operands and output, but no map.
_SOLVES = {"dot_general", "triangular_solve"}

_CALLS: dict[str, Callable[[Eqn, list[Value]], list[Value]]] = {
    "checkpoint": _call,
    "closed_call": _call,
    "cond": _cond,
    "core_call": _call,
    "eval_jaxpr": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "custom_vjp_call_jaxpr": _call,
    "jit": _call,
    "pjit": _call,
    "remat2": _call,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
