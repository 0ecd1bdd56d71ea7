"""What a plan of a leaf is: its view, side, rank and law, and all that follows."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from raclora_jax._core.picks import Picks
from raclora_jax._core.select import PICKING_LAWS, Selection, selection_of
from raclora_jax._core.sharding import Inherited, inherited
from raclora_jax._core.stamp import Stamp
from raclora_jax._core.types import (
    RANK,
    Cause,
    Label,
    Mode,
    widened,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """The static plan of one leaf; axes are sorted and never negative.

    Args:
      path: Canonical path.
      shape: Shape of the leaf.
      dtype: Name of the leaf's dtype.
      mode: ``"lowrank"``, ``"full"``, ``"dense"`` or ``"frozen"``.
      rows: Axes the model contracts over.
      cols: The other matrix axes.
      batch: Axes that stack matrices.
      side: ``"left"`` or ``"right"``, decided; empty if not adapted, or if it is drawn.
      chance: The probability of the left side where the side is drawn, else ``None``.
      rank: Rank of the sketch; 0 if not adapted.
      scaling: What the lift and the gradient are multiplied by: ``alpha / rank``.
      law: The law that the sketch is drawn from; empty if not adapted.
      resample_every: Steps a sketch lives; 0 if not adapted.
      rounding: How weights below float32 take a small step; empty if not adapted.
      cause: What decided the mode: ``"rule"``, ``"matrix"``, ``"no matrix"`` or
        ``"rank"``, where the sketched side is too small for it.
      reason: The same in words, for people.
      assumed_view: Whether a 2-D leaf was read as (rows, cols) without a rule.
      sides: The plans of the left and of the right side where the side is drawn, else
        empty. What is said of the sketched side below is then theirs alone.
      sharding: How the leaf is sharded, where its type or the array itself says so.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    mode: Mode
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    side: str = ""
    chance: float | None = None
    rank: int = 0
    scaling: float = 1.0
    law: str = ""
    resample_every: int = 0
    rounding: str = ""
    cause: Cause = "rule"
    reason: str = "rule"
    assumed_view: bool = False
    sides: tuple[LeafPlan, ...] = ()
    sharding: NamedSharding | None = None

    @property
    def adapted(self) -> bool:
        """Whether the leaf is trained through a sketch."""
        return self.mode == "lowrank"

    @functools.cached_property
    def stamp(self) -> Stamp:
        """What the functions of a run must agree on."""
        stamp = Stamp(*(getattr(self, name) for name in Stamp._fields))
        if self.chance is None:
            return stamp
        scaling = tuple(one.scaling for one in self.sides)
        return stamp._replace(side=self.chance, scaling=scaling)

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """Shape of what is trained: the factor, the leaf, or no number at all."""
        if self.mode == "frozen":
            return (0,)
        return self.factor_shape if self.adapted else self.shape

    @property
    def trained_size(self) -> int:
        """Numbers that are held as trained, those of both factors where there are two."""
        return sum(math.prod(one.trained_shape) for one in self.each)

    @property
    def each(self) -> tuple[LeafPlan, ...]:
        """The plans of its sides, or itself where the side is fixed."""
        return self.sides or (self,)

    @property
    def sketched_axes(self) -> tuple[int, ...]:
        """Axes of the sketched side."""
        return self.rows if self.side == "left" else self.cols

    @property
    def kept_axes(self) -> tuple[int, ...]:
        """Axes of the other side, which the factor keeps."""
        return self.cols if self.side == "left" else self.rows

    @property
    def sketch_axes(self) -> tuple[Label, ...]:
        """Labels of a sketch's axes: the leaf's axis that each is, and ``RANK``."""
        return (*self.batch, RANK, *self.sketched_axes)

    @property
    def factor_axes(self) -> tuple[Label, ...]:
        """Labels of the factor's axes, likewise."""
        return (*self.batch, RANK, *self.kept_axes)

    @property
    def dim(self) -> int:
        """Size of the sketched side."""
        return self.size_of(self.sketched_axes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @functools.cached_property
    def selection(self) -> Selection | None:
        """The rows a sketch may pick, for the laws that pick rows."""
        if self.sides or self.law not in PICKING_LAWS:
            return None
        sizes = [self.shape[axis] for axis in self.sketched_axes]
        return selection_of(self.law, self.rank, sizes)

    @property
    def sketch_shape(self) -> tuple[int, ...]:
        """``(batch..., rank, *axes of the sketched side)``, or that of the picks."""
        if self.law == "block":
            return self.batch_shape
        if self.law == "coordinate":
            return (*self.batch_shape, self.rank)
        return (
            *self.batch_shape,
            self.rank,
            *(self.shape[a] for a in self.sketched_axes),
        )

    def as_sketch(self, array: Any) -> Any:
        """An array, or what stands for one, as what a sketch of this leaf is."""
        return array if self.selection is None else Picks.of(array, self.selection)

    @property
    def sketch_dtype(self) -> jnp.dtype:
        """Dtype of the sketch, or of its picks."""
        return self.wide_dtype if self.selection is None else jnp.dtype(jnp.int32)

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """``(batch..., rank, *axes of the other side)``."""
        return (*self.batch_shape, self.rank, *(self.shape[a] for a in self.kept_axes))

    @functools.cached_property
    def factor_inherited(self) -> Inherited | None:
        """The sharding that the factor has from the leaf, ``None`` where it has none."""
        if self.sharding is None:
            return None
        return inherited(self.sharding, self.factor_shape, self.factor_axes)

    @functools.cached_property
    def sketch_inherited(self) -> Inherited | None:
        """The sharding that the sketch has from the leaf, ``None`` where it has none."""
        if self.sharding is None:
            return None
        shape = self.sketch_shape
        axes = self.sketch_axes[: len(shape)]
        # Picks are a few numbers: only stacks of them are worth sharding.
        spread = self.selection is None
        return inherited(self.sharding, shape, axes, spread=spread)

    @property
    def factor_sharding(self) -> NamedSharding | None:
        """How the factor is sharded."""
        found = self.factor_inherited
        return None if found is None else found.sharding

    @property
    def sketch_sharding(self) -> NamedSharding | None:
        """How the sketch is sharded."""
        found = self.sketch_inherited
        return None if found is None else found.sharding

    @property
    def trained_sharding(self) -> NamedSharding | None:
        """How what is trained is sharded: the factor or the leaf."""
        if self.mode == "frozen":
            return None
        return self.factor_sharding if self.adapted else self.sharding

    @property
    def wide_dtype(self) -> jnp.dtype:
        """Dtype of factors and sums: the leaf's, at least float32."""
        return widened(self.dtype)

    @property
    def lam(self) -> float:
        """Smallest eigenvalue of the mean projector, ``rank / dim``."""
        if self.chance is not None:
            left, right = self.sides
            return self.chance * left.lam + (1 - self.chance) * right.lam
        return self.rank / self.dim

    @functools.cached_property
    def of_slice(self) -> LeafPlan:
        """The plan of one slice along the first axis, which stacks matrices."""
        assert self.batch[:1] == (0,), self.path
        assert not self.sides, self.path

        def behind(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - 1 for axis in axes if axis)

        sharding = self.sharding
        if sharding is not None:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return dataclasses.replace(
            self,
            shape=self.shape[1:],
            rows=behind(self.rows),
            cols=behind(self.cols),
            batch=behind(self.batch),
            sharding=sharding,
        )

    @functools.cached_property
    def kind(self) -> LeafPlan:
        """The plan that all leaves of this kind share, whatever they are called."""
        return dataclasses.replace(self, path="", reason="", sharding=None)

    def size_of(self, axes: tuple[int, ...]) -> int:
        """Product of the sizes of some axes."""
        return math.prod(self.shape[axis] for axis in axes)


@functools.lru_cache(maxsize=4096)
def with_sharding(plan: LeafPlan, sharding: NamedSharding | None) -> LeafPlan:
    """The plan of a leaf that is sharded so."""
    sides = tuple(with_sharding(one, sharding) for one in plan.sides)
    return dataclasses.replace(plan, sides=sides, sharding=sharding)
