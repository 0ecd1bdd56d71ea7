"""What a model was seen to do with its leaves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from typing import NamedTuple

from jax import Array

from raclora_jax._core import paths


class Use(NamedTuple):
    """The axes of a leaf as one operation of the model used them.

    Attributes:
      contracted: Those that it sums over, or looks up along.
      batch: Those that it takes one by one.
      is_lookup: Whether it looks up.
    """

    contracted: frozenset[int]
    batch: frozenset[int]
    is_lookup: bool = False


@dataclasses.dataclass
class Uses:
    """What a model was seen to do with its leaves.

    Attributes:
      found: ``{path: uses}`` in the order of the program.
      fallbacks: ``{(path, operation): times}`` for uses that formed a dense gradient.
      lost: ``{path: operation}`` for leaves that an operation read in a way that shows
        no view.
      tokens: What scans that update their leaves gave to be differentiated.
    """

    found: dict[str, list[Use]] = dataclasses.field(default_factory=dict)
    fallbacks: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    tokens: list[Array] = dataclasses.field(default_factory=list)

    def warn(self) -> None:
        """One warning for all the uses that formed a dense gradient."""
        if self.fallbacks:
            listed = [f"{paths.show(path)} by {name}" for path, name in self.fallbacks]
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            named = "|".join(dict.fromkeys(re.escape(path) for path, _ in self.fallbacks))
            warnings.warn(
                "these uses of adapted leaves have no rule in factor coordinates, so "
                "their gradients are formed in full and projected: "
                f"{', '.join(listed[:8])}{more}; the numbers are the same, but where "
                "that much memory is spent a leaf may as well be trained in full, with "
                f"Rule({named!r}, mode='dense')",
                stacklevel=user_level(),
            )


def user_level() -> int:
    """The ``stacklevel`` of a warning that points at the line of the user's.

    It is not the same for every caller: ``jit`` and ``grad`` put frames of JAX between.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_back is not None:
        package, _, _ = frame.f_globals.get("__name__", "").partition(".")
        if package not in ("jax", "raclora_jax"):
            break
        frame, level = frame.f_back, level + 1
    return level
