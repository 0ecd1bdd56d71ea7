"""Costs of a run by leaf and in all, as records and as a table."""

from __future__ import annotations

import dataclasses

from raclora_jax._core import paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What something costs: a leaf, or a whole tree under one method.

    Args:
      trained: Numbers trained.
      weight_bytes: Bytes of the weights.
      gradient_bytes: Bytes of the gradient, in factor coordinates where adapted.
      state_bytes: Bytes of the inner rule's state, of a master copy, and of what a
        transformation in front keeps.
      sketch_bytes: Bytes of the cached sketches.
      traffic_bytes: Bytes a data-parallel all-reduce carries per step.
    """

    trained: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    sketch_bytes: int
    traffic_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Cost):
    """The cost of one leaf, and why.

    Args:
      path: Canonical path.
      view: How the leaf is read, ``[batch] x rows x cols``.
      mode: ``"lowrank"``, ``"dense"`` or ``"frozen"``.
      why: What decided the mode.
      rank: Rank of the sketch, 0 if not adapted.
      side: Sketched side, or the probability of the left one where it is drawn; empty
        if not adapted.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``; 1 for dense.
    """

    path: str
    view: str
    mode: str
    why: str
    rank: int
    side: str
    lam: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What ``summary`` returns: print it, or read its fields.

    Args:
      rows: One ``Row`` per leaf, in tree order.
      total: The run itself; counters included.
      full: Full fine-tuning with Adam, float32 moments.
      lora: LoRA of the same ranks, both factors trained, Adam.
      warnings: What to look at again.
      peak_bytes: What a whole compiled step holds at once, with donated params and
        state; ``None`` without a loss.
      in_backward: Paths of the leaves that a fused step updates inside the backward
        pass; ``None`` where the step is not fused.
    """

    rows: tuple[Row, ...]
    total: Cost
    full: Cost
    lora: Cost
    warnings: tuple[str, ...]
    peak_bytes: int | None = None
    in_backward: tuple[str, ...] | None = None

    def __str__(self) -> str:
        head = "path view mode rank side lambda trained weights gradient state sketch"
        lines: list[tuple[str, ...]] = [(*head.split(), "traffic")]
        lines += [
            (row.path or "(leaf)", row.view, row.mode, *_adapted_cells(row), *_costs(row))
            for row in self.rows
        ]
        for name, cost in (
            ("total", self.total),
            ("full fine-tuning, Adam", self.full),
            ("LoRA, Adam", self.lora),
        ):
            lines.append((name, "", "", "", "", "", *_costs(cost)))
        notes = [f"warning: {text}" for text in self.warnings]
        if self.peak_bytes is not None:
            notes.insert(0, f"peak of a compiled step: {_human(self.peak_bytes)}")
        if self.in_backward is not None:
            notes.insert(0, _in_backward(self.rows, self.in_backward))
        return "\n".join([*_aligned(lines), *notes])


def _in_backward(rows: tuple[Row, ...], moving: tuple[str, ...]) -> str:
    adapted = [row.path for row in rows if row.rank]
    others = [path for path in adapted if path not in moving]
    said = f"moved layer by layer in a scan: {len(moving)} of {len(adapted)} leaves"
    if not others:
        return said
    listed = ", ".join(map(paths.show, others[:8]))
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return f"{said}; each as one: {listed}{more}"


def _adapted_cells(row: Row) -> tuple[str, str, str]:
    if row.mode != "lowrank":
        return "", "", ""
    return str(row.rank), row.side, f"{row.lam:.3g}"


def _costs(cost: Cost) -> tuple[str, ...]:
    held = (cost.weight_bytes, cost.gradient_bytes, cost.state_bytes, cost.sketch_bytes)
    return f"{cost.trained:,}", *map(_human, (*held, cost.traffic_bytes))


def _human(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 3  # path, view and mode are words; what follows is numbers

    def pad(index: int, cell: str) -> str:
        width = widths[index]
        return cell.ljust(width) if index < words else cell.rjust(width)

    text = ["  ".join(pad(i, c) for i, c in enumerate(line)).rstrip() for line in lines]
    return [text[0], "-" * len(text[0]), *text[1:-3], "-" * len(text[0]), *text[-3:]]
