"""How plans are made: a spec and shapes in, static and validated plans out."""

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

from raclora_jax._core import paths
from raclora_jax._core.checks import kind
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.sharding import sharding_of
from raclora_jax._core.spec import Rule, Spec, as_spec, check_rules_win, winner
from raclora_jax._core.types import Alpha, Leaf, PyTree, is_number

# Of the input of a layer the backward pass keeps what a left sketch saw, and frees the rest:
# up to a tenth of a step and of its peak less than with a right one
# (benchmarks/speed/sides.py). Trained at its own best rate it ends no higher where the
# rows are four times the columns (the language study's explored settings). Of a table of
# 32,000 words, 62 times its width, it would see next to nothing.
_LONGEST = 16


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
        sharding = sharding_of(leaf)
        if sharding is not None:
            plans[path] = with_sharding(plans[path], sharding)
    return plans


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
        law="block",
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
    rank, alpha = choose("rank"), choose("alpha")
    if side in ("auto", "smaller"):
        side = _best_side(side, rank, plan.size_of(plan.rows), plan.size_of(plan.cols))

    def sketching(side: str) -> LeafPlan:
        sketched = plan.rows if side == "left" else plan.cols
        return dataclasses.replace(
            plan,
            side=side,
            rank=rank,
            scaling=_scaling(alpha, rank, plan.size_of(sketched)),
            law=choose("sketch"),
            resample_every=spec.resample_every,
            rounding=spec.rounding,
        )

    if isinstance(side, float):
        sides = sketching("left"), sketching("right")
        small = min(sides, key=lambda one: one.dim)
        sized = dataclasses.replace(sides[0], side="", chance=side, sides=sides)
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


def _best_side(side: str, rank: int, rows: int, cols: int) -> str:
    """The smaller side, or the rows where they are the better bargain."""
    smaller = "left" if rows <= cols else "right"
    # A leaf whose smaller side the rank fills is trained in full, whichever is sketched.
    free = side == "auto" and rank < cols and rows <= _LONGEST * cols
    return "left" if free else smaller


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
