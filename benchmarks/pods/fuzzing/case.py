"""One damaged thing to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged thing, how it is read, and what reading it may give.

    Attributes:
      name: What was damaged, for the report.
      read: Reads the damaged thing through the public API.
      right: Whether what was read is what was meant, or the damage harmless; ``False``
        is a silent fault.
    """

    name: str
    read: Callable[[], Any]
    right: Callable[[Any], bool]
