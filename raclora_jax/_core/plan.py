"""What happens to each leaf: a spec and shapes in, static and validated plans out."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from raclora_jax._core import layout, paths
from raclora_jax._core.select import LAWS, Selection, selection_of
from raclora_jax._core.spec import Rule, Spec, as_spec, check_rules_win, kind, winner
from raclora_jax._core.stamp import Stamp
from raclora_jax._core.types import Alpha, Cause, Leaf, Mode, PyTree, is_number, widened


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
      side: ``"left"`` or ``"right"``, decided; the probability of the left one where it
        is drawn; empty if not adapted.
      rank: Rank of the sketch; 0 if not adapted.
      scaling: What the lift and the gradient are multiplied by: ``alpha / rank``.
      sketch: Distribution of the sketch; empty if not adapted.
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
    side: str | float = ""
    rank: int = 0
    scaling: float = 1.0
    sketch: str = ""
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
        """What the doors of a run must agree on."""
        stamp = Stamp(*(getattr(self, name) for name in Stamp._fields))
        if not self.sides:
            return stamp
        return stamp._replace(scaling=tuple(one.scaling for one in self.sides))

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
    def sketched(self) -> tuple[int, ...]:
        """Axes of the sketched side."""
        return self.rows if self.side == "left" else self.cols

    @property
    def trained(self) -> tuple[int, ...]:
        """Axes of the other side, which the factor keeps."""
        return self.cols if self.side == "left" else self.rows

    @property
    def dim(self) -> int:
        """Size of the sketched side."""
        return self.size_of(self.sketched)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @functools.cached_property
    def selection(self) -> Selection | None:
        """The rows a sketch may pick, for the laws that pick rows."""
        if self.sides or self.sketch not in LAWS:
            return None
        sizes = [self.shape[axis] for axis in self.sketched]
        return selection_of(self.sketch, self.rank, sizes)

    @property
    def sketch_shape(self) -> tuple[int, ...]:
        """``(batch..., rank, *axes of the sketched side)``, or that of the picks."""
        if self.sketch == "block":
            return self.batch_shape
        if self.sketch == "coordinate":
            return (*self.batch_shape, self.rank)
        return (*self.batch_shape, self.rank, *(self.shape[a] for a in self.sketched))

    @property
    def sketch_dtype(self) -> jnp.dtype:
        """Dtype of the sketch."""
        return self.wide_dtype if self.selection is None else jnp.dtype(jnp.int32)

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """``(batch..., rank, *axes of the other side)``."""
        return (*self.batch_shape, self.rank, *(self.shape[a] for a in self.trained))

    @property
    def wide_dtype(self) -> jnp.dtype:
        """Dtype of factors and sums: the leaf's, at least float32."""
        return widened(self.dtype)

    @property
    def lam(self) -> float:
        """Smallest eigenvalue of the mean projector, ``rank / dim``."""
        if self.sides:
            left, right = self.sides
            chance = float(self.side)
            return chance * left.lam + (1 - chance) * right.lam
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

    def size_of(self, axes: tuple[int, ...]) -> int:
        """Product of the sizes of some axes."""
        return math.prod(self.shape[axis] for axis in axes)


def plan_tree(spec: Spec | int, tree: PyTree) -> dict[str, LeafPlan]:
    """Plans every leaf of a tree of arrays or abstract arrays.

    Args:
      spec: A ``Spec`` or a rank.
      tree: Parameters, gradients or ``ShapeDtypeStruct``s. Where it holds an
        ``optax.MaskedNode`` it is a part of a model, and rules that win no leaf pass.

    Returns:
      ``{path: LeafPlan}`` in tree order.

    Raises:
      ValueError: If a rule, a rank or a leaf does not fit; the message names the leaf.

    Example:
      >>> import jax, raclora_jax as rl
      >>> plans = rl.plan(2, {"kernel": jax.ShapeDtypeStruct((6, 4), "float32")})
      >>> plans["kernel"].side, plans["kernel"].factor_shape
      ('right', (2, 6))
    """
    nodes = jax.tree.leaves(tree, is_leaf=_is_masked)
    whole = not any(_is_masked(node) for node in nodes)
    leaves, _ = paths.flatten(tree)
    return plan_leaves(as_spec(spec), leaves, whole=whole)


def plan_leaves(
    spec: Spec, leaves: Mapping[str, Any], *, whole: bool = False
) -> dict[str, LeafPlan]:
    """``plan_tree`` for leaves already flattened; ``whole`` if they are all there are."""
    shapes = tuple((path, *shape_and_dtype(path, leaf)) for path, leaf in leaves.items())
    plans = dict(_plan(spec, shapes, whole))
    for path, leaf in leaves.items():
        sharding = layout.sharding_of(leaf)
        if sharding is not None:
            plans[path] = with_sharding(plans[path], sharding)
    return plans


@functools.lru_cache(maxsize=4096)
def with_sharding(plan: LeafPlan, sharding: NamedSharding | None) -> LeafPlan:
    """The plan of a leaf that is sharded so."""
    sides = tuple(with_sharding(one, sharding) for one in plan.sides)
    return dataclasses.replace(plan, sides=sides, sharding=sharding)


def shape_and_dtype(path: str, leaf: Leaf) -> tuple[tuple[int, ...], str]:
    """Of a leaf, refused by name where it is no array."""
    if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
        raise TypeError(
            f"leaf {paths.show(path)} must be an array, got {kind(leaf)}; hand over the "
            "arrays of the model only"
        )
    try:
        dtype = jnp.result_type(leaf)
    except TypeError as error:
        raise TypeError(
            f"leaf {paths.show(path)} of dtype {leaf.dtype} is no array of JAX; hand "
            "over the arrays of the model only"
        ) from error
    name = "float0" if dtype == jax.dtypes.float0 else str(dtype)
    return tuple(map(int, jnp.shape(leaf))), name


@functools.lru_cache(maxsize=256)
def _plan(
    spec: Spec, shapes: tuple[tuple[str, tuple[int, ...], str], ...], whole: bool
) -> dict[str, LeafPlan]:
    plans = {
        path: _plan_leaf(spec, winner(spec, path), path, shape, dtype)
        for path, shape, dtype in shapes
    }
    if whole and plans:
        check_rules_win(spec, list(plans))
        _check_any_adapted(spec, plans)
    return plans


def _plan_leaf(
    spec: Spec, rule: Rule | None, path: str, shape: tuple[int, ...], dtype: str
) -> LeafPlan:
    leaf = LeafPlan(path=path, shape=shape, dtype=dtype, mode="frozen")
    if rule is not None and rule.mode == "frozen":
        return leaf
    if not is_number(dtype) or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"leaf {paths.show(path)} has dtype {dtype}: only floating leaves can be "
            f"trained; add Rule({re.escape(path)!r}, mode='frozen')"
        )
    if jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 2:
        raise ValueError(
            f"leaf {paths.show(path)} has dtype {dtype}: weights are trained in 16 bits "
            f"or more; cast it, add Rule({re.escape(path)!r}, mode='frozen'), or keep it "
            "quantised under the adapter form"
        )
    if rule is not None and rule.mode == "dense":
        return dataclasses.replace(leaf, mode="dense")
    if len(shape) < 2 and not (rule is not None and rule.has_view):
        return dataclasses.replace(
            leaf, mode=spec.rest, cause="no matrix", reason="not a matrix"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"leaf {paths.show(path)} has dtype {dtype}: sketches are real, so complex "
            f"leaves cannot be adapted; add Rule({re.escape(path)!r}, mode='dense')"
        )
    rows, cols, batch = _view(rule, path, shape)
    plan = dataclasses.replace(
        leaf,
        mode="lowrank",
        rows=rows,
        cols=cols,
        batch=batch,
        cause="matrix" if rule is None else "rule",
        reason="matrix" if rule is None else "rule",
        assumed_view=rule is None or not rule.has_view,
    )
    if rule is not None and rule.mode == "full":
        return _whole(spec, rule, plan)
    return _sized(spec, rule, plan)


def _whole(spec: Spec, rule: Rule, plan: LeafPlan) -> LeafPlan:
    """All rows at once: the only block there is."""
    side = rule.side if rule.side in ("left", "right") else "left"
    return dataclasses.replace(
        plan,
        side=side,
        rank=plan.size_of(plan.rows if side == "left" else plan.cols),
        sketch="block",
        resample_every=spec.resample_every,
        rounding=spec.rounding,
        reason="rule, whole",
    )


def _view(
    rule: Rule | None, path: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    ndim = len(shape)
    where = f"leaf {paths.show(path)} of shape {shape}"
    batch = _resolve(where, "batch", rule.batch if rule else (), ndim)
    matrix = tuple(axis for axis in range(ndim) if axis not in batch)
    if rule is None or rule.rows is None:
        if len(matrix) != 2:
            raise ValueError(
                f"{where} has {ndim} axes and no view: name the contracted axes in "
                f"Rule({re.escape(path)!r}, rows=..., batch=...), read the view off "
                f"the model with trace_spec, or train it in full with "
                f"Rule({re.escape(path)!r}, mode='dense')"
            )
        return (matrix[0],), (matrix[1],), batch
    rows = _resolve(where, "rows", rule.rows, ndim)
    cols = tuple(axis for axis in matrix if axis not in rows)
    if set(rows) & set(batch):
        raise ValueError(f"{where}: rows={rows} and batch={batch} share an axis")
    if not rows or not cols:
        raise ValueError(
            f"{where}: rows={rows}, batch={batch} leave rows or columns without an "
            "axis; both need at least one"
        )
    return rows, cols, batch


def _sized(spec: Spec, rule: Rule | None, plan: LeafPlan) -> LeafPlan:
    """Decides side and rank, or hands a leaf that is too small to the rest."""

    def choose(name: str) -> Any:
        value = getattr(rule, name) if rule is not None else None
        return getattr(spec, name) if value is None else value

    side = choose("side")
    if side == "auto":
        side = "left" if plan.size_of(plan.rows) <= plan.size_of(plan.cols) else "right"
    rank, alpha = choose("rank"), choose("alpha")

    def sketching(side: str) -> LeafPlan:
        sketched = plan.rows if side == "left" else plan.cols
        return dataclasses.replace(
            plan,
            side=side,
            rank=rank,
            scaling=_scaling(alpha, rank, plan.size_of(sketched)),
            sketch=choose("sketch"),
            resample_every=spec.resample_every,
            rounding=spec.rounding,
        )

    if isinstance(side, float):
        sides = sketching("left"), sketching("right")
        small = min(sides, key=lambda one: one.dim)
        sized = dataclasses.replace(sides[0], side=side, sides=sides)
    else:
        small = sized = sketching(side)
    if rank < small.dim:
        return sized
    named = rule is not None and rule.rank is not None
    if named or spec.rest == "frozen":
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape}: rank {rank} is not "
            f"below its sketched side, {small.dim} ({small.side}); lower the rank, or "
            f"add Rule({re.escape(plan.path)!r}, mode='dense')"
        )
    return LeafPlan(
        path=plan.path,
        shape=plan.shape,
        dtype=plan.dtype,
        mode=spec.rest,
        cause="rank",
        reason=f"rank {rank} >= sketched side {small.dim}",
    )


def _scaling(alpha: Alpha, rank: int, dim: int) -> float:
    if alpha is None:
        return 1.0
    return math.sqrt(dim / rank) if alpha == "dim" else alpha / rank


def _check_any_adapted(spec: Spec, plans: dict[str, LeafPlan]) -> None:
    lone = next(iter(plans.values()))
    if len(plans) == 1 and lone.cause == "no matrix" and lone.mode == "dense":
        raise ValueError(
            f"leaf {paths.show(lone.path)} of shape {lone.shape} is all there is, and no "
            "matrix: nothing would be adapted; hand raclora the tree of matrices, not "
            "one flattened by optax.flatten, or train it with the inner rule alone"
        )
    small = [plan for plan in plans.values() if plan.cause == "rank"]
    if small and not any(plan.adapted for plan in plans.values()):
        plan = small[0]
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape}: {plan.reason}, and no "
            f"other leaf is left to adapt; lower the rank from {spec.rank}"
        )


def _is_masked(node: Leaf) -> bool:
    return isinstance(node, optax.MaskedNode)


def _resolve(where: str, name: str, axes: Any, ndim: int) -> tuple[int, ...]:
    out = [axis for axis in axes if not -ndim <= axis < ndim]
    resolved = tuple(sorted(axis % ndim for axis in axes)) if not out else ()
    if out or len(set(resolved)) != len(resolved):
        raise ValueError(
            f"{where}: {name}={tuple(axes)} must be distinct axes between {-ndim} and "
            f"{ndim - 1}"
        )
    return resolved
