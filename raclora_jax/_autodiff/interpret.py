"""Runs a model's program with weights in place of its leaves.

The program is a jaxpr, as ``jax.make_jaxpr`` stages it. Stretches that no leaf reaches
run as JAX runs them; an operation that a leaf reaches goes to its rule. Where there is
none, the leaf is formed and the operation runs as it stands: same numbers, said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

from raclora_jax._autodiff import consume, join, rearrange
from raclora_jax._autodiff.join import Joined
from raclora_jax._autodiff.weight import Weight

# What stands for leaves among the values of a program.
LEAVES = (Weight, Joined)


def read_inputs(jaxpr: Any) -> set[int]:
    """The places of the inputs that a program does anything with."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    read = {var for var in inner.outvars if not isinstance(var, jex.Literal)}
    for eqn in inner.eqns:
        operands = [*eqn.invars]
        if _CALLS.get(eqn.primitive.name) is _call:
            places = read_inputs(eqn.params["jaxpr"])
            operands = [var for i, var in enumerate(operands) if i in places]
        read |= {var for var in operands if not isinstance(var, jex.Literal)}
    return {place for place, var in enumerate(inner.invars) if var in read}


def evaluate(jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
    """Runs a program on arrays and weights.

    Args:
      jaxpr: A jaxpr, open or closed.
      arguments: One array or ``Weight`` for each of its inputs.

    Returns:
      Its outputs, arrays or weights.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    constants = getattr(jaxpr, "consts", ())
    inputs = [*inner.constvars, *inner.invars]
    env = dict(zip(inputs, [*constants, *arguments], strict=True))
    waiting: list[Any] = []
    last_read = _last_reads(inner)

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else env[var]

    def run_waiting(now: int) -> None:
        """Runs the equations no leaf reached, as one program of their own."""
        if waiting:
            made = [var for eqn in waiting for var in eqn.outvars]
            made = [var for var in made if last_read.get(var, -1) >= now]
            needed, program = _program(inner, waiting, made)
            out = program(*(env[var] for var in needed))
            env.update(zip(made, out, strict=True))
            waiting.clear()

    for index, eqn in enumerate(inner.eqns):
        reached = any(
            not isinstance(var, jex.Literal) and isinstance(env.get(var), LEAVES)
            for var in eqn.invars
        )
        if not reached:
            waiting.append(eqn)
            continue
        run_waiting(index)
        out = _apply(inner, eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, out, strict=True))
    run_waiting(len(inner.eqns))
    return [read(var) for var in inner.outvars]


def arrays(values: Sequence[Any], operation: str) -> list[Any]:
    """The values with every weight formed, where an operation takes arrays only."""
    return [v.materialise(operation) if isinstance(v, LEAVES) else v for v in values]


def constants(values: Sequence[Any]) -> list[Any]:
    """The values with every weight as an array that no gradient goes back through."""
    return [v.constant() if isinstance(v, LEAVES) else v for v in values]


def _last_reads(jaxpr: Any) -> dict[Any, int]:
    """Where each variable is read last; the outputs are read after every equation."""
    reads: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        reads |= {v: index for v in eqn.invars if not isinstance(v, jex.Literal)}
    end = len(jaxpr.eqns)
    return reads | {v: end for v in jaxpr.outvars if not isinstance(v, jex.Literal)}


def _program(
    jaxpr: Any, eqns: Sequence[Any], outputs: Sequence[Any]
) -> tuple[list[Any], Callable[..., list[Any]]]:
    """Some equations of a jaxpr as a function, and the variables it takes."""
    made = {var for eqn in eqns for var in eqn.outvars}
    read = dict.fromkeys(
        var for eqn in eqns for var in eqn.invars if not isinstance(var, jex.Literal)
    )
    needed = [var for var in read if var not in made]
    part = jaxpr.replace(constvars=[], invars=needed, eqns=[*eqns], outvars=[*outputs])
    return needed, jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))


def _apply(jaxpr: Any, eqn: Any, operands: list[Any]) -> list[Any]:
    """One equation that a leaf reaches."""
    name = eqn.primitive.name
    out: Any
    if name in _CALLS:
        out = _CALLS[name](eqn, operands)
    else:
        if name == "concatenate" or any(isinstance(v, Joined) for v in operands):
            rule = join.RULES.get(name)
        else:
            rule = consume.RULES.get(name) or rearrange.RULES.get(name)
        out = None if rule is None else rule(eqn, *operands)
    if out is not None:
        return list(out) if eqn.primitive.multiple_results else [out]
    # A literal is part of the equation: it is no input of its program, nor hashable.
    pairs = zip(eqn.invars, arrays(operands, name), strict=True)
    formed = {var: value for var, value in pairs if not isinstance(var, jex.Literal)}
    needed, program = _program(jaxpr, [eqn], eqn.outvars)
    return program(*(formed[var] for var in needed))


def _call(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A jitted function: its program is run in place, where no sharding is asked for."""
    asked = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    if any(type(sharding).__name__ != "UnspecifiedValue" for sharding in asked):
        return None
    return evaluate(eqn.params["jaxpr"], operands)


def _remat(eqn: Any, operands: list[Any]) -> list[Any]:
    def body(*operands: Any) -> list[Any]:
        return arrays(evaluate(eqn.params["jaxpr"], operands), "remat")

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(*operands)


def _scan(eqn: Any, operands: list[Any]) -> list[Any]:
    """Leaves are read as constants, or sliced along an axis that stacks matrices."""
    params, program = eqn.params, eqn.params["jaxpr"]
    constants, carry, xs = scan_operands(params, operands)
    kept = _unchanged(program, len(constants), carry)
    start = [None if i in kept else v for i, v in enumerate(carry)]
    start = arrays(start, "scan")
    xs = [x.materialise("scan") if isinstance(x, Joined) else x for x in xs]
    stacked = [x.stacked() if isinstance(x, Weight) else x for x in xs]
    xs = [
        x.materialise("scan") if isinstance(x, Weight) and s is None else s
        for x, s in zip(xs, stacked, strict=True)
    ]

    def body(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        now = [kept.get(i, v) for i, v in enumerate(state)]
        each = [x.unstacked() if isinstance(x, Weight) else x for x in slices]
        out = evaluate(program, [*constants, *now, *each])
        after = [None if i in kept else v for i, v in enumerate(out[: len(state)])]
        return arrays(after, "scan"), arrays(out[len(state) :], "scan")

    end, ys = lax.scan(
        body,
        start,
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*(kept.get(i, v) for i, v in enumerate(end)), *ys]


def scan_operands(
    params: dict[str, Any], operands: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carry and scanned inputs; JAX has told them apart in two ways."""
    if "num_consts" in params:
        first, second = params["num_consts"], params["num_carry"]
    else:
        first, second, _ = (len(group) for group in params["ft_in"].unpack())
    split = first + second
    return operands[:first], operands[first:split], operands[split:]


def _while(eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    first = params["cond_nconsts"]
    split = first + params["body_nconsts"]
    of_test, of_body, carry = operands[:first], operands[first:split], operands[split:]
    kept = _unchanged(params["body_jaxpr"], len(of_body), carry)
    start = arrays([None if i in kept else v for i, v in enumerate(carry)], "while")

    def now(state: list[Any]) -> list[Any]:
        return [kept.get(i, v) for i, v in enumerate(state)]

    def test(state: list[Any]) -> Any:
        (go,) = evaluate(params["cond_jaxpr"], [*of_test, *now(state)])
        return go

    def body(state: list[Any]) -> list[Any]:
        out = evaluate(params["body_jaxpr"], [*of_body, *now(state)])
        return arrays([None if i in kept else v for i, v in enumerate(out)], "while")

    return now(lax.while_loop(test, body, start))


def _unchanged(program: Any, constants: int, carry: list[Any]) -> dict[int, Weight]:
    """The weights that a loop hands on as they are."""
    inner = getattr(program, "jaxpr", program)
    return {
        i: value
        for i, value in enumerate(carry)
        if isinstance(value, Weight) and inner.outvars[i] is inner.invars[constants + i]
    }


def _cond(eqn: Any, operands: list[Any]) -> list[Any]:
    index, *rest = operands

    def branch(program: Any) -> Callable[[], list[Any]]:
        return lambda: arrays(evaluate(program, rest), "cond")

    return lax.switch(index, [branch(program) for program in eqn.params["branches"]])


def _shard_map(eqn: Any, operands: list[Any]) -> list[Any]:
    """The body with the shards of base, sketch and factor, axis by axis."""
    params = eqn.params
    specs, values = [], []
    for operand, spec in zip(operands, params["in_specs"], strict=True):
        if isinstance(operand, Joined):
            operand = operand.materialise("shard_map")
        elif isinstance(operand, Weight):
            inside = operand.sharded(tuple(spec))
            if inside is None:
                operand = operand.materialise("shard_map")
            else:
                spec = inside
        values.append(operand)
        specs.append(spec)

    def body(*shards: Any) -> tuple[Any, ...]:
        local = [s.localised() if isinstance(s, Weight) else s for s in shards]
        return tuple(arrays(evaluate(params["jaxpr"], local), "shard_map"))

    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=frozenset(manual),
    )
    return list(mapped(*values))


_CALLS: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "checkpoint": _remat,
    "closed_call": _call,
    "cond": _cond,
    "core_call": _call,
    "jit": _call,
    "pjit": _call,
    "remat2": _remat,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
