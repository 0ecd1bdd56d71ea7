"""What pages call the methods of the rows."""

from __future__ import annotations

import re


def named(method: str) -> str:
    """A method by the name that pages use; rows say ``ours`` for RAC-LoRA."""
    return re.sub(r"\bours\b", "RAC-LoRA", method)
