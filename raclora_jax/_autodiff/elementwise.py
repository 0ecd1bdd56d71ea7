"""Whether a program works number by number."""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex

from raclora_jax._autodiff.stage import CALLS, Program, aval, body_of, called

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
_ENTERED = CALLS | {"custom_jvp_call"}


def joining(program: Program, shape: tuple[int, ...]) -> str | None:
    """The operation by which a program joins numbers of an array, if there is one.

    Args:
      program: A jaxpr.
      shape: The shape of the inputs whose numbers are to stay apart. What else it takes
        counts as common to all of them.

    Returns:
      What JAX calls the operation.
    """
    jaxpr = body_of(program)
    return _mixed(jaxpr, [aval(v).shape == shape for v in jaxpr.invars])[0]


def _mixed(jaxpr: jex.Jaxpr, numbers: list[bool]) -> tuple[str | None, list[bool]]:
    """What joins numbers, and which outputs have one for each number of such an input."""
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
            small = all(aval(v).shape == () for v in eqn.outvars)
            if scalars and (one or small):
                common |= {*eqn.outvars}
            continue
        if name in _ENTERED:
            inside = body_of(called(eqn))
            found, outs = _mixed(inside, [is_each(v) for v in eqn.invars])
            if found is not None:
                return found, []
            each |= dict(zip(eqn.outvars, outs, strict=True))
            continue
        # Any other array has numbers of its own, and a slice would meet all of them.
        beside = all(is_each(v) or is_common(v) for v in eqn.invars)
        if name not in _ELEMENTWISE or not beside:
            return name, []
        each |= dict.fromkeys(eqn.outvars, True)
    return None, [is_each(v) for v in jaxpr.outvars]
