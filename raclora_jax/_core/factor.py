"""A leaf in factor coordinates: its gradient, or an update that knows its sketch."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._core import paths, rounding
from raclora_jax._core.picks import Picks
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.planning import shape_and_dtype
from raclora_jax._core.sharding import sharding_of, zeros
from raclora_jax._core.sides import (
    BothSketches,
    factor_shapes,
    in_link,
    shapes,
    zero_sketch,
)
from raclora_jax._core.stamp import Stamp, check_stamp
from raclora_jax._core.types import Drawn, FactorValue, Leaf

# What an update carries for its way to the weights is arrays of its tree, so what a rule
# does to its numbers it does to them: a rule that scales keeps them in proportion, and a
# norm or a clip must not see them. A power of two, so that nothing is rounded.
_FAINT = 2.0**-40


class Origin(NamedTuple):
    """What an update needs to reach its weight, at 2^-40 of its size; in a gradient zero.

    A gradient has one so that it is built like its update: ``lax.cond`` then takes a step
    in one branch and none in the other, as ``optax.apply_if_finite`` does. Compiled, the
    zeros and the change of size are gone.

    Attributes:
      sketch: The sketch that the factor is lifted on; whole numbers as two halves.
      key: Two words of a key for rounding, as halves; zero where nothing is drawn.
      master: The new float32 copy of the weight; ``None`` where the state has none.
      unit: What one is carried as: scalar, by which later rules show how they scaled.
    """

    sketch: Drawn
    key: Array
    master: Array | None
    unit: Array

    @classmethod
    def of(
        cls, plan: LeafPlan, sketch: Drawn, key: Array | None, master: Array | None
    ) -> Origin:
        """Sketch, key and master copy of an update, made faint."""
        words = _no_words() if key is None else _halves(jax.random.key_data(key))
        drawn = jax.tree.map(lambda one: _floating(one, plan), sketch)
        one = jnp.ones((), plan.wide_dtype)
        return jax.tree.map(lambda array: array * _FAINT, cls(drawn, words, master, one))

    @classmethod
    def blank(cls, plan: LeafPlan) -> Origin:
        """That of a gradient."""
        drawn = jax.tree.map(
            lambda one: jnp.zeros_like(_floating(one, plan)), zero_sketch(plan)
        )
        master = None
        if rounding.is_low(plan.dtype) and plan.rounding == "master":
            master = zeros(plan.shape, plan.wide_dtype, plan.sharding)
        return cls(drawn, _no_words(), master, jnp.zeros((), plan.wide_dtype))

    def read(self, plan: LeafPlan) -> Read:
        """What ``of`` made faint, also when a later rule has scaled it."""
        gone = self.unit == 0
        one = jnp.where(gone, 0, 1 / jnp.where(gone, 1, self.unit))
        whole = jax.tree.map(lambda array: array * one.astype(array.dtype), self)
        key = None
        if rounding.is_low(plan.dtype):
            key = jax.random.wrap_key_data(_words(whole.key), impl="threefry2x32")
        return Read(_as_drawn(whole.sketch, plan), key, whole.master, gone)


class Read(NamedTuple):
    """An ``Origin`` at its own size.

    Attributes:
      sketch: As the state has it.
      key: A typed key, or ``None``.
      master: As the state has it, or ``None``.
      gone: Whether a rule took the update to zero, and all this with it.
    """

    sketch: Drawn
    key: Array | None
    master: Array | None
    gone: Array


def _no_words() -> Array:
    return jnp.zeros((2, 2), jnp.float32)


def _halves(words: Array) -> Array:
    """Words of 32 bits as pairs of whole float32 numbers below 2^16."""
    # A float32 has 24 bits: 8 are left for what scaling and its undoing round off.
    words = words.astype(jnp.uint32)
    return jnp.stack([words >> 16, words & 0xFFFF], axis=-1).astype(jnp.float32)


def _words(halves: Array) -> Array:
    """What ``_halves`` took apart, also when it was scaled and scaled back."""
    whole = jnp.round(halves).astype(jnp.uint32)
    return (whole[..., 0] << 16) | whole[..., 1]


def _floating(array: Array, plan: LeafPlan) -> Array:
    """Part of a sketch as real numbers: a matrix, picked rows, or which side is used."""
    if jnp.issubdtype(array.dtype, jnp.integer):
        return _halves(array)
    return array.astype(plan.wide_dtype)


def _as_drawn(carried: Drawn, plan: LeafPlan) -> Drawn:
    """The sketch that ``_floating`` made real numbers of, or those of both sides."""
    if plan.sides:
        left, right = (_as_drawn(in_link(carried, one), one) for one in plan.sides)
        return BothSketches(left, right, carried.is_left > 0.5)
    if isinstance(carried, Picks):
        index = _words(carried.index).astype(plan.sketch_dtype)
        return dataclasses.replace(carried, index=index)
    return carried


class _Named(type):
    """How JAX names the class where two trees do not fit.

    A rule of optax that reads weights beside updates fails in JAX, before any code of
    this library runs: the name is what a user gets to read.
    """

    def __repr__(cls) -> str:
        return (
            "raclora_jax.Factor, a gradient or an update in factor form, which has not "
            "the structure of a weight: for optax.add_decayed_weights write raclora(..., "
            "weight_decay=..., mask=...), and give optax.masked and optax.partition a "
            "tree of flags or labels, or a function that takes a Factor for one leaf"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor(metaclass=_Named):
    """A gradient or an update of one adapted leaf in factor coordinates.

    It stands for ``lift(value) - decay * W``: decoupled weight decay does not fit in
    ``rank x n`` and travels beside it. An update knows the sketch it is lifted on, so
    that ``raclora_jax.apply_updates`` needs no state and no spec.

    Args:
      value: Array ``(batch..., rank, *axes of the other side)``; where the side is drawn
        a pair of them, ``left`` and ``right``, of which lifting reads the one in use.
      decay: Scalar; 0 in a gradient, ``learning_rate * weight_decay`` in an update.
      stamp: Static; the facts of the run it was made in, so that no function of another
        spec takes it. ``None`` for one made by hand, of which only the shape is known.
      origin: Sketch and rounding key of an update; ``None`` for one made by hand.
    """

    value: FactorValue
    decay: Array | np.ndarray
    stamp: Stamp | None = dataclasses.field(default=None, metadata={"static": True})
    origin: Origin | None = None

    @classmethod
    def gradient(cls, value: FactorValue, plan: LeafPlan) -> Factor:
        """A gradient of a leaf."""
        decay = jnp.zeros((), plan.wide_dtype)
        return cls(value, decay, plan.stamp, Origin.blank(plan))

    def __radd__(self, weight: Leaf) -> NoReturn:
        raise TypeError(
            "a Factor update cannot be added to weights as it stands: in place of "
            "optax.apply_updates(params, updates) call "
            "raclora_jax.apply_updates(params, updates)"
        )


def is_factor(node: Leaf) -> bool:
    """Whether a node is a ``Factor``, for ``is_leaf``."""
    return isinstance(node, Factor)


def check_factor(factor: Leaf, plan: LeafPlan) -> None:
    """Refuses a factor that cannot belong to the leaf.

    Args:
      factor: A ``Factor``, or the array in one.
      plan: Plan of the leaf.

    Raises:
      ValueError: If the leaf is not adapted, or shape or stamp differ.
    """
    value = factor.value if is_factor(factor) else factor
    if not plan.adapted:
        raise ValueError(
            f"leaf {paths.show(plan.path)} is {plan.mode} in this spec but came as a "
            "Factor; use the spec the factors were made with"
        )
    if is_factor(factor) and factor.stamp is not None:
        check_stamp(plan.path, factor.stamp, plan.stamp, "this Factor")
    if shapes(value) != factor_shapes(plan):
        raise ValueError(
            f"leaf {paths.show(plan.path)}: expected a factor of shape "
            f"{factor_shapes(plan)}, got {shapes(value)}; use the spec the factors "
            "were made with"
        )


def plan_of_update(path: str, update: Factor, weight: Leaf) -> LeafPlan:
    """The plan by which an update was made, for the weight it is to be added to.

    Args:
      path: Canonical path of the weight.
      update: What ``tx.update`` gave for it.
      weight: The weight.

    Returns:
      The plan.

    Raises:
      ValueError: If it is no update, or not one of this weight.
    """
    if update.stamp is None or update.origin is None:
        raise ValueError(
            f"leaf {paths.show(path)}: this Factor was made by hand and has no sketch to "
            "be lifted on; apply what tx.update returned"
        )
    plan = stamped_plan(path, update.stamp, weight)
    check_factor(update, plan)
    _check_origin(update, plan)
    return plan


def stamped_plan(path: str, stamp: Stamp, weight: Leaf) -> LeafPlan:
    """The plan that a stamp was taken of, for the weight it is about.

    Raises:
      ValueError: If a weight of this shape cannot have it.
    """
    shape, dtype = shape_and_dtype(path, weight)
    if stamp.shape != shape:
        raise ValueError(
            f"leaf {paths.show(path)}: the update is of a leaf of shape {stamp.shape}, "
            f"this one has {shape}; apply it to the params that tx.update was given"
        )
    plan, sharding = _stamped(path, stamp, shape, dtype), sharding_of(weight)
    return plan if sharding is None else with_sharding(plan, sharding)


@functools.lru_cache(maxsize=4096)
def _stamped(path: str, stamp: Stamp, shape: tuple[int, ...], dtype: str) -> LeafPlan:
    taken = (*stamp.rows, *stamp.batch)
    plan = LeafPlan(
        path=path,
        shape=shape,
        dtype=dtype,
        mode="lowrank",
        rows=stamp.rows,
        cols=tuple(axis for axis in range(len(shape)) if axis not in taken),
        batch=stamp.batch,
        rank=stamp.rank,
        law=stamp.law,
        resample_every=stamp.resample_every,
        rounding=stamp.rounding,
    )
    if not isinstance(stamp.scaling, tuple):
        return dataclasses.replace(plan, side=str(stamp.side), scaling=stamp.scaling)
    sides = tuple(
        dataclasses.replace(plan, side=side, scaling=scaling)
        for side, scaling in zip(("left", "right"), stamp.scaling, strict=True)
    )
    chance = float(stamp.side)
    return dataclasses.replace(plan, chance=chance, scaling=sides[0].scaling, sides=sides)


def _check_origin(update: Factor, plan: LeafPlan) -> None:
    """Refuses what is no update any more; traced numbers cannot be looked at."""
    assert update.origin is not None
    unit = update.origin.unit
    if isinstance(unit, jax.core.Tracer):
        return
    where, size = f"leaf {paths.show(plan.path)}", abs(float(unit)) / _FAINT
    if size == 0 and any(
        np.any(np.asarray(one)) for one in jax.tree.leaves(update.value)
    ):
        raise ValueError(
            f"{where}: this Factor is a gradient, and no update; apply what tx.update "
            "returned"
        )
    # A rule that takes a root or a sign makes about 1 of the faint unit, which is 2^40
    # here. A scaling of up to 2^20 passes; NaN does not.
    if not size < 2**20:
        raise ValueError(
            f"{where}: a rule after raclora in its chain did more than scale its update; "
            "put it before, or inside as in raclora(..., inner=optax.chain(...))"
        )
