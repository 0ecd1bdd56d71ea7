"""Reading a compiled program: its matrix products, and what its devices exchange.

Whether a step forms the gradient of a weight is a matter of fact, not of timing: such a
program holds a product whose result has the shape of the weight. All of the text is read,
loop bodies, branches and fusions too, as ``jax.jit(f).lower(...).compile().as_text()``
gives it, on a TPU as well; there products are convolutions inside fusions and what they
contract is not always said. Hold every finding against a positive control
(``jax.grad``), and choose sizes of batch and model that do not collide.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.shared.hlo_text import Instruction, Program, Typed, root_of

_PRODUCT_CALL = re.compile(r"matmul|gemm|\$dot|conv", re.IGNORECASE)
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# Groups of devices: listed, as sizes of an iota, or as axes of a mesh.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0}
# Rounds of (devices - 1) / devices of the bytes that each device sends along a ring.
_RINGS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}


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
class Collective:
    """An exchange between devices.

    Args:
      kind: Its opcode; ``"all-gather"`` too for the sum of shards among zeros, which is
        how some programs write one.
      arrays: ``(dtype, shape)`` of what goes in or comes out of it on one device, the
        larger of the two.
      bytes: Their bytes.
      devices: How many take part in it; 0 if the text is silent.
      trips: How often it runs.
      where: The line of the text.
    """

    kind: str
    arrays: tuple[Typed, ...]
    bytes: int
    devices: int
    trips: int
    where: str

    @property
    def carried(self) -> int:
        """Bytes of all its runs."""
        return self.bytes * self.trips

    @property
    def ring_bytes(self) -> float:
        """Bytes that a device sends in all its runs, around a ring of the devices.

        ``(n - 1) / n`` of the bytes for a gather, a scatter and, as the least there is,
        an exchange of all with all; twice that for a sum; all of them for the others.
        """
        share = (self.devices - 1) / self.devices if self.devices else 1
        return self.carried * share * _RINGS.get(self.kind, 1 / share if share else 0)


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
        Product(one.arrays[0][1], _contracted(one, body), _kind(one), trips, one.text)
        for one, body, trips in Program(text)
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
    leaves = _by_form(shapes)
    return [
        (", ".join(leaves[form]), product)
        for product in products(text)
        if (form := _form(product.shape)) in leaves and product.contracted != rank
    ]


def collectives(text: str) -> list[Collective]:
    """Every exchange between devices.

    An exchange that is spread over several fusions, to run beside them, stands in each of
    these under one channel, also inside loops that it outlasts; it is one, and runs as
    often as the rarest of them, which starts it. A sum of shards among zeros is a gather,
    also where it was joined with true sums.

    Args:
      text: A compiled program.

    Returns:
      One ``Collective`` for each.
    """
    program = Program(text)
    found: dict[tuple[str, str], Collective] = {}
    for one, body, trips in program:
        channel = _CHANNEL.search(one.text)
        group = _group(one.text)
        for kind, arrays in _parts(one, body, program):
            at = (kind, channel[1] if channel else one.name)
            size = _bytes(arrays)
            again = Collective(kind, tuple(arrays), size, group, trips, one.text)
            if at not in found or again.carried < found[at].carried:
                found[at] = again
    return list(found.values())


def _parts(
    one: Instruction, body: dict[str, Instruction], program: Program
) -> Iterator[tuple[str, Sequence[Typed]]]:
    """The kinds of exchange that an instruction is, with the arrays of each."""
    kind = one.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return
    inputs = [body[name] for name in one.operands if name in body]
    if kind == "all-reduce":
        given = [(_is_shard(read, body, program), read.arrays) for read in inputs]
        if not given:  # The text is cut short.
            given = [(False, one.arrays)]
        for whole, name in ((True, "all-gather"), (False, "all-reduce")):
            arrays = [array for shard, own in given if shard is whole for array in own]
            if arrays:
                yield name, arrays
        return
    ins = [array for read in inputs for array in read.arrays]
    # A start returns its operands beside its results.
    count = len(one.operands)
    outs = one.arrays if one.opcode == kind else one.arrays[count : 2 * count]
    yield kind, max(ins, outs, key=_bytes)


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that collectives carry, by kind, loop bodies times their trip counts.

    Args:
      text: A compiled program.

    Returns:
      ``{kind: bytes}`` for the kinds that occur.
    """
    carried: dict[str, int] = collections.Counter()
    for one in collectives(text):
        carried[one.kind] += one.carried
    return dict(carried)


def of_weights(
    found: Iterable[Collective],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: tuple[str, ...],
) -> list[Collective]:
    """The collectives that gather weights, or sum their gradients, by shape.

    Args:
      found: Collectives of a program.
      shapes: ``{path: shape}`` of the weights, as a device multiplies with them.
      kinds: The kinds to look at.

    Returns:
      Those with an array of the shape of a leaf, as in ``weight_gradients``.
    """
    forms = _by_form(shapes)

    def holds(one: Collective) -> bool:
        return any(_form(shape) in forms for _, shape in one.arrays)

    return [one for one in found if one.kind in kinds and holds(one)]


def _is_shard(one: Instruction, body: dict[str, Instruction], program: Program) -> bool:
    """Whether an array is what one device holds, placed among constants."""
    inside = program.fused(one)
    placed = root_of(inside) if inside else one
    if placed is None or placed.opcode != "dynamic-update-slice":
        return False
    among = (inside or body).get(placed.operands[0])
    if among is not None and inside and among.opcode == "parameter":
        index = int(re.search(r"parameter\((\d+)\)", among.text)[1])
        among = body.get(one.operands[index])
    return among is not None and among.opcode == "broadcast"


def _group(text: str) -> int:
    """How many devices take part in a collective."""
    if listed := _LISTED.search(text):
        return len(listed[1].split(","))
    if iota := _IOTA.search(text):
        return int(iota[2])
    if mesh := _MESH.search(text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return 0


def _is_product(one: Instruction) -> bool:
    if one.opcode == "custom-call":
        return _PRODUCT_CALL.search(_kind(one)) is not None
    return one.opcode in ("dot", "convolution", "ragged-dot")


def _kind(one: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', one.text)
    return target[1] if target else one.opcode


def _contracted(one: Instruction, body: dict[str, Instruction]) -> int:
    """Terms in the sum behind one entry of the result."""
    read = [body[name].arrays for name in one.operands[:2] if name in body]
    sides = [arrays[0][1] for arrays in read if arrays]
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


def _by_form(
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[tuple[int, ...], list[str]]:
    """The paths of the leaves that a result of some form may belong to."""
    leaves: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)
    for path, shape in shapes.items():
        for form in {_form(shape) for shape in _forms(shape)}:
            leaves[form].append(path)
    return dict(leaves)


def _form(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _forms(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """A leaf as a product may give it: with or without layers, merged into two or not."""
    for part in [shape, shape[1:]] if len(shape) > 2 else [shape]:
        yield part
        for at in range(1, len(part)):
            yield math.prod(part[:at]), math.prod(part[at:])


def _bytes(arrays: Sequence[Typed]) -> int:
    return sum(math.prod(shape) * _width(dtype) for dtype, shape in arrays) // 8


def _width(dtype: str) -> int:
    """Bits of one number, which stand in the name of its type."""
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(digits[0]) if digits else 0)
