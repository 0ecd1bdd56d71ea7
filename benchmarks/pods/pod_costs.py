"""What a step on a TPU slice must take at least: operations, bytes, public chip figures.

Sources: the pages of the Cloud TPU documentation named v5e, v5p and v6e
(https://cloud.google.com/tpu/docs), read in 2026: peak bfloat16 operations, capacity and
bandwidth of the memory, and bandwidth of the links between chips, all of a chip's ports
together in one direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.shared.hlo import Collective

GB = 1e9


class Chip(NamedTuple):
    """Public figures of a chip.

    Attributes:
      flops: bfloat16 operations a second.
      memory: Bytes of memory.
      bandwidth: Bytes a second between memory and chip.
      links: Bytes a second that it sends to other chips.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 1600e9 / 8),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 4800e9 / 8),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 3200e9 / 8),
}


def roofline(
    chip: Chip, flops: float, held: float, exchanges: Iterable[Collective]
) -> dict[str, float]:
    """Milliseconds below which no such step goes, each part as if it were alone.

    ``compute = flops / peak``; ``links = ring bytes / bandwidth``, as if every port were
    busy; ``memory`` reads what the device holds once, and writes and reads once what it
    gathers, and leaves activations out. A step takes at least the longest of the three.

    Args:
      chip: The chip.
      flops: Operations of one device.
      held: Bytes of its arguments.
      exchanges: The collectives of the program.

    Returns:
      ``compute_ms``, ``memory_ms``, ``links_ms`` and ``bound_ms``.
    """
    exchanges = list(exchanges)
    gathered = sum(one.carried for one in exchanges if one.kind == "all-gather")
    parts = {
        "compute_ms": 1e3 * flops / chip.flops,
        "memory_ms": 1e3 * (held + 2 * gathered) / chip.bandwidth,
        "links_ms": 1e3 * sum(one.ring_bytes for one in exchanges) / chip.links,
    }
    return parts | {"bound_ms": max(parts.values())}


def exchanged(exchanges: Iterable[Collective]) -> dict[str, float]:
    """GB by kind, as ``hlo.Collective`` counts them and around a ring, and the totals."""
    kinds: dict[str, float] = {}
    for one in exchanges:
        name = one.kind.replace("-", "_")
        for field, size in ((name, one.carried), (f"{name}_ring", one.ring_bytes)):
            kinds[f"{field}_gb"] = kinds.get(f"{field}_gb", 0.0) + size / GB
    ring = sum(size for name, size in kinds.items() if name.endswith("_ring_gb"))
    return kinds | {"total_gb": sum(kinds.values()) - ring, "total_ring_gb": ring}


def product_flops(jaxpr: Any) -> float:
    """Operations of the matrix products of a staged step, on all devices together.

    Scans count as often as they run, of a conditional the dearest branch, other loops
    once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [product_flops(sub) for sub in _inside(eqn.params)]
        if eqn.primitive.name == "dot_general":
            total += _product(eqn)
        elif eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += eqn.params.get("length", 1) * sum(inner) if inner else 0.0
    return total


def _product(eqn: Any) -> float:
    left, (out,) = eqn.invars[0].aval.shape, eqn.outvars
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * math.prod(out.aval.shape) * math.prod(left[axis] for axis in contracted)


def _inside(params: dict[str, Any]) -> list[Any]:
    """The programs inside an operation."""
    values = [
        one
        for value in params.values()
        for one in (value if isinstance(value, tuple | list) else (value,))
    ]
    programs = [getattr(value, "jaxpr", value) for value in values]
    return [program for program in programs if hasattr(program, "eqns")]
