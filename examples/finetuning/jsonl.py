"""Rows of JSON, one a line."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any


def write(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Some rows, in place of what the file held."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(file)


def rows(file: pathlib.Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a file that this program wrote; the last may be cut short by a kill.

    Args:
      file: There need be none.
      names: What every row holds.

    Raises:
      ValueError: If a line is no such row.
    """
    if not file.exists():
        return []
    found = []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            for name in names:
                row[name] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, line {number}: expected an object with numbers for "
                f"{', '.join(names)}, got {text[:40]!r}; remove the line, or name "
                "another --out"
            ) from error
        found.append(row)
    return found
