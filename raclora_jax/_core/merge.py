"""Weights plus what was learned of them, rounded once."""

from __future__ import annotations

import jax
from jax import Array

from raclora_jax._core.layout import automatically
from raclora_jax._core.lowrank import Laid, add_lifted
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.rounding import places_of, settle
from raclora_jax._core.select import place, take
from raclora_jax._core.types import Drawn, FactorValue, Scalar


def merge_leaf(
    weight: Array,
    factor: FactorValue,
    sketch: Drawn,
    decay: Scalar,
    plan: LeafPlan,
    rounding: str,
    key: Array | None,
    start: Array | None = None,
) -> Array:
    """``W + (lift(F) - decay * W)`` on the grid of the weight's dtype.

    Where the sketch picks rows and nothing decays, those rows alone are read, rounded and
    written. That nothing decays must be known while the program is traced.

    Args:
      weight: Array of ``plan.shape``.
      factor: Array of ``plan.factor_shape``, or both factors.
      sketch: Array of ``plan.sketch_shape``, or both sketches.
      decay: Scalar.
      plan: Plan of the leaf.
      rounding: As in ``Spec``.
      key: Key for rounding; ``None`` from float32 up.
      start: Where the weight begins in the leaf it is a slice of; uint32 scalar.

    Returns:
      Array of ``plan.shape`` in the dtype of the weight.
    """

    still = not isinstance(decay, jax.core.Tracer) and float(decay) == 0
    return automatically(
        lambda weight, factor, sketch, decay, key, start: _merge(
            weight, factor, sketch, decay, key, start, plan, rounding, still
        ),
        plan.sharding,
        weight,
        factor,
        sketch,
        decay,
        key,
        start,
    )


def _merge(
    weight: Array,
    factor: FactorValue,
    sketch: Drawn,
    decay: Scalar,
    key: Array | None,
    start: Array | None,
    plan: LeafPlan,
    rounding: str,
    still: bool,
) -> Array:
    def settled(exact: Array, positions: Array | None = None) -> Array:
        if key is not None:
            exact = settle(exact, weight.dtype, rounding, key, positions)
        return exact.astype(weight.dtype)

    places = None if start is None else start + places_of(weight.shape)
    if plan.selection is None or not still:
        return settled(add_lifted(weight, factor, sketch, decay, plan), places)
    laid, chosen = Laid.of(plan), plan.selection
    base = laid.gather(weight)
    places = laid.gather(places_of(weight.shape) if places is None else places)
    rows, positions = (
        take(array, sketch, chosen, laid.axis, laid.batch) for array in (base, places)
    )
    step = laid.rows((plan.scaling * factor).astype(plan.wide_dtype))
    rows = settled(rows.astype(plan.wide_dtype) + step, positions)
    return laid.scatter(place(base, rows, sketch, chosen, laid.axis, laid.batch))
