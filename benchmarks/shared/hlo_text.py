"""The text of a compiled program, instruction by instruction.

``hlo`` reads products and collectives off it. Computations are found with what calls
them, so that an instruction is known with how often it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import TypeAlias

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_NUMBER = re.compile(r"\bconstant\((\d+)\)")
# These name the computation that their start has called already.
_LATER = ("async-update", "async-done")


# An array of a program: its dtype and its shape.
Typed: TypeAlias = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Args:
      name: Its name.
      opcode: What it does; empty if the line could not be read.
      arrays: ``(dtype, shape)`` of each array in its result.
      operands: Names of what it reads.
      root: Whether it is the result of its computation.
      text: The line from the type on.
    """

    name: str
    opcode: str
    arrays: tuple[Typed, ...]
    operands: tuple[str, ...]
    root: bool
    text: str


class Program:
    """A compiled program.

    Args:
      text: As ``jax.jit(f).lower(...).compile().as_text()`` gives it.

    Attributes:
      computations: ``{computation: {name: instruction}}``.
      trips: How often each computation runs; a loop of unknown length counts once, and
        each branch of a conditional as if it were taken.
    """

    def __init__(self, text: str):
        self.computations, entry = _computations(text)
        self.trips = self._trip_counts(entry)

    def __iter__(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Every instruction, those of its computation by name, and how often it runs."""
        for name, body in self.computations.items():
            for one in body.values():
                yield one, body, self.trips[name]

    def fused(self, one: Instruction) -> dict[str, Instruction]:
        """What a fusion does; nothing for other instructions."""
        called = _FUSED.search(one.text) if one.opcode == "fusion" else None
        return self.computations.get(called[1], {}) if called else {}

    def _trip_counts(self, entry: str) -> dict[str, int]:
        calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
        for caller, body in self.computations.items():
            for one in body.values():
                if one.opcode in _LATER:
                    continue
                times = self._length(one) if one.opcode == "while" else 1
                listed = itertools.chain(
                    *(b.split(",") for b in _BRANCHES.findall(one.text))
                )
                names = [*_CALLED.findall(one.text), *(n.strip(" %") for n in listed)]
                for called in names:
                    if called in self.computations:
                        calls[called].append((caller, times))
        counts: dict[str, int] = {}

        def count(name: str) -> int:
            if name not in counts:
                callers = calls.get(name, [])
                counts[name] = (name == entry) + sum(count(c) * t for c, t in callers)
            return counts[name]

        return {name: count(name) for name in self.computations}

    def _length(self, loop: Instruction) -> int:
        """Trips of a loop: as the text says, or up to the constant in its condition.

        TPU programs do not say. Their loops count from zero by ones, as scans do.
        """
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = _CONDITION.search(loop.text)
        body = self.computations.get(condition[1], {}) if condition else {}
        root = root_of(body)
        if root is None:
            return 1
        inside = self.fused(root)
        compared = root_of(inside) if inside else root
        if compared is None or "direction=LT" not in compared.text:
            return 1
        read = [body[name] for name in root.operands if name in body]
        limits = [
            int(number[1])
            for one in (*read, *inside.values())
            if one.opcode == "constant" and (number := _NUMBER.search(one.text))
        ]
        return limits[0] if len(limits) == 1 else 1


def root_of(body: dict[str, Instruction]) -> Instruction | None:
    """The result of a computation."""
    return next((one for one in body.values() if one.root), None)


def _computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            one = _instruction(found[2], found[3], root=bool(found[1]))
            computations[current][one.name] = one
    return computations, entry


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    opcode = _OPCODE.search(rest)
    if opcode is None:
        return Instruction(name, "", (), (), root, rest)
    arrays = tuple(
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _ARRAY.findall(rest[: opcode.start(1)])
    )
    depth, end = 1, opcode.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end() : end - 1]))
    return Instruction(name, opcode[1], arrays, operands, root, rest)
