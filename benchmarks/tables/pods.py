"""The tables of steps compiled for TPU slices, from ``benchmarks.pods.pod``."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.pods import pod, pod_steps
from benchmarks.shared import rows as result_rows
from benchmarks.tables.names import named


def programs(model: str) -> str:
    """Every program of a model, a table for each slice, mesh, length and effort."""
    asked = {point.study for point in pod.CHOSEN if point.model == model}
    rows = [row for row in _rows() if row["study"].partition(", effort")[0] in asked]
    tables = []
    for study in sorted({row["study"] for row in rows}):
        found = {row["method"]: row for row in rows if row["study"] == study}
        methods = sorted(found, key=lambda name: (*_FIRST, name).index(name))
        lines = [
            f"**{_program(next(iter(found.values())))}**",
            "",
            "| method | peak, MiB | peak / floor | gathered, GB | summed, GB "
            "| bytes / floor | ring bytes / AdamW | compile CPU / floor | bound, ms |",
            "|---|" + "---:|" * 8,
        ]
        for name in methods:
            cells = _cells(found[name], found.get("floor"), found.get("AdamW"))
            lines.append("| " + " | ".join([named(name), *cells]) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


# The order of methods in a table; those not named follow as the rows have them.
_FIRST = ("floor", "AdamW", "LoRA")


def _program(row: dict[str, Any]) -> str:
    """The slice, mesh, length and effort of a program in words."""
    split = f" tensor parallelism over {row['tensor']}," if row["tensor"] > 1 else ""
    effort = f"effort {row['effort']:g}" if row["effort"] else "full effort"
    return f"{row['model']} on {row['slice']},{split} {row['length']:,} tokens, {effort}"


def _cells(
    row: dict[str, Any], floor: dict[str, Any] | None, full: dict[str, Any] | None
) -> list[str]:
    if not row["fits"]:
        return ["does not fit", *[""] * 7]
    sums = row.get("all_reduce_gb", 0.0) + row.get("reduce_scatter_gb", 0.0)
    return [
        f"{row['peak_mib']:,.0f}",
        _over(row, floor, "peak_mib", 2),
        f"{row.get('all_gather_gb', 0.0):.2f}",
        f"{sums:.2f}",
        _over(row, floor, "total_gb", 3),
        _over(row, full, "total_ring_gb", 2),
        _over(row, floor, "compile_cpu_seconds", 1),
        f"{row['bound_ms']:,.0f}",
    ]


def blocks() -> str:
    """Blocks of dim / 8 on 7B under FSDP, beside the floor and AdamW."""
    rows = {
        r["method"]: r for r in _rows() if r["study"] == "7B, v5e-256, 4096, effort -1"
    }
    lines = ["| method | peak / floor | bytes / floor |", "|---|---:|---:|"]
    for name, row in rows.items():
        if name in ("AdamW", "ours, left") or "dim / 8" in name:
            over = [_over(row, rows["floor"], *of) for of in _PEAK_AND_BYTES]
            lines.append("| " + " | ".join([named(name), *over]) + " |")
    return "\n".join(lines)


_PEAK_AND_BYTES = (("peak_mib", 2), ("total_gb", 3))


def slices() -> str:
    """The smallest v5e slice that the compiler accepts each method on."""
    rows = [r for r in _rows() if r["slice"] in pod.FITS_ON and r["tensor"] == 1]
    by_cell: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault((row["model"], row["method"]), []).append(row)
    lines = [
        "| model | method | smallest slice | peak there, MiB | refused on |",
        "|---|---|---|---:|---|",
    ]
    for model in pod.FITS_FROM:
        own = {
            method: found for (name, method), found in by_cell.items() if name == model
        }
        for method in sorted(own, key=lambda name: (*_FIRST, name).index(name)):
            refused = [row["slice"] for row in own[method] if not row["fits"]]
            fitting = [row for row in own[method] if row["fits"]]
            least = min(fitting, key=lambda row: row["chips"], default=None)
            first = pod.FITS_ON[pod.FITS_FROM[model]]
            # Without a refusal a smaller one may do, unless the search began there.
            if least and (refused or least["slice"] == first):
                cells = (least["slice"], f"{least['peak_mib']:,.0f}", ", ".join(refused))
                lines.append("| " + " | ".join([model, named(method), *cells]) + " |")
    return "\n".join(lines)


def one_chip() -> str:
    """What each method asks of one chip, and of how many MiB more than the weights."""
    asked = {point.study for point in pod.ONE_CHIP}
    rows = [row for row in _rows() if row["study"].partition(", effort")[0] in asked]
    lines = [
        "| program | method | peak, MiB | above the weights, MiB | 16 GB | 32 GB | 80 GB "
        "| compile CPU, s |",
        "|---|---|---:|---:|:-:|:-:|:-:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["study"], row.get("peak_mib", 1e9))):
        cells = ["refused", *[""] * 5]
        if row["fits"]:
            peak, weights = row["peak_mib"], _weights_mib(row["model"])
            cells = [
                f"{peak:,.0f}",
                f"{peak - weights:,.0f}",
                *("yes" if peak <= 1024 * gib else "no" for gib in _ROOM_GIB),
                f"{row['compile_cpu_seconds']:.0f}",
            ]
        lines.append(
            "| " + " | ".join([row["study"], named(row["method"]), *cells]) + " |"
        )
    return "\n".join(lines)


def followers() -> str:
    """Bytes that a step of 7B sends, and how long they take on a link."""
    lines = [
        "| sent in a step | MB | of full weights | seconds at 10 Gbit/s |",
        "|---|---:|---:|---:|",
    ]
    for row in result_rows.read("pods/followers"):
        if row["study"] == "bytes, 7B":
            seconds = row["bytes"] / _LINK_BYTES
            cells = f"{row['bytes'] / 1e6:,.1f} | 1 / {row['part']:.0f} | {seconds:.2f}"
            lines.append(f"| {row['method']} | {cells} |")
    return "\n".join(lines)


def followed() -> str:
    """Long runs: whether the followers were equal after every step."""
    lines = [
        "| weights, numbers, law, where the trainer is | steps | links | equal after |",
        "|---|---:|---:|---:|",
    ]
    for row in result_rows.read("pods/followers"):
        if row["study"] == "steps":
            cells = f"{row['steps']:,} | {row['links']} | {row['equal']:,}"
            lines.append(f"| {row['method']} | {cells} |")
    return "\n".join(lines)


_LINK_BYTES = 10e9 / 8

# What a program may take of a device of 16, 32 and 80 GB.
_ROOM_GIB = (15.75, 31.25, 74.5)


def _weights_mib(name: str) -> float:
    """What the weights of a model take in bfloat16."""
    sizes = pod_steps.LLAMA[name]
    model = pod_steps.llama(sizes, 1, 512, None)
    leaves = jax.tree.leaves(model.shapes()[0])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20


def _rows() -> list[dict[str, Any]]:
    return result_rows.read("pods/pod")


def _over(
    row: dict[str, Any], other: dict[str, Any] | None, key: str, digits: int
) -> str:
    return f"{row[key] / other[key]:.{digits}f}" if other and other["fits"] else "-"
