"""What a checkpoint says of itself, under a digest of its own."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_FORMAT = 2


def sealed(step: int, **said: Any) -> dict[str, Any]:
    """The meta of a checkpoint: what it says, its step, and SHA-256 of both.

    Args:
      step: The step it is saved under.
      **said: What JSON can hold, with strings for keys.
    """
    meta = {"format": _FORMAT, "step": step, **said}
    return meta | {"digest": _digest(meta)}


def opened(meta: Any, step: int) -> dict[str, Any]:
    """What ``sealed`` gave, as it is read back under a step.

    Raises:
      ValueError: If it is not what was written, or was written for another step.
    """
    if not isinstance(meta, dict) or "digest" not in meta:
        raise ValueError(
            "its meta has no digest: it is damaged, or of an older raclora_jax"
        )
    if _digest({k: meta[k] for k in meta if k != "digest"}) != meta["digest"]:
        raise ValueError("its meta is not what was written")
    if meta.get("step") != step:
        raise ValueError(f"it was saved as step {meta.get('step')} and has been renamed")
    return meta


def check_format(meta: dict[str, Any]) -> None:
    """Refuses a whole checkpoint of another version."""
    if meta["format"] != _FORMAT:
        raise ValueError(
            f"the checkpoint of step {meta['step']} has format {meta['format']!r}, this "
            f"version of raclora_jax reads {_FORMAT}; restore it with the version that "
            "wrote it"
        )


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
