"""Runs a model's program with weights in place of its leaves.

The program is a jaxpr, as ``jax.make_jaxpr`` stages it. Stretches that no leaf reaches
run as JAX runs them; an operation that a leaf reaches goes to its rule. Where there is
none, the leaf is formed and the operation runs as it stands: same numbers, said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
from jax import Array, lax

from raclora_jax._autodiff import arithmetic, consume, join, rearrange, updating
from raclora_jax._autodiff.join import Standing, Value
from raclora_jax._autodiff.reads import (
    asks_sharding,
    handed_on_by,
    scan_operands,
    while_operands,
)
from raclora_jax._autodiff.stage import (
    CALLS,
    REMATS,
    Eqn,
    Program,
    body_of,
    called,
    part_of,
)
from raclora_jax._autodiff.weight import Operand, Weight
from raclora_jax._core.types import PyTree

RULES = {**arithmetic.RULES, **rearrange.RULES, **consume.RULES}


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
    # Equations that no leaf reaches run together, as one jitted program: bound one by one
    # they would cost a trace each, and a custom rule of the model's own, such as a
    # ``custom_vjp``, would lose what JAX knows of it as a whole.
    waiting: list[Eqn] = []
    last_read = _last_reads(jaxpr)

    def read(var: jex.Var | jex.Literal) -> Value:
        return var.val if isinstance(var, jex.Literal) else env[var]

    def run_waiting(now: int) -> None:
        """Runs the equations no leaf reached, as one program of their own."""
        if waiting:
            made = [var for eqn in waiting for var in eqn.outvars]
            made = [var for var in made if last_read.get(var, -1) >= now]
            needed, stretch = part_of(jaxpr, waiting, made)
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


def _apply(jaxpr: jex.Jaxpr, eqn: Eqn, operands: list[Value]) -> list[Value]:
    """One equation that a leaf reaches."""
    out = _by_rule(eqn, operands)
    if out is not None:
        return out
    # A literal is part of the equation: it is no input of its program, nor hashable.
    pairs = zip(eqn.invars, arrays(operands, eqn.primitive.name), strict=True)
    formed = {var: value for var, value in pairs if not isinstance(var, jex.Literal)}
    needed, program = part_of(jaxpr, [eqn], eqn.outvars)
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
    return None if asks_sharding(eqn) else evaluate(called(eqn), operands)


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
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(REMATS, _remat),
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
