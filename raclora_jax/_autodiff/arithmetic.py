"""Rules for sums and products that leave a leaf one, and for what has no derivative.

They return what the rules of ``rearrange`` return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from raclora_jax._autodiff.stage import Eqn, aval
from raclora_jax._autodiff.weight import Operand, Weight, told_apart


def neg(eqn: Eqn, weight: Weight) -> Weight:
    factor = None if weight.factor is None else -weight.factor
    return weight.replace(base=eqn.primitive.bind(weight.array), factor=factor)


def scaled(eqn: Eqn, left: Operand, right: Operand) -> Weight | None:
    """A product or quotient with a scalar: the model's own on the base.

    Taken off the leaf and put on what reads it, a scalar would change the range and the
    digits of the sums in between. It may depend on what is trained: its own gradient is
    then right too, and that of the scaled leaf formed in full.
    """
    weight, other = told_apart(left, right)
    if isinstance(other, Weight) or jnp.size(other) != 1:
        return None
    if jnp.ndim(other) not in (0, len(weight.axes)):
        return None
    first, divides = isinstance(left, Weight), eqn.primitive.name == "div"
    # A scalar over a leaf is not linear in the leaf.
    if divides and not first:
        return None
    operands = (weight.array, other) if first else (other, weight.array)
    base = eqn.primitive.bind(*operands, **eqn.params)
    if weight.factor is None:
        return weight.replace(base=base)
    scale = jnp.asarray(other).reshape(()).astype(weight.factor.dtype)
    factor = weight.factor / scale if divides else weight.factor * scale
    return weight.replace(base=base, factor=factor)


def add(eqn: Eqn, left: Operand, right: Operand) -> Weight | None:
    """A sum or difference with an array: the base takes it up, the factor stays.

    The array may depend on what is trained, and its own gradient is then right too.
    """
    first = isinstance(left, Weight)
    weight, other = told_apart(left, right)
    if isinstance(other, Weight) or aval(eqn.outvars[0]).shape != weight.shape:
        return None
    # A leaf broadcast over tokens and added to them is an activation from here on.
    if jnp.ndim(other) and weight.is_broadcast:
        return None
    other = jnp.asarray(other, weight.array.dtype)
    operands = (weight.array, other) if first else (other, weight.array)
    base = eqn.primitive.bind(*operands, **eqn.params)
    if first or eqn.primitive.name != "sub" or weight.factor is None:
        return weight.replace(base=base)
    return weight.replace(base=base, factor=-weight.factor)


def stop_gradient(eqn: Eqn, weight: Weight) -> Array:
    return weight.constant()


def flat(eqn: Eqn, *operands: Operand) -> Array:
    """A function whose derivative is zero, as a rounding or a comparison."""
    values = [v.constant() if isinstance(v, Weight) else v for v in operands]
    out: Array = eqn.primitive.bind(*values, **eqn.params)
    return out


_FLAT = (
    "ceil",
    "eq",
    "floor",
    "ge",
    "gt",
    "is_finite",
    "le",
    "lt",
    "ne",
    "round",
    "sign",
)

RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_FLAT, flat),
    "add": add,
    "add_any": add,
    "div": scaled,
    "mul": scaled,
    "neg": neg,
    "stop_gradient": stop_gradient,
    "sub": add,
}
