"""Where a leaf's factor and sketch live, as the leaf's own sharding says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

from jax.sharding import NamedSharding

from raclora_jax._core import paths
from raclora_jax._core.layout import Inherited, inherited
from raclora_jax._core.plan import LeafPlan


@functools.lru_cache(maxsize=4096)
def factor_layout(plan: LeafPlan) -> Inherited | None:
    """The sharding that the factor has from the leaf, ``None`` where it has none."""
    if plan.sharding is None:
        return None
    axes = (*plan.batch, None, *plan.trained)
    return inherited(plan.sharding, plan.factor_shape, axes)


@functools.lru_cache(maxsize=4096)
def sketch_layout(plan: LeafPlan) -> Inherited | None:
    """The sharding that the sketch has from the leaf, ``None`` where it has none."""
    if plan.sharding is None:
        return None
    if plan.selection is None:
        axes = (*plan.batch, None, *plan.sketched)
        return inherited(plan.sharding, plan.sketch_shape, axes)
    # A few numbers: only stacks are worth sharding.
    axes = (*plan.batch, *(None for _ in plan.sketch_shape[len(plan.batch) :]))
    return inherited(plan.sharding, plan.sketch_shape, axes, spread=False)


def factor_sharding(plan: LeafPlan) -> NamedSharding | None:
    """How the factor is sharded."""
    found = factor_layout(plan)
    return None if found is None else found.sharding


def sketch_sharding(plan: LeafPlan) -> NamedSharding | None:
    """How the sketch is sharded."""
    found = sketch_layout(plan)
    return None if found is None else found.sharding


def trained_sharding(plan: LeafPlan) -> NamedSharding | None:
    """How what is trained is sharded: the factor or the leaf."""
    if plan.mode == "frozen":
        return None
    return factor_sharding(plan) if plan.adapted else plan.sharding


def tell_lacking(plans: Iterable[LeafPlan]) -> None:
    """One warning for all arrays held in full along mesh axes of their leaves."""
    found = [
        f"the {what} of {paths.show(plan.path)} {shape} along {', '.join(place.lacking)}"
        for plan in plans
        if plan.adapted and plan.sharding is not None
        for one in plan.each
        for what, shape, place in (
            ("factor", one.factor_shape, factor_layout(one)),
            ("sketch", one.sketch_shape, sketch_layout(one)),
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
