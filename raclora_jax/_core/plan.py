"""What happens to each leaf: a spec and shapes in, static and validated plans out."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raclora_jax._core import paths
from raclora_jax._core.spec import Rule, Spec, as_spec, kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """The static plan of one leaf; axes are sorted and never negative.

    Args:
      path: Canonical path.
      shape: Shape of the leaf.
      dtype: Name of the leaf's dtype.
      mode: One of ``MODES``.
      rows: Axes the model contracts over.
      cols: The other matrix axes.
      batch: Axes that stack matrices.
      side: ``"left"`` or ``"right"``, decided; empty if not adapted.
      rank: Rank of the sketch; 0 if not adapted.
      scaling: ``alpha / rank``.
      sketch: Distribution of the sketch; empty if not adapted.
      reason: Why the leaf has this mode, for people.
      assumed_view: Whether a 2-D leaf was read as (rows, cols) without a rule.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    side: str = ""
    rank: int = 0
    scaling: float = 1.0
    sketch: str = ""
    reason: str = ""
    assumed_view: bool = False

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

    @property
    def sketch_shape(self) -> tuple[int, ...]:
        """``(batch..., rank, *axes of the sketched side)``."""
        return (*self.batch_shape, self.rank, *(self.shape[a] for a in self.sketched))

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """``(batch..., rank, *axes of the other side)``."""
        return (*self.batch_shape, self.rank, *(self.shape[a] for a in self.trained))

    @property
    def wide_dtype(self) -> jnp.dtype:
        """Dtype of sketches, factors and sums: the leaf's, at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def lam(self) -> float:
        """Smallest eigenvalue of the mean projector, ``rank / dim``."""
        return self.rank / self.dim

    def size_of(self, axes: tuple[int, ...]) -> int:
        """Product of the sizes of some axes."""
        return math.prod(self.shape[axis] for axis in axes)


def plan_tree(spec: Spec | int, tree: Any) -> dict[str, LeafPlan]:
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
      >>> import jax
      >>> plans = plan_tree(2, {"kernel": jax.ShapeDtypeStruct((6, 4), "float32")})
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
    shapes = tuple((path, *_shape_and_dtype(path, leaf)) for path, leaf in leaves.items())
    return dict(_plan(spec, shapes, whole))


def winner(spec: Spec, path: str) -> Rule | None:
    """The rule that decides about a path: the first that matches the whole of it."""
    matching = (rule for rule in spec.rules if re.fullmatch(rule.path, path))
    return next(matching, None)


def check_rules_win(spec: Spec, names: Sequence[str]) -> None:
    """Refuses a rule that decides about none of the paths."""
    won = {id(winner(spec, path)) for path in names}
    for rule in spec.rules:
        if id(rule) not in won:
            shown = ", ".join(map(paths.show, names[:8]))
            raise ValueError(
                f"Rule({rule.path!r}) wins no leaf; the expression must match the whole "
                f"path and an earlier rule must not match first. The paths are {shown}"
                f"{', ...' if len(names) > 8 else ''}"
            )


def _shape_and_dtype(path: str, leaf: Any) -> tuple[tuple[int, ...], str]:
    if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
        raise TypeError(
            f"leaf {paths.show(path)} must be an array, got {kind(leaf)}; hand over the "
            "arrays of the model only"
        )
    return tuple(map(int, jnp.shape(leaf))), str(jnp.result_type(leaf))


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
    leaf = LeafPlan(path=path, shape=shape, dtype=dtype, mode="frozen", reason="rule")
    if rule is not None and rule.mode == "frozen":
        return leaf
    if dtype.startswith("key<") or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"leaf {paths.show(path)} has dtype {dtype}: only floating leaves can be "
            f"trained; add Rule({re.escape(path)!r}, mode='frozen')"
        )
    if rule is not None and rule.mode == "dense":
        return dataclasses.replace(leaf, mode="dense")
    if len(shape) < 2 and not (rule is not None and rule.has_view):
        return dataclasses.replace(leaf, mode=spec.rest, reason="not a matrix")
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
        reason="rule" if rule is not None else "matrix",
        assumed_view=rule is None or not rule.has_view,
    )
    return _sized(spec, rule, plan)


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
    plan = dataclasses.replace(
        plan,
        side=side,
        rank=rank,
        scaling=1.0 if alpha is None else alpha / rank,
        sketch=choose("sketch"),
    )
    if rank < plan.dim:
        return plan
    named = rule is not None and rule.rank is not None
    if named or spec.rest == "frozen":
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape}: rank {rank} is not "
            f"below its sketched side, {plan.dim} ({side}); lower the rank, or add "
            f"Rule({re.escape(plan.path)!r}, mode='dense')"
        )
    return LeafPlan(
        path=plan.path,
        shape=plan.shape,
        dtype=plan.dtype,
        mode=spec.rest,
        reason=f"rank {rank} >= sketched side {plan.dim}",
    )


def _check_any_adapted(spec: Spec, plans: dict[str, LeafPlan]) -> None:
    small = [plan for plan in plans.values() if plan.reason.startswith("rank ")]
    if small and not any(plan.mode == "lowrank" for plan in plans.values()):
        plan = small[0]
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape}: {plan.reason}, and no "
            f"other leaf is left to adapt; lower the rank from {spec.rank}"
        )


def _is_masked(node: Any) -> bool:
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
