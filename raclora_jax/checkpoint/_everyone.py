"""What the processes of a run tell one another on the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from raclora_jax._core import paths

T = TypeVar("T")


def everyone(said: str) -> list[str]:
    """What every process says, in their order; also a place where they meet."""
    if jax.process_count() == 1:
        return [said]
    raw = said.encode()
    # Arrays that are gathered have one shape in all processes: first how long the texts
    # are, then the texts, filled up.
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def agreed(digests: dict[str, int]) -> dict[str, int]:
    """The digests, if every process has the same: of numpy's arrays one is written."""
    for text in everyone(json.dumps(digests)):
        for path, digest in json.loads(text).items():
            if digests.get(path) != digest:
                raise ValueError(
                    f"leaf {paths.show(path)} has other numbers in another process, and "
                    "a checkpoint holds one array; keep what each process has of its own "
                    "in data="
                )
    return digests


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Does something in every process, and tells each if it failed in any.

    Args:
      work: What to do; it must not wait for other processes, so that one that fails
        leaves none behind.

    Returns:
      What it gave here, and one line of why it failed, empty if it did nowhere.
    """
    found, reason = None, ""
    try:
        found = work()
    # A damaged file shows as anything: tensorstore raises plain ``Exception`` too.
    except Exception as error:
        reason = one_line(error)
    return found, next((said for said in everyone(reason) if said), "")


def one_line(error: BaseException) -> str:
    """An error in one line of readable length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")
