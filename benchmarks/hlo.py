"""Reading a compiled program: its matrix products, and what its devices exchange.

Whether a step forms the gradient of a weight is a matter of fact, not of timing: such a
program holds a product whose result has the shape of the weight. All of the text is read,
loop bodies, branches and fusions too, as ``jax.jit(f).lower(...).compile().as_text()``
gives it. Hold every finding against a positive control (``jax.grad``), and choose sizes
of batch and model that do not collide.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PRODUCT_CALL = re.compile(r"matmul|gemm|\$dot|conv", re.IGNORECASE)
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0}


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or a convolution.

    Args:
      shape: Shape of the result.
      contracted: How many terms an entry of the result sums; 0 if the text is silent.
      kind: Its opcode, or the target of a call into a library.
      trips: How often it runs, as far as trip counts are known.
      where: The line of the text.
    """

    shape: tuple[int, ...]
    contracted: int
    kind: str
    trips: int
    where: str

    @property
    def flops(self) -> int:
        """Floating point operations of all its runs."""
        return 2 * math.prod(self.shape) * self.contracted * self.trips


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    text: str


def products(text: str) -> list[Product]:
    """Every dot, convolution and call of a matrix library.

    Args:
      text: A compiled program.

    Returns:
      One ``Product`` for each place in the text.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> step = jax.jit(lambda x, w: x @ w)
      >>> text = step.lower(jnp.ones((96, 40)), jnp.ones((40, 72))).compile().as_text()
      >>> [(p.shape, p.contracted) for p in products(text)]
      [((96, 72), 40)]
    """
    return [
        Product(one.arrays[0][1], _contracted(one, shapes), _kind(one), trips, one.text)
        for one, shapes, trips in _instructions(text)
        if _is_product(one)
    ]


def weight_gradients(
    text: str, shapes: Mapping[str, tuple[int, ...]], rank: int
) -> list[tuple[str, Product]]:
    """The products that form the gradient of a weight.

    A product is taken for one if its result has the shape of a leaf, in any order of the
    axes, those of size 1 left out, with or without the first axis of a leaf of three or
    more (the layers of a scan), its axes merged into two or not, and if it does not
    contract the rank: the lift of a factor has the shape of the leaf too.

    Args:
      text: A compiled program.
      shapes: ``{path: shape}`` of the leaves that should have no gradient of their own.
      rank: Rank of the sketches.

    Returns:
      ``(paths of the leaves with that shape, product)``, one for each such product.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> grad = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))))
      >>> text = grad.lower(jnp.ones((40, 72)), jnp.ones((96, 40))).compile().as_text()
      >>> [leaf for leaf, _ in weight_gradients(text, {"w": (40, 72)}, rank=8)]
      ['w']
    """
    leaves: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)
    for path, shape in shapes.items():
        for form in {_form(shape) for shape in _forms(shape)}:
            leaves[form].append(path)
    return [
        (", ".join(leaves[form]), product)
        for product in products(text)
        if (form := _form(product.shape)) in leaves and product.contracted != rank
    ]


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that collectives carry, by kind, loop bodies times their trip counts.

    A collective counts as the larger of what goes in and what comes out of it on one
    device.

    Args:
      text: A compiled program.

    Returns:
      ``{kind: bytes}`` for the kinds that occur.
    """
    carried: dict[str, int] = collections.Counter()
    for one, shapes, trips in _instructions(text):
        kind = one.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            inputs = [array for name in one.operands for array in shapes.get(name, ())]
            # A start returns its operand beside its result.
            outputs = one.arrays[-1:] if one.opcode != kind else one.arrays
            carried[kind] += trips * max(_bytes(inputs), _bytes(outputs))
    return dict(carried)


def _instructions(
    text: str,
) -> Iterator[tuple[_Instruction, dict[str, tuple], int]]:
    """Every instruction, the arrays of its computation by name, and how often it runs."""
    computations, entry = _computations(text)
    trips = _trip_counts(computations, entry)
    for name, body in computations.items():
        shapes = {one.name: one.arrays for one in body}
        for one in body:
            yield one, shapes, trips[name]


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(_instruction(found[1], found[2]))
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    opcode = _OPCODE.search(rest)
    if opcode is None:
        return _Instruction(name, "", (), (), rest)
    arrays = tuple(
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _ARRAY.findall(rest[: opcode.start(1)])
    )
    depth, end = 1, opcode.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end() : end - 1]))
    return _Instruction(name, opcode[1], arrays, operands, rest)


def _trip_counts(
    computations: dict[str, list[_Instruction]], entry: str
) -> dict[str, int]:
    """How often each computation runs; a loop of unknown length counts once."""
    calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for caller, body in computations.items():
        for one in body:
            known = _TRIPS.search(one.text) if one.opcode == "while" else None
            times = int(known[1]) if known else 1
            listed = itertools.chain(*(b.split(",") for b in _BRANCHES.findall(one.text)))
            names = [*_CALLED.findall(one.text), *(n.strip(" %") for n in listed)]
            for called in names:
                if called in computations:
                    calls[called].append((caller, times))
    counts: dict[str, int] = {}

    def count(name: str) -> int:
        if name not in counts:
            callers = calls.get(name, [])
            counts[name] = (name == entry) + sum(count(c) * t for c, t in callers)
        return counts[name]

    return {name: count(name) for name in computations}


def _is_product(one: _Instruction) -> bool:
    if one.opcode == "custom-call":
        return _PRODUCT_CALL.search(_kind(one)) is not None
    return one.opcode in ("dot", "convolution", "ragged-dot")


def _kind(one: _Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', one.text)
    return target[1] if target else one.opcode


def _contracted(one: _Instruction, shapes: dict[str, tuple]) -> int:
    """Terms in the sum behind one entry of the result."""
    sides = [shapes[name][0][1] for name in one.operands[:2] if shapes.get(name)]
    if len(sides) < 2:
        return 0
    left, right = sides
    if labels := re.search(r"dim_labels=\w+_(\w+)->", one.text):
        return math.prod(right) // right[labels[1].index("o")]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text) or re.search(
        r'"lhs_contracting_dimensions":\[([\d,"]*)\]', one.text
    )
    if dims:
        return math.prod(left[int(axis)] for axis in re.findall(r"\d+", dims[1]))
    # A library's call: |left| |right| / |result| is the stack times the sum squared.
    result = one.arrays[0][1]
    stack = math.prod(result[:-2])
    return math.isqrt(math.prod(left) * math.prod(right) // (math.prod(result) * stack))


def _form(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _forms(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """A leaf as a product may give it: with or without layers, merged into two or not."""
    for part in [shape, shape[1:]] if len(shape) > 2 else [shape]:
        yield part
        for at in range(1, len(part)):
            yield math.prod(part[:at]), math.prod(part[at:])


def _bytes(arrays: list | tuple) -> int:
    return sum(math.prod(shape) * _width(dtype) for dtype, shape in arrays) // 8


def _width(dtype: str) -> int:
    """Bits of one number, which stand in the name of its type."""
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(digits[0]) if digits else 0)
