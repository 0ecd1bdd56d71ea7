"""Runs a model's program with weights in place of its leaves.

The program is a jaxpr, as ``jax.make_jaxpr`` stages it. Stretches that no leaf reaches
run as JAX runs them; an operation that a leaf reaches goes to its rule. Where there is
none, the leaf is formed and the operation runs as it stands: same numbers, said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend.core as jex
from jax import Array, lax

from raclora_jax._autodiff import arithmetic, consume, join, rearrange, updating
from raclora_jax._autodiff.join import Standing, Value
from raclora_jax._autodiff.stage import Eqn, Program, body_of, called
from raclora_jax._autodiff.weight import Operand, Weight
from raclora_jax._core.types import PyTree

T = TypeVar("T")

RULES = {**arithmetic.RULES, **rearrange.RULES, **consume.RULES}


def read_inputs(program: Program) -> set[int]:
    """The places of the inputs that a program does anything with."""
    jaxpr = body_of(program)
    read = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}
    for eqn in jaxpr.eqns:
        operands = [*eqn.invars]
        if _CALLS.get(eqn.primitive.name) is _call:
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
    rule = _CALLS.get(eqn.primitive.name)
    if rule is _call and not _asks_sharding(eqn):
        inside, _ = _reads(body_of(called(eqn)))
        return inside.__getitem__
    if rule is _scan and eqn.params["length"] > 0:
        closed_over, carry, _ = scan_operands(eqn.params, [*range(len(eqn.invars))])
        first = len(closed_over) + len(carry)
        return lambda own: Reads(1, 0) if own >= first else Reads(0, 1)
    return lambda own: Reads(0, 1)


def evaluate(program: Program, arguments: Sequence[Value]) -> list[Value]:
    """Runs a program on arrays and weights.

    Args:
      program: A jaxpr, open or closed.
      arguments: One array or ``Weight`` for each of its inputs.

    Returns:
      Its outputs, arrays or weights.
    """
    jaxpr, closed_over = body_of(program), getattr(program, "consts", ())
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    env: dict[jex.Var, Value] = dict(zip(inputs, [*closed_over, *arguments], strict=True))
    waiting: list[Eqn] = []
    last_read = _last_reads(jaxpr)

    def read(var: jex.Var | jex.Literal) -> Value:
        return var.val if isinstance(var, jex.Literal) else env[var]

    def run_waiting(now: int) -> None:
        """Runs the equations no leaf reached, as one program of their own."""
        if waiting:
            made = [var for eqn in waiting for var in eqn.outvars]
            made = [var for var in made if last_read.get(var, -1) >= now]
            needed, stretch = _program(jaxpr, waiting, made)
            out = stretch(*(env[var] for var in needed))
            env.update(zip(made, out, strict=True))
            waiting.clear()

    for index, eqn in enumerate(jaxpr.eqns):
        reached = any(
            not isinstance(var, jex.Literal) and isinstance(env.get(var), Standing)
            for var in eqn.invars
        )
        if not reached:
            waiting.append(eqn)
            continue
        run_waiting(index)
        out = _apply(jaxpr, eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, out, strict=True))
    run_waiting(len(jaxpr.eqns))
    return [read(var) for var in jaxpr.outvars]


def arrays(values: Sequence[Value], operation: str) -> list[Array]:
    """The values with every weight formed, where an operation takes arrays only."""
    return [v.materialise(operation) if isinstance(v, Standing) else v for v in values]


def constants(values: Sequence[Value]) -> list[Array]:
    """The values with every weight as an array that no gradient goes back through."""
    return [v.constant() if isinstance(v, Standing) else v for v in values]


def _last_reads(jaxpr: jex.Jaxpr) -> dict[jex.Var, int]:
    """Where each variable is read last; the outputs are read after every equation."""
    reads: dict[jex.Var, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        reads |= {v: index for v in eqn.invars if not isinstance(v, jex.Literal)}
    end = len(jaxpr.eqns)
    return reads | {v: end for v in jaxpr.outvars if not isinstance(v, jex.Literal)}


def _program(
    jaxpr: jex.Jaxpr, eqns: Sequence[Eqn], outputs: Sequence[jex.Var]
) -> tuple[list[jex.Var], Callable[..., list[Array]]]:
    """Some equations of a jaxpr as a function, and the variables it takes."""
    made = {var for eqn in eqns for var in eqn.outvars}
    read = dict.fromkeys(
        var for eqn in eqns for var in eqn.invars if not isinstance(var, jex.Literal)
    )
    needed = [var for var in read if var not in made]
    part = jaxpr.replace(constvars=[], invars=needed, eqns=[*eqns], outvars=[*outputs])
    return needed, jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))


def _apply(jaxpr: jex.Jaxpr, eqn: Eqn, operands: list[Value]) -> list[Value]:
    """One equation that a leaf reaches."""
    out = _by_rule(eqn, operands)
    if out is not None:
        return out
    # A literal is part of the equation: it is no input of its program, nor hashable.
    pairs = zip(eqn.invars, arrays(operands, eqn.primitive.name), strict=True)
    formed = {var: value for var, value in pairs if not isinstance(var, jex.Literal)}
    needed, program = _program(jaxpr, [eqn], eqn.outvars)
    return [*program(*(formed[var] for var in needed))]


def _by_rule(eqn: Eqn, operands: list[Value]) -> list[Value] | None:
    """The outputs, or ``None`` where there is no rule for these operands."""
    name = eqn.primitive.name
    if name in _CALLS:
        return _CALLS[name](eqn, operands)
    side_by_side = any(isinstance(v, join.Joined) for v in operands)
    rules = join.RULES if side_by_side or name == "concatenate" else RULES
    rule = rules.get(name)
    out = None if rule is None else rule(eqn, *operands)
    if out is None:
        return None
    return [*out] if eqn.primitive.multiple_results else [out]


def _call(eqn: Eqn, operands: list[Value]) -> list[Value] | None:
    """A jitted function: its program is run in place, where no sharding is asked for."""
    return None if _asks_sharding(eqn) else evaluate(called(eqn), operands)


def _asks_sharding(eqn: Eqn) -> bool:
    asked = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    # By name, since JAX does not hand the class out.
    return any(type(sharding).__name__ != "UnspecifiedValue" for sharding in asked)


def _remat(eqn: Eqn, operands: list[Value]) -> list[Value]:
    kept = _kept(eqn, operands)

    def body(*operands: Value) -> list[Array]:
        out = evaluate(called(eqn), operands)
        return arrays(_changing(out, kept), "remat")

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    out = jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(*operands)
    return _filled(out, kept)


def _scan(eqn: Eqn, operands: list[Value]) -> list[Value]:
    """Leaves are read as constants, or sliced along an axis that stacks matrices."""
    params, program = eqn.params, eqn.params["jaxpr"]
    closed_over, carry, xs = scan_operands(params, operands)
    kept = _kept(eqn, operands)
    kept_carry = {i: value for i, value in kept.items() if i < len(carry)}

    def sliced(x: Value) -> Operand:
        if not isinstance(x, Weight):
            return arrays([x], "scan")[0]
        stacked = x if updating.is_moving(x) else x.stacked()
        return arrays([x], "scan")[0] if stacked is None else stacked

    def step(
        closed_over: list[Value], state: list[Array], slices: list[Operand]
    ) -> tuple[list[Array], list[Array]]:
        around = closed_over[: len(closed_over) - len(kept_carry)]
        handed_on = dict(zip(kept_carry, closed_over[len(around) :], strict=True))
        out = evaluate(program, [*around, *_filled(state, handed_on), *slices])
        changed = arrays(_changing(out, kept), "scan")
        return changed[: len(state)], changed[len(state) :]

    start = arrays(_changing(carry, kept_carry), "scan")
    end, ys = updating.scan(
        step,
        [*closed_over, *kept_carry.values()],
        start,
        [sliced(x) for x in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return _filled([*end, *ys], kept)


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


def _while(eqn: Eqn, operands: list[Value]) -> list[Value]:
    params = eqn.params
    of_test, of_body, carry = while_operands(params, operands)
    kept = _kept(eqn, operands)

    def test(state: Sequence[Array]) -> Array:
        (go,) = evaluate(params["cond_jaxpr"], [*of_test, *_filled(state, kept)])
        return arrays([go], "while")[0]

    def step(state: Sequence[Array]) -> list[Array]:
        out = evaluate(params["body_jaxpr"], [*of_body, *_filled(state, kept)])
        return arrays(_changing(out, kept), "while")

    start = arrays(_changing(carry, kept), "while")
    return _filled(lax.while_loop(test, step, start), kept)


def _kept(eqn: Eqn, operands: list[Value]) -> dict[int, Value]:
    """The weights among the outputs that are handed on, by the output's place."""
    found = {place: operands[own] for place, own in handed_on_by(eqn).items()}
    return {place: value for place, value in found.items() if isinstance(value, Standing)}


def handed_on_by(eqn: Eqn) -> dict[int, int]:
    """The outputs of a call that are operands of it, unchanged, by place.

    A module of nnx comes out of a transformed function with all its leaves.
    """
    rule, params, places = (
        _CALLS.get(eqn.primitive.name),
        eqn.params,
        range(len(eqn.invars)),
    )
    if rule is _remat or (rule is _call and not _asks_sharding(eqn)):
        return _handed_on(called(eqn))
    if rule is _cond:
        first, *others = map(_handed_on, params["branches"])
        return {
            place: 1 + source
            for place, source in first.items()
            if all(other.get(place) == source for other in others)
        }
    if rule is _scan:
        # A carry that stays, and slices that are put together again.
        closed_over, carry, _ = map(len, scan_operands(params, [*places]))
        return {
            place: source
            for place, source in _handed_on(params["jaxpr"]).items()
            if source == closed_over + place or min(place, source - closed_over) >= carry
        }
    if rule is _while:
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


def _changing(values: Sequence[Value], kept: dict[int, Value]) -> list[Value]:
    """The rest of a loop's carry, or of what a program gives."""
    return [value for i, value in enumerate(values) if i not in kept]


def _filled(rest: Sequence[Array], kept: dict[int, Value]) -> list[Value]:
    """The whole with what is handed on put back."""
    others = iter(rest)
    size = len(rest) + len(kept)
    return [kept[i] if i in kept else next(others) for i in range(size)]


def _cond(eqn: Eqn, operands: list[Value]) -> list[Value]:
    which, *rest = operands
    kept = _kept(eqn, operands)

    def branch(program: Program) -> Callable[[], list[Array]]:
        return lambda: arrays(_changing(evaluate(program, rest), kept), "cond")

    out = lax.switch(which, [branch(program) for program in eqn.params["branches"]])
    return _filled(out, kept)


def _shard_map(eqn: Eqn, operands: list[Value]) -> list[Value]:
    """The body with the shards of base, sketch and factor, axis by axis."""
    params = eqn.params
    specs: list[PyTree] = []
    values: list[Value] = []
    for operand, spec in zip(operands, params["in_specs"], strict=True):
        inside = None
        if isinstance(operand, Weight):
            # Which rows of a shard are picked differs from shard to shard.
            operand = operand.formed()
            inside = operand.sharded(tuple(spec))
        if inside is None:
            (operand,) = arrays([operand], "shard_map")
        values.append(operand)
        specs.append(spec if inside is None else inside)

    def body(*shards: Value) -> tuple[Array, ...]:
        local = [s.localised() if isinstance(s, Weight) else s for s in shards]
        return tuple(arrays(evaluate(params["jaxpr"], local), "shard_map"))

    # JAX 0.10.0 has the second name, later ones the first.
    name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=frozenset(params[name]),
    )
    return list(mapped(*values))


_CALLS: dict[str, Callable[[Eqn, list[Value]], list[Value] | None]] = {
    "checkpoint": _remat,
    "closed_call": _call,
    "cond": _cond,
    "core_call": _call,
    "eval_jaxpr": _call,
    "jit": _call,
    "pjit": _call,
    "remat2": _remat,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
