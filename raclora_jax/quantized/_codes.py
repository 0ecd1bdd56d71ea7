"""One leaf in codes: quantised like another, its rounding error in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix
from jax import Array

from raclora_jax._core import paths, rounding
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Leaf, Leaves, PyTree, widened
from raclora_jax._forms.adapter import is_quantised

# The largest code of an error: symmetric, so that both signs are rounded alike.
LARGEST = 127


def requantised(
    exact: Array, like: qwix.QArray, key: Array | None
) -> tuple[qwix.QArray, qwix.QArray]:
    """Wide weights as codes like those of another leaf, and the error of that."""
    sizes = zip(exact.shape, like.scale.shape, strict=True)
    quantised = qwix.quantize(
        exact,
        like.qtype,
        tiled_axes={axis: size // count for axis, (size, count) in enumerate(sizes)},
        calibration_method="absmax" if like.zero_point is None else "minmax",
    )
    scale = quantised.scale
    # Rounded by bits: the compiler may leave out a cast to 16 bits and back, and the
    # error would then be that of other scales than the ones that are stored.
    if rounding.is_low(like.dtype):
        scale = rounding.nearest(scale, like.dtype)
    quantised = qwix.QArray(quantised.qvalue, scale, quantised.zero_point, like.qtype)
    error = coded(exact - qwix.dequantize(quantised), scale.shape, key)
    return quantised.astype(like.dtype), error


def coded(error: Array, counts: tuple[int, ...], key: Array | None) -> qwix.QArray:
    """An error in 8 bits, in units of the largest of its block."""
    sizes = zip(error.shape, counts, strict=True)
    blocks = error.reshape([n for size, count in sizes for n in (count, size // count)])
    largest = jnp.max(jnp.abs(blocks), range(1, blocks.ndim, 2), keepdims=True)
    # A block without error would have the scale 0, and 0 / 0 is NaN.
    scale = jnp.maximum(largest / LARGEST, jnp.finfo(error.dtype).tiny)
    units = blocks / scale
    codes = jnp.round(units) if key is None else rounding.integers(units, key)
    codes = jnp.clip(codes, -LARGEST, LARGEST).astype(jnp.int8)
    return qwix.QArray(codes.reshape(error.shape), scale.reshape(counts))


def wide(leaf: qwix.QArray) -> Array:
    """Codes times scales in at least float32, where the product is exact or nearly so."""
    return qwix.dequantize(leaf.astype(widened(leaf.dtype)))


def empty(plan: LeafPlan, qtype: str, block: int | None) -> qwix.QArray:
    """What a leaf is to look like: the type, and the shape and dtype of the scales."""
    # Without blocks one scale a column; a block lies along the last axis of the rows, and
    # every place on their other axes has scales of its own.
    counts = [1 if axis in plan.rows else size for axis, size in enumerate(plan.shape)]
    if block is not None:
        for axis in plan.rows[:-1]:
            counts[axis] = plan.shape[axis]
        counts[plan.rows[-1]] = plan.shape[plan.rows[-1]] // block
    codes = jax.ShapeDtypeStruct(plan.shape, jnp.int8)
    scale = jax.ShapeDtypeStruct(tuple(counts), jnp.dtype(plan.dtype))
    return qwix.QArray(codes, scale, None, qtype)


def check_quantisable(leaf: Leaf, plan: LeafPlan, block: int | None) -> None:
    where = f"leaf {paths.show(plan.path)} of shape {plan.shape}"
    if is_quantised(leaf):
        raise ValueError(
            f"{where} is quantised already ({leaf.qtype}); start its error with "
            "zero_error"
        )
    if block is not None and plan.shape[plan.rows[-1]] % block:
        raise ValueError(
            f"{where}: a block of {block} does not divide {plan.shape[plan.rows[-1]]}, "
            f"its axis {plan.rows[-1]}; choose a divisor, or leave block out for one "
            "scale a column"
        )
    if isinstance(leaf, jax.core.Tracer):
        return
    # A leaf of numbers may be closed over by somebody's trace.
    with jax.ensure_compile_time_eval():
        finite = bool(jnp.isfinite(leaf).all())
    if not finite:
        raise ValueError(f"{where} holds numbers that are not finite")


def none(leaves: Leaves) -> dict[str, Any]:
    return {path: optax.MaskedNode() for path in leaves}


def matched(
    error: PyTree, leaves: Leaves, plans: Mapping[str, LeafPlan] | None
) -> dict[str, qwix.QArray]:
    """The errors by path, each with the shape of its leaf; of trained leaves all."""
    errors, _ = paths.flatten(error, is_leaf=is_quantised)
    for path, one in errors.items():
        leaf = leaves.get(path)
        if leaf is None or not (is_quantised(leaf) and is_quantised(one)):
            raise ValueError(
                f"error {paths.show(path)} belongs to no quantised leaf of base_params; "
                "make the errors with quantize or zero_error"
            )
        if (one.shape, one.scale.shape) != (leaf.shape, leaf.scale.shape):
            raise ValueError(
                f"error {paths.show(path)}: expected shape {leaf.shape} with scales of "
                f"{leaf.scale.shape}, got {one.shape} with {one.scale.shape}; make it "
                "with quantize or zero_error"
            )
    for path, plan in (plans or {}).items():
        if is_quantised(leaves[path]) and plan.mode != "frozen" and path not in errors:
            raise ValueError(
                f"leaf {paths.show(path)} is quantised and trained but has no error to "
                "carry; make the errors with quantize or zero_error"
            )
    return errors
