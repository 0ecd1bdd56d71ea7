"""How a model's program reads its leaves and hands them on, found without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax.extend.core as jex

from raclora_jax._autodiff.stage import CALLS, REMATS, Eqn, Program, body_of, called

T = TypeVar("T")


def read_inputs(program: Program) -> set[int]:
    """The places of the inputs that a program does anything with."""
    jaxpr = body_of(program)
    read = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}
    for eqn in jaxpr.eqns:
        operands = [*eqn.invars]
        if eqn.primitive.name in CALLS:
            places = read_inputs(called(eqn))
            operands = [var for i, var in enumerate(operands) if i in places]
        read |= {var for var in operands if not isinstance(var, jex.Literal)}
    return {place for place, var in enumerate(jaxpr.invars) if var in read}


class Reads(NamedTuple):
    """How often something reads an input: one slice at a time in a scan, or otherwise."""

    in_scans: int
    elsewhere: int


def scanned_once(program: Program) -> set[int]:
    """The places of the inputs that one scan reads slice by slice, and nothing else."""
    jaxpr = body_of(program)
    reads, standing = _reads(jaxpr)
    handed_out = {
        standing.get(v) for v in jaxpr.outvars if not isinstance(v, jex.Literal)
    }
    return {p for p, r in reads.items() if r == (1, 0) and p not in handed_out}


def preceding(program: Program) -> dict[int, int]:
    """For each input another one that the program needs before it.

    It is the last one read on the way to what meets the input where that is first read.
    So on the way back, when its gradient is there, nothing reads the input any more.
    """
    jaxpr = body_of(program)
    place_of = {var: place for place, var in enumerate(jaxpr.invars)}
    first_read: dict[int, int] = {}
    needs: dict[jex.Var, set[int]] = {}
    found: dict[int, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        read = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        own = {place_of[v] for v in read if v in place_of}
        before = set().union(*(needs.get(v, set()) for v in read)) - own
        for place in own - {*first_read}:
            if before:
                found[place] = max(before, key=first_read.__getitem__)
        first_read = dict.fromkeys(own, index) | first_read
        needs |= dict.fromkeys(eqn.outvars, before | own)
    return found


def _reads(jaxpr: jex.Jaxpr) -> tuple[dict[int, Reads], dict[jex.Var, int]]:
    """How each input of a program is read, and which variables are inputs handed on."""
    standing = {var: place for place, var in enumerate(jaxpr.invars)}
    reads = {place: Reads(0, 0) for place in standing.values()}
    for eqn in jaxpr.eqns:
        inside = _reads_by(eqn)
        for own, var in enumerate(eqn.invars):
            if isinstance(var, jex.Literal) or var not in standing:
                continue
            more, place = inside(own), standing[var]
            before = reads[place]
            reads[place] = Reads(
                before.in_scans + more.in_scans, before.elsewhere + more.elsewhere
            )
        for out, own in handed_on_by(eqn).items():
            var = eqn.invars[own]
            if not isinstance(var, jex.Literal) and var in standing:
                standing[eqn.outvars[out]] = standing[var]
    return reads, standing


def _reads_by(eqn: Eqn) -> Callable[[int], Reads]:
    """How an equation reads each of its operands."""
    name = eqn.primitive.name
    if name in CALLS and not asks_sharding(eqn):
        inside, _ = _reads(body_of(called(eqn)))
        return inside.__getitem__
    if name == "scan" and eqn.params["length"] > 0:
        closed_over, carry, _ = scan_operands(eqn.params, [*range(len(eqn.invars))])
        first = len(closed_over) + len(carry)
        return lambda own: Reads(1, 0) if own >= first else Reads(0, 1)
    return lambda own: Reads(0, 1)


def handed_on_by(eqn: Eqn) -> dict[int, int]:
    """The outputs of a call that are operands of it, unchanged, by place.

    A module of nnx comes out of a transformed function with all its leaves.
    """
    name, params, places = eqn.primitive.name, eqn.params, range(len(eqn.invars))
    if name in REMATS or (name in CALLS and not asks_sharding(eqn)):
        return _handed_on(called(eqn))
    if name == "cond":
        # Operand 0 of a cond is its index, which no branch takes.
        first, *others = map(_handed_on, params["branches"])
        return {
            place: 1 + source
            for place, source in first.items()
            if all(other.get(place) == source for other in others)
        }
    if name == "scan":
        # A carry that stays, and slices that are put together again.
        closed_over, carry, _ = map(len, scan_operands(params, [*places]))
        return {
            place: source
            for place, source in _handed_on(params["jaxpr"]).items()
            if source == closed_over + place or min(place, source - closed_over) >= carry
        }
    if name == "while":
        of_test, of_body, _ = map(len, while_operands(params, [*places]))
        return {
            place: of_test + source
            for place, source in _handed_on(params["body_jaxpr"]).items()
            if source == of_body + place
        }
    return {}


def _handed_on(program: Program) -> dict[int, int]:
    """The outputs of a program that are inputs of it, unchanged, by place."""
    jaxpr = body_of(program)
    source = {var: place for place, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for place, own in handed_on_by(eqn).items():
            var = eqn.invars[own]
            if not isinstance(var, jex.Literal) and var in source:
                source[eqn.outvars[place]] = source[var]
    outputs = enumerate(jaxpr.outvars)
    found = ((i, var) for i, var in outputs if not isinstance(var, jex.Literal))
    return {place: source[var] for place, var in found if var in source}


def asks_sharding(eqn: Eqn) -> bool:
    """Whether a call says where its operands or results are to live."""
    asked = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    # By name, since JAX does not hand the class out.
    return any(type(sharding).__name__ != "UnspecifiedValue" for sharding in asked)


def scan_operands(
    params: dict[str, Any], operands: list[T]
) -> tuple[list[T], list[T], list[T]]:
    """What a scan closes over, its carry, and what it runs over."""
    if "num_consts" in params:  # JAX 0.10
        first, second = params["num_consts"], params["num_carry"]
    else:  # from JAX 0.11 on
        first, second, _ = (len(group) for group in params["ft_in"].unpack())
    end = first + second
    return operands[:first], operands[first:end], operands[end:]


def while_operands(
    params: dict[str, Any], operands: list[T]
) -> tuple[list[T], list[T], list[T]]:
    """What the test of a loop closes over, what its body does, and its carry."""
    first = params["cond_nconsts"]
    end = first + params["body_nconsts"]
    return operands[:first], operands[first:end], operands[end:]
