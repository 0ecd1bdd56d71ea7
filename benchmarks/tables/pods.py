"""The tables of steps compiled for TPU slices, from ``benchmarks.pods.pod``."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.pods import pod, pod_steps
from benchmarks.shared import rows as result_rows


def programs() -> str:
    """Every program beside the floor of its model, slice and mesh, of the same effort."""
    asked = {point.study for point in pod.CHOSEN}
    rows = [row for row in _rows() if row["study"].partition(", effort")[0] in asked]
    lines = [
        "| program | method | peak, MiB | peak / floor | arguments + temporaries, MiB "
        "| gathered, GB | summed, GB | all bytes / floor | ring bytes / AdamW "
        "| compile CPU / floor | bound, ms |",
        "|---|---|" + "---:|" * 9,
    ]
    by_cell = {(row["study"], row["method"]): row for row in rows}
    for row in sorted(rows, key=lambda row: row["study"]):
        start = [row["study"], row["method"]]
        if not row["fits"]:
            lines.append("| " + " | ".join([*start, "does not fit"]) + " |" * 9)
            continue
        floor, full = (by_cell.get((row["study"], name)) for name in ("floor", "AdamW"))
        sums = row.get("all_reduce_gb", 0.0) + row.get("reduce_scatter_gb", 0.0)
        cells = [
            f"{row['peak_mib']:,.0f}",
            _over(row, floor, "peak_mib", 2),
            f"{row['arguments_mib'] + row['temporaries_mib']:,.0f}",
            f"{row.get('all_gather_gb', 0.0):.2f}",
            f"{sums:.2f}",
            _over(row, floor, "total_gb", 3),
            _over(row, full, "total_ring_gb", 2),
            _over(row, floor, "compile_cpu_seconds", 1),
            f"{row['bound_ms']:,.0f}",
        ]
        lines.append("| " + " | ".join([*start, *cells]) + " |")
    return "\n".join(lines)


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
    for (model, method), found in sorted(by_cell.items()):
        refused = [row["slice"] for row in found if not row["fits"]]
        fitting = [row for row in found if row["fits"]]
        least = min(fitting, key=lambda row: row["chips"], default=None)
        first = pod.FITS_ON[pod.FITS_FROM[model]]
        # Without a refusal a smaller one may do, unless the search began there.
        if least and (refused or least["slice"] == first):
            cells = (least["slice"], f"{least['peak_mib']:,.0f}", ", ".join(refused))
            lines.append("| " + " | ".join([model, method, *cells]) + " |")
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
        lines.append("| " + " | ".join([row["study"], row["method"], *cells]) + " |")
    return "\n".join(lines)


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
