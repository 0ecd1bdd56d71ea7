"""Where a run stands: its step, and every process's position in the data as text."""

from __future__ import annotations

import base64
import json
from typing import Any

import jax

from raclora_jax._core.checks import kind


def as_text(data: Any) -> str:
    """The position in the data as JSON text."""
    if isinstance(data, bytes):
        return json.dumps({"bytes": base64.b64encode(data).decode()})
    try:
        _check_keys(data)
        return json.dumps({"json": data})
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"data must be bytes or what JSON can hold, got {kind(data)}: {error}; pass "
            "for example iterator.get_state()"
        ) from error


def _check_keys(data: Any) -> None:
    """Refuses keys that JSON would turn to strings without a word."""
    inside = list(data) if isinstance(data, list | tuple) else []
    if isinstance(data, dict):
        for name in data:
            if not isinstance(name, str):
                raise TypeError(f"a key must be a str, got {kind(name)}")
        inside = list(data.values())
    for part in inside:
        _check_keys(part)


def own(texts: list[str], step: int) -> Any:
    """This process's position in the data."""
    count, index = jax.process_count(), jax.process_index()
    # One position for all may go on with any number of processes.
    if len(texts) != count and len(set(texts)) > 1:
        raise ValueError(
            f"the checkpoint of step {step} holds the data positions of {len(texts)} "
            f"processes, which differ, and this run has {count}; go on with as many, or "
            "keep one position for all, such as a count of global batches"
        )
    said = json.loads(texts[index if len(texts) == count else 0])
    return base64.b64decode(said["bytes"]) if "bytes" in said else said["json"]
