"""What ``flax.serialization`` saves of nodes that are this library's own."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any


def tell_flax(kind: type[Any], *fields: str) -> None:
    """Lets ``flax.serialization`` save a dataclass, in a program that has imported it.

    What is static of a node has no place in a state dict: a restored one takes that of
    its template.

    Args:
      kind: The dataclass.
      *fields: Those of its fields that hold arrays.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is None:
        return

    def saved(node: Any) -> dict[str, Any]:
        return {f: serialization.to_state_dict(getattr(node, f)) for f in fields}

    def restored(node: Any, state: dict[str, Any]) -> Any:
        arrays = {
            f: serialization.from_state_dict(getattr(node, f), state[f], name=f)
            for f in fields
        }
        return dataclasses.replace(node, **arrays)

    serialization.register_serialization_state(kind, saved, restored, override=True)
