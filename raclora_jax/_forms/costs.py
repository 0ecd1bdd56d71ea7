"""Costs of a run by leaf and in all, as records and as a table."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap

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

    Printed it is 100 columns wide at most: the run beside LoRA and full fine-tuning, then
    its leaves, where equal ones of several layers share a line that has their sum.

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
        totals = [
            ("this run", *_costs(self.total)),
            ("LoRA, Adam", *_costs(self.lora)),
            ("full fine-tuning, Adam", *_costs(self.full)),
        ]
        notes = [f"warning: {text}" for text in self.warnings]
        if self.peak_bytes is not None:
            notes.insert(0, f"peak of a compiled step: {_human(self.peak_bytes)}")
        if self.in_backward is not None:
            notes.insert(0, _in_backward(self.rows, self.in_backward))
        parts = [_table(("", *_COSTS), totals, words=1), _leaves(self.rows)]
        parts += [[line for note in notes for line in _wrapped(note)]] if notes else []
        return "\n\n".join("\n".join(part) for part in parts)

    def by_leaf(self) -> str:
        """Every leaf and all that is known of it, one line each, as wide as it gets.

        Returns:
          A table with the fields of ``rows``.

        Example:
          >>> import jax, raclora_jax as rl
          >>> layers = [{"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}] * 3
          >>> lines = rl.summary({"layers": layers}, 8).by_leaf().splitlines()
          >>> [line.split()[0] for line in lines[2:]]
          ['layers/0/kernel', 'layers/1/kernel', 'layers/2/kernel']
        """
        head = ("leaf", "view", "mode", "why", "rank", "side", "lambda", *_COSTS)
        lines = [
            (_name(row.path), row.view, row.mode, row.why, *_sketch(row), *_costs(row))
            for row in self.rows
        ]
        return "\n".join(_table(head, lines, words=4))


_WIDTH = 100
_COSTS = ("trained", "weights", "gradient", "state", "sketch", "traffic")

# For each number in a path, those that it is.
_Box = tuple[tuple[str, ...], ...]


def _leaves(rows: tuple[Row, ...]) -> list[str]:
    """A table with one line for all leaves that differ in numbers of their paths alone.

    Such a line has the sum over its leaves, so that numbers add up to those of the run,
    and bytes too, but for its counters.
    """
    lines: list[tuple[str, ...]] = []
    for path, row, count in _collapsed(rows):
        rank, side, lam = _sketch(row)
        lines.append(
            (
                _name(path),
                row.view if count == 1 else f"{count} of {row.view}",
                rank if row.mode == "lowrank" else row.mode,
                side,
                lam,
                f"{count * row.trained:,}",
                _human(count * row.state_bytes),
            )
        )
    head = ("leaf", "view", "rank", "side", "lambda", "trained", "state")
    others = list(zip(head, *lines, strict=True))[1:]
    room = _WIDTH - sum(2 + max(map(len, column)) for column in others)
    lines = [(_shortened(name, room), *cells) for name, *cells in lines]
    return _table(head, lines, words=2)


def _collapsed(rows: tuple[Row, ...]) -> list[tuple[str, Row, int]]:
    """Rows as ``(path, row, count)``: ``layers/{0..11}/kernel`` for twelve equal ones."""
    alike: dict[tuple[Row, tuple[str, ...]], list[list[str]]] = {}
    for row in rows:
        words = re.split("([0-9]+)", row.path)
        key = dataclasses.replace(row, path=""), tuple(words[::2])
        alike.setdefault(key, []).append(words[1::2])
    found = []
    for (row, between), numbers in alike.items():
        for box in _products(numbers):
            spans = [*map(_span, box), ""]
            path = "".join(map("".join, zip(between, spans, strict=True)))
            found.append((path, row, math.prod(map(len, box))))
    return found


def _products(numbers: list[list[str]]) -> list[_Box]:
    """Lists of numbers as products of sets, which hold each of them once."""
    boxes: list[_Box] = [tuple((number,) for number in one) for one in numbers]
    # (0, 1), (0, 2), (1, 1), (1, 2): by the last place (0, {1, 2}), (1, {1, 2}), and then
    # by the first ({0, 1}, {1, 2}).
    for place in reversed(range(len(boxes[0]))):
        joined: dict[tuple[_Box, _Box], list[str]] = {}
        for box in boxes:
            joined.setdefault((box[:place], box[place + 1 :]), []).extend(box[place])
        boxes = [
            (*before, tuple(sorted(values, key=int)), *after)
            for (before, after), values in joined.items()
        ]
    return boxes


def _span(numbers: tuple[str, ...]) -> str:
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = ", ".join(run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return said if len(numbers) == 1 else f"{{{said}}}"


def _in_backward(rows: tuple[Row, ...], moving: tuple[str, ...]) -> str:
    adapted = [row.path for row in rows if row.rank]
    others = [path for path in adapted if path not in moving]
    said = f"moved layer by layer in a scan: {len(moving)} of {len(adapted)} leaves"
    if not others:
        return said
    listed = ", ".join(map(paths.show, others[:8]))
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return f"{said}; each as one: {listed}{more}"


def _name(path: str) -> str:
    return path or "(leaf)"


def _sketch(row: Row) -> tuple[str, str, str]:
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


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]], words: int) -> list[str]:
    """Aligned columns; the first ones are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        pairs = list(zip(cells, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[:words]]
        right = [cell.rjust(width) for cell, width in pairs[words:]]
        return "  ".join(left + right).rstrip()

    text = [line(cells) for cells in (head, *lines)]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def _shortened(path: str, width: int) -> str:
    """A path without its middle, where it is too long: the end tells leaves apart."""
    if len(path) <= width:
        return path
    room = max(width - len("..."), 1)
    return f"{path[: room // 3]}...{path[len(path) - (room - room // 3) :]}"


def _wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
