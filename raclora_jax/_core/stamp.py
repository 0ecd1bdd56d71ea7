"""What every function of a run must be told alike, and the check that it was."""

from __future__ import annotations

from typing import NamedTuple

from raclora_jax._core import paths


class Stamp(NamedTuple):
    """What every function of a run must be told alike about one adapted leaf.

    It travels with factors and chains as static metadata: compared while a program is
    traced, absent when it runs. Fields as in ``LeafPlan``; where the side is drawn,
    ``side`` is its chance and ``scaling`` has two numbers. With the weight it makes the
    plan again.
    """

    shape: tuple[int, ...]
    rank: int
    side: str | float
    rows: tuple[int, ...]
    batch: tuple[int, ...]
    scaling: float | tuple[float, ...]
    law: str
    resample_every: int
    rounding: str


def check_stamp(path: str, stamp: Stamp, wanted: Stamp, what: str) -> None:
    """Refuses what was made under another plan of a leaf.

    Args:
      path: Canonical path of the leaf.
      stamp: The stamp it carries.
      wanted: The stamp of the function it came to.
      what: What it is, for the message.

    Raises:
      ValueError: If a field differs; the message names it.
    """
    if stamp == wanted:
        return
    if stamp.shape != wanted.shape:
        raise ValueError(
            f"leaf {paths.show(path)} has shape {wanted.shape}, and {what} was made for "
            f"one of shape {stamp.shape}; hand the same leaves to every function of a run"
        )
    for name, theirs, mine in zip(Stamp._fields, stamp, wanted, strict=True):
        if theirs != mine:
            said = {"scaling": "alpha / rank", "law": "sketch"}.get(name, name)
            raise ValueError(
                f"leaf {paths.show(path)}: {what} was made with {said}={theirs!r}, "
                f"this spec has {said}={mine!r}; hand the same spec to every function "
                "of a run"
            )
