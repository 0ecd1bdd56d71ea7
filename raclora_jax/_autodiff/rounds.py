"""One round of a scan taken apart, so that its backward pass keeps no leaf.

What ``jax.vjp`` of a round holds from the forward pass to the backward pass are its
residuals. Some are the leaves themselves or made of them alone: these the backward pass
reads or makes again, since a copy of each kept for every round would be the leaves a
second time. The others are kept, as a scan keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array

from raclora_jax._autodiff.stage import Eqn, part_of
from raclora_jax._core.types import PyTree

Arrays = list[Array]


# Equal by identity (eq=False): JAX hashes what is static, and lists have no hash.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """One round of a scan, taken apart for its backward pass; static.

    Attributes:
      forward: ``forward(inputs)`` gives the new state, the outputs and what is kept.
      again: ``again(inputs)`` gives the residuals that are not kept.
      sources: For each residual ``(kind, place)``, where the backward pass finds it.
      back: The treedef of the function that the residuals make.
      state: The places of the state that have a cotangent.
      outputs: The places of the outputs that have one.
      consts: The places of the constants that have one.
      slices: The places of the slices that have one.
    """

    forward: Callable[[Inputs], tuple[Arrays, Arrays, Arrays]]
    again: Callable[[Inputs], Arrays]
    sources: list[tuple[str, int]]
    back: Any
    state: list[int]
    outputs: list[int]
    consts: list[int]
    slices: list[int]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays that one round reads, by what they are."""

    consts: Arrays
    state: Arrays
    slices: Arrays
    weights: Arrays
    sketches: Arrays

    def flat(self) -> Arrays:
        return [
            *self.consts, *self.state, *self.slices, *self.weights, *self.sketches
        ]  # fmt: skip

    def kinds(self) -> list[tuple[str, int]]:
        return [
            (field.name, place)
            for field in dataclasses.fields(self)
            for place in range(len(getattr(self, field.name)))
        ]


def taken_apart(
    round_of: Callable[[Inputs, Arrays], tuple[Arrays, Arrays]],
    zeros: Callable[[Inputs], Arrays],
    example: Inputs,
    given: PyTree,
) -> Body:
    """The round with its derivative, and where the backward pass finds what it needs."""
    _, _, consts_given, _, slices_given = given
    consts = _places(example.consts, consts_given)
    slices = _places(example.slices, slices_given)
    state = _places(example.state, [True for _ in example.state])
    kinds = example.kinds()
    # A program gives arrays alone: what is known of trees leaves the trace through here.
    found: dict[str, Any] = {}

    def both(*flat: Array) -> tuple[Arrays, Arrays, Arrays]:
        inputs = Inputs(*_groups(flat, kinds))

        def differentiated(
            state_in: Arrays, consts_in: Arrays, slices_in: Arrays, factors: Arrays
        ) -> tuple[tuple[Arrays, Arrays], tuple[Arrays, Arrays]]:
            own = dataclasses.replace(
                inputs,
                state=_filled(inputs.state, state, state_in),
                consts=_filled(inputs.consts, consts, consts_in),
                slices=_filled(inputs.slices, slices, slices_in),
            )
            new, ys = round_of(own, factors)
            found["outputs"] = [i for i, y in enumerate(ys) if floats(y)]
            return (
                ([new[i] for i in state], [ys[i] for i in found["outputs"]]),
                (new, ys),
            )

        _, back, (new, ys) = jax.vjp(
            differentiated,
            [inputs.state[i] for i in state],
            [inputs.consts[i] for i in consts],
            [inputs.slices[i] for i in slices],
            zeros(inputs),
            has_aux=True,
        )
        residuals, found["back"] = jax.tree.flatten(back)
        found["counts"] = len(new), len(ys)
        return new, ys, residuals

    closed = jax.make_jaxpr(both)(*example.flat())
    news, outs = found["counts"]
    outvars = closed.jaxpr.outvars
    made, residuals = outvars[: news + outs], outvars[news + outs :]
    sources = _sources(closed, kinds, residuals)
    kept = [
        var for var, (kind, _) in zip(residuals, sources, strict=True) if kind == "kept"
    ]
    lost = [
        var for var, (kind, _) in zip(residuals, sources, strict=True) if kind == "again"
    ]
    whole, again = _part(closed, kinds, [*made, *kept]), _part(closed, kinds, lost)

    def forward(inputs: Inputs) -> tuple[Arrays, Arrays, Arrays]:
        out = whole(inputs)
        return out[:news], out[news : news + outs], out[news + outs :]

    return Body(
        forward, again, sources, found["back"], state, found["outputs"], consts, slices
    )


def _sources(
    closed: jex.ClosedJaxpr, kinds: list[tuple[str, int]], residuals: Sequence[Any]
) -> list[tuple[str, int]]:
    """Where the backward pass finds each residual.

    What is an input is read again, but for the state. What is made of leaves alone, such
    as a cast or a transpose, is made again: kept, it would be the leaf a second time.
    The rest is kept.
    """
    jaxpr = closed.jaxpr
    own = dict(zip(jaxpr.invars, kinds, strict=True))
    made_of: dict[Any, set[str]] = {var: {kind} for var, (kind, _) in own.items()}
    for eqn in jaxpr.eqns:
        read = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        of = set().union(*(made_of.get(v, set()) for v in read))
        made_of |= dict.fromkeys(eqn.outvars, of)
    found: list[tuple[str, int]] = []
    counts = {"kept": 0, "again": 0}

    def count(kind: str) -> tuple[str, int]:
        counts[kind] += 1
        return kind, counts[kind] - 1

    for var in residuals:
        if isinstance(var, jex.Literal):
            found.append(count("again"))
        elif var in own and own[var][0] != "state":
            found.append(own[var])
        else:
            of = made_of.get(var, set())
            leaf = bool(of & {"weights", "sketches"}) or of <= {"consts"}
            found.append(count("again" if leaf and "state" not in of else "kept"))
    return found


def residuals_of(body: Body, inputs: Inputs, kept: Arrays) -> Arrays:
    """The residuals of a round, from where ``_sources`` found them."""
    again = body.again(inputs)

    def one(kind: str, place: int) -> Array:
        if kind == "kept":
            return kept[place]
        found: Array = again[place] if kind == "again" else getattr(inputs, kind)[place]
        return found

    return [one(kind, place) for kind, place in body.sources]


def _part(
    closed: jex.ClosedJaxpr, kinds: list[tuple[str, int]], outputs: Sequence[Any]
) -> Callable[[Inputs], Arrays]:
    """What of a program some of its outputs need, as a function of a round's inputs."""
    jaxpr = closed.jaxpr
    needed = {var for var in outputs if not isinstance(var, jex.Literal)}
    eqns: list[Eqn] = []
    for eqn in reversed(jaxpr.eqns):
        if needed & {*eqn.outvars} or eqn.effects:
            eqns.insert(0, eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
    variables = [v for v in outputs if not isinstance(v, jex.Literal)]
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    own = dict(zip(jaxpr.invars, kinds, strict=True))
    read, program = part_of(jaxpr, eqns, variables)

    def function(inputs: Inputs) -> Arrays:
        def given(var: jex.Var) -> Array:
            if var in constants:
                return constants[var]
            kind, place = own[var]
            found: Array = getattr(inputs, kind)[place]
            return found

        made = iter(program(*map(given, read)))
        return [v.val if isinstance(v, jex.Literal) else next(made) for v in outputs]

    return function


def _places(arrays: Arrays, wanted: Sequence[bool]) -> list[int]:
    """Where the arrays are that have a cotangent and are wanted to."""
    pairs = zip(arrays, wanted, strict=True)
    return [i for i, (array, wants) in enumerate(pairs) if wants and floats(array)]


def _groups(flat: Sequence[Array], kinds: list[tuple[str, int]]) -> list[Arrays]:
    names = [field.name for field in dataclasses.fields(Inputs)]
    return [
        [array for array, (kind, _) in zip(flat, kinds, strict=True) if kind == name]
        for name in names
    ]


def _filled(arrays: Arrays, places: list[int], new: Arrays) -> Arrays:
    """The arrays with some of them put in their places."""
    changed = dict(zip(places, new, strict=True))
    return [changed.get(i, array) for i, array in enumerate(arrays)]


def floats(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)
