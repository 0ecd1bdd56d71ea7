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
    """Back again: one step a link; a link without factors was skipped."""
    links: list[Arrays] = [{} for _ in range(since, until)]
    for name, array in arrays.items():
        link, path = name.split("/", 1)
        links[int(link) - since][path] = array
    return [
        fed.Step(fed.Trained(factors, {}) if factors else None, {}, link, stamp)
        for link, factors in enumerate(links, since)
    ]
