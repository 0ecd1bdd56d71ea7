"""Merged factors as arrays by name: on the wire, and in the file beside the log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedrac.wire import Arrays
from raclora_jax import federated as fed


def arrays_of(steps: Sequence[fed.Step], since: int) -> Arrays:
    """The factors of the steps from link ``since`` on, ``{"link/path": array}``."""
    return {
        f"{link}/{path}": np.asarray(factor)
        for link, step in enumerate(steps[since:], since)
        if step.trained is not None
        for path, factor in step.trained.factors.items()
    }


def steps_of(arrays: Arrays, since: int, until: int, stamp: str) -> list[fed.Step]:
    """Back again: one step a link; a link without factors was skipped.

    Raises:
      ValueError: If an array is of no link from ``since`` to ``until - 1``.
    """
    links: dict[int, Arrays] = {}
    for name, array in arrays.items():
        link, _, path = name.partition("/")
        if not (link.isdecimal() and since <= int(link) < until and path):
            raise ValueError(
                f"the array {name!r} is of no link from {since} to {until - 1}"
            )
        links.setdefault(int(link), {})[path] = array
    return [
        fed.Step(fed.Trained(links[link], {}) if link in links else None, {}, link, stamp)
        for link in range(since, until)
    ]
