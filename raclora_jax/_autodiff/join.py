"""Leaves put side by side by the model: the gates of an LSTM as one matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._autodiff import consume, rearrange
from raclora_jax._autodiff.stage import Eqn
from raclora_jax._autodiff.weight import Operand, Weight, array_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """A concatenation of weights, and of arrays, along one axis.

    What reads it computes its output once, for all; each weight then takes its own slice
    of what it is multiplied by, or of what comes out.

    Args:
      members: Weights and arrays.
      axis: The axis along which they follow one another.
    """

    members: tuple[Operand, ...]
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def array(self) -> Array:
        """The bases as one array."""
        return self._together([array_of(member) for member in self.members])

    def materialise(self, operation: str) -> Array:
        """The leaves as an array whose gradient is formed in full, then projected."""
        return self._together(
            [
                member.materialise(operation) if isinstance(member, Weight) else member
                for member in self.members
            ]
        )

    def constant(self) -> Array:
        """The leaves as an array that no gradient goes back through."""
        values = [m.constant() if isinstance(m, Weight) else m for m in self.members]
        return lax.stop_gradient(self._together(values))

    def slices(self, array: Array, axis: int) -> list[Array]:
        """An array cut as the members cut the axis that goes along with it."""
        sizes = [member.shape[self.axis] for member in self.members]
        return list(lax.split(array, sizes, axis))

    def _together(self, arrays: list[Array]) -> Array:
        return lax.concatenate(arrays, self.axis)


# What stands for leaves among the values of a program, and all of its values.
Standing: TypeAlias = Weight | Joined
Value: TypeAlias = Array | Standing


def concatenate(eqn: Eqn, *operands: Value) -> Joined | None:
    axis = eqn.params["dimension"]
    members: list[Operand] = []
    for operand in operands:
        if isinstance(operand, Joined):
            if operand.axis != axis:
                return None
            members.extend(operand.members)
        elif isinstance(operand, Weight):
            # A token put before every sequence is an activation from here on.
            if operand.is_broadcast:
                return None
            members.append(operand)
        else:
            members.append(operand)
    return Joined(tuple(members), axis)


def dot_general(eqn: Eqn, left: Value, right: Value) -> Array | None:
    """A product with leaves side by side along an axis that is summed or free."""
    first = isinstance(left, Joined)
    joined, x = (left, right) if first else (right, left)
    if not isinstance(joined, Joined) or isinstance(x, Standing):
        return None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    summed, stacked = eqn.params["dimension_numbers"]
    mine, its = (0, 1) if first else (1, 0)
    if joined.axis in stacked[mine]:
        return None
    operands = (joined.array, x) if first else (x, joined.array)
    y: Array = eqn.primitive.bind(*operands, **eqn.params)
    # y = x_1 W_1 + x_2 W_2: each member meets its piece of x, and all share y.
    if joined.axis in summed[mine]:
        place = summed[its][tuple(summed[mine]).index(joined.axis)]
        for member, piece in zip(joined.members, joined.slices(x, place), strict=True):
            if isinstance(member, Weight):
                y = consume.dotted(eqn, member, piece, y, first=first)
        return y
    # y = [x W_1, x W_2]: each member has its piece of y. dot_general puts the batch axes
    # first, then the free axes of its left operand, then those of the right.
    taken = (*summed[mine], *stacked[mine])
    place = joined.axis - sum(axis < joined.axis for axis in taken) + len(stacked[mine])
    if not first:
        place += x.ndim - len(taken)
    pieces = [
        consume.dotted(eqn, member, x, piece, first=first)
        if isinstance(member, Weight)
        else piece
        for member, piece in zip(joined.members, joined.slices(y, place), strict=True)
    ]
    return lax.concatenate(pieces, place)


def transpose(eqn: Eqn, joined: Joined) -> Joined:
    return _each(eqn, joined, eqn.params["permutation"].index(joined.axis))


def convert_element_type(eqn: Eqn, joined: Joined) -> Joined | None:
    floating = jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    return _each(eqn, joined, joined.axis) if floating else None


def same(eqn: Eqn, joined: Joined) -> Joined:
    return _each(eqn, joined, joined.axis)


def stop_gradient(eqn: Eqn, joined: Joined) -> Array:
    return joined.constant()


def _each(eqn: Eqn, joined: Joined, axis: int) -> Joined:
    """What an operation makes of every member by itself."""
    rule = rearrange.RULES[eqn.primitive.name]
    members = [
        rule(eqn, member)
        if isinstance(member, Weight)
        else eqn.primitive.bind(member, **eqn.params)
        for member in joined.members
    ]
    return Joined(tuple(members), axis)


# For operations that some operand of is ``Joined``, and for the one that makes it.
RULES: dict[str, Callable[..., Any]] = {
    "concatenate": concatenate,
    "convert_element_type": convert_element_type,
    "copy": same,
    "copy_p": same,
    "dot_general": dot_general,
    "name": same,
    "stop_gradient": stop_gradient,
    "transpose": transpose,
}
