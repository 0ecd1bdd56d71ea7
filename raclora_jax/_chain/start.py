"""The state before the first update."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan


def tell_lacking(plans: Iterable[LeafPlan]) -> None:
    """One warning for all arrays held in full along mesh axes of their leaves."""
    found = [
        f"the {what} of {paths.show(plan.path)} {shape} along {', '.join(place.lacking)}"
        for plan in plans
        if plan.adapted and plan.sharding is not None
        for one in plan.each
        for what, shape, place in (
            ("factor", one.factor_shape, one.factor_inherited),
            ("sketch", one.sketch_shape, one.sketch_inherited),
        )
        if place is not None and place.lacking
    ]
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        warnings.warn(
            "these arrays are held in full along mesh axes of their leaves, which divide "
            f"none of their axes: {'; '.join(found[:8])}{more}; a mesh with shorter axes "
            "would shard them",
            stacklevel=3,
        )
