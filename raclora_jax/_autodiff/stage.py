"""Functions of trees as programs of arrays, and their results as trees again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.extend.core as jex
from jax import Array

from raclora_jax._core.types import Leaf, PyTree, TreeDef

Eqn: TypeAlias = jex.JaxprEqn
Program: TypeAlias = jex.Jaxpr | jex.ClosedJaxpr

# What JAX calls equations that run a program as it is, and those that run it again.
CALLS = frozenset(["closed_call", "core_call", "eval_jaxpr", "jit", "pjit"])
REMATS = frozenset(["checkpoint", "remat2"])


class Staged(NamedTuple):
    """A function's program, and how its outputs are put together.

    Attributes:
      jaxpr: Closed jaxpr; its inputs are the leaves of the arguments.
      out_shape: What the function returns, arrays as their shapes.
      rebuilt: Puts arrays back in the places of those shapes.
    """

    jaxpr: jex.ClosedJaxpr
    out_shape: PyTree
    rebuilt: Callable[[Sequence[Leaf]], PyTree]


def aval(var: jex.Var | jex.Literal) -> jax.core.ShapedArray:
    """Shape and dtype of what an equation reads or makes."""
    return cast(jax.core.ShapedArray, var.aval)


def body_of(program: Program) -> jex.Jaxpr:
    """A program without the arrays it closes over."""
    return program.jaxpr if isinstance(program, jex.ClosedJaxpr) else program


def called(eqn: Eqn) -> Program:
    """The program that an equation of one program runs, whatever JAX calls it."""
    # jit and remat have it as jaxpr, closed_call and custom rules as call_jaxpr.
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return cast(Program, next(eqn.params[n] for n in names if n in eqn.params))


def stage(function: Callable[..., PyTree], *arguments: PyTree) -> Staged:
    """Stages a function out, without running it.

    Args:
      function: Function of trees of arrays. What it returns besides arrays is kept.
      *arguments: Trees of arrays or ``ShapeDtypeStruct``s.

    Returns:
      The program.
    """
    returned: list[PyTree] = []

    def traced(*arguments: PyTree) -> list[Array]:
        leaves, treedef = jax.tree.flatten(function(*arguments))
        places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]
        # The arrays are tracers, and no tracer may outlive its trace.
        others = [None if hasattr(leaf, "dtype") else leaf for leaf in leaves]
        returned[:] = others, treedef, places
        return [leaves[i] for i in places]

    jaxpr, shapes = jax.make_jaxpr(traced, return_shape=True)(*arguments)
    others, treedef, places = returned

    def rebuilt(outputs: Sequence[Leaf]) -> PyTree:
        filled = dict(zip(places, outputs, strict=True))
        return treedef.unflatten([filled.get(i, other) for i, other in enumerate(others)])

    return Staged(jaxpr, rebuilt(shapes), rebuilt)


def abstracted(
    arguments: PyTree,
) -> tuple[list[jax.ShapeDtypeStruct], Callable[[Sequence[Leaf]], PyTree]]:
    """The arrays of a tree as shapes, and how to put arrays in their places.

    What is no array (flags, sizes, functions) stays as it is.
    """
    treedef: TreeDef
    leaves, treedef = jax.tree.flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in places]

    def filled(arrays: Sequence[Leaf]) -> PyTree:
        given = dict(zip(places, arrays, strict=True))
        return treedef.unflatten([given.get(i, v) for i, v in enumerate(leaves)])

    return shapes, filled


def part_of(
    jaxpr: jex.Jaxpr, eqns: Sequence[Eqn], outputs: Sequence[jex.Var]
) -> tuple[list[jex.Var], Callable[..., list[Array]]]:
    """Some equations of a jaxpr as a function, and the variables it takes.

    Args:
      jaxpr: The program.
      eqns: The equations, in order.
      outputs: Variables that they make, or that it takes.
    """
    made = {var for eqn in eqns for var in eqn.outvars}
    read = dict.fromkeys(
        var for eqn in eqns for var in eqn.invars if not isinstance(var, jex.Literal)
    )
    read |= dict.fromkeys(outputs)
    needed = [var for var in read if var not in made]
    # Constants the part reads are among needed, since no equation makes them.
    part = jaxpr.replace(constvars=[], invars=needed, eqns=[*eqns], outvars=[*outputs])
    return needed, jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))
