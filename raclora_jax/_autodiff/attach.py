"""A derivative by the factor, put on a value that does not have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax import Array, lax

from raclora_jax._core.sharding import resharded
from raclora_jax._core.types import PyTree

# A map from what is known and a factor or a cotangent, linear in the latter.
Map: TypeAlias = Callable[[PyTree, Array], Array]


def attach(
    output: Array,
    factor: Array,
    inputs: PyTree,
    keep: Callable[[PyTree], PyTree],
    push: Map,
    pull: Map | None,
    scaling: float,
) -> Array:
    """The identity on ``output``, with ``push`` as its derivative by ``factor``."""
    factor = varying_as(factor, output)
    like = jax.typeof(factor)

    @jax.custom_vjp
    def identity(output: Array, factor: Array, inputs: PyTree) -> Array:
        return output

    def forward(output: Array, factor: Array, inputs: PyTree) -> tuple[Array, PyTree]:
        return output, keep(inputs)

    def backward(known: PyTree, cotangent: Array) -> tuple[Array, Array, None]:
        if pull is not None:
            gradient = pull(known, cotangent)
        else:
            out = jax.typeof(cotangent)
            transpose = jax.linear_transpose(
                lambda f: resharded(push(known, f), out), like
            )
            (gradient,) = transpose(cotangent)
        gradient = resharded((scaling * gradient).astype(like.dtype), like)
        return cotangent, gradient, None

    identity.defvjp(forward, backward)
    attached: Array = identity(output, factor, inputs)
    return attached


def named(
    output: Array,
    factor: Array,
    inputs: PyTree,
    keep: Callable[[PyTree], PyTree],
    push: Map,
    scaling: float,
) -> Array:
    """``attach`` for an output with the factor's part in it: right to any order."""

    @jax.custom_jvp
    def identity(output: Array, factor: Array, inputs: PyTree) -> Array:
        return output

    @identity.defjvp
    def rule(primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
        change = resharded(push(keep(primals[2]), tangents[1]), jax.typeof(primals[0]))
        # Itself, and not its output: that depends on the factor when derived again.
        out: Array = identity(*primals)
        return out, tangents[0] + (scaling * change).astype(out.dtype)

    attached: Array = identity(output, varying_as(factor, output), inputs)
    return attached


def varying_as(array: Array, other: Array) -> Array:
    """Inside ``shard_map``, an array that varies over what another varies over."""
    axes = tuple(varying_axes(other) - varying_axes(array))
    return lax.pcast(array, axes, to="varying") if axes else array


def varying_axes(array: Array) -> frozenset[str]:
    """The manual mesh axes that an array's shards differ along."""
    manual = getattr(jax.typeof(array), "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()))
