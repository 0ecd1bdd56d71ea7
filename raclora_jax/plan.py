"""What happens to each leaf: user-facing rules in, static and validated plans out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raclora_jax import paths

MODES = ("lowrank", "dense", "frozen")
SIDES = ("left", "right", "auto")
SKETCHES = ("orthonormal", "gaussian", "rademacher", "coordinate", "gaussian_raw")
ROUNDINGS = ("auto", "nearest", "stochastic", "master")
RESTS = ("dense", "frozen")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the leaves whose whole path matches a regular expression are trained.

    What is left ``None`` is taken from the ``Spec``. A view is named by axes: ``rows``
    are those the model contracts over, ``batch`` those that stack independent
    matrices (layers, experts); the remaining axes are the columns.

    Args:
      path: Regular expression; it must match the whole canonical path.
      mode: ``"lowrank"``, ``"dense"`` (trained in full) or ``"frozen"``.
      rank: Rank of the sketch.
      alpha: Numerator of the scaling ``alpha / rank``.
      side: ``"left"`` sketches the rows, ``"right"`` the columns, ``"auto"`` the
        smaller of both.
      sketch: Distribution of the sketch.
      rows: Axes of the rows, an int or a tuple of ints.
      batch: Axes of the stack, an int or a tuple of ints.

    Raises:
      ValueError: If a value is unknown or out of range.
      TypeError: If a value has the wrong type.

    Example:
      >>> Rule("attention/(query|key|value)/kernel", rows=0).rows
      (0,)
    """

    path: str
    _: dataclasses.KW_ONLY
    mode: str = "lowrank"
    rank: int | None = None
    alpha: float | None = None
    side: str | None = None
    sketch: str | None = None
    rows: int | tuple[int, ...] | None = None
    batch: int | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"Rule({self.path!r})"
        if not isinstance(self.path, str):
            raise TypeError(f"{where}: path must be a str, got {_kind(self.path)}")
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"{where}: path is not a regular expression ({error}); escape literal "
                "characters with re.escape"
            ) from error
        _check_choice(where, "mode", self.mode, MODES)
        if self.rank is not None:
            object.__setattr__(self, "rank", _check_count(where, "rank", self.rank))
        object.__setattr__(self, "alpha", _check_alpha(where, self.alpha))
        if self.side is not None:
            _check_choice(where, "side", self.side, SIDES)
        if self.sketch is not None:
            _check_choice(where, "sketch", self.sketch, SKETCHES)
        if self.rows is not None:
            object.__setattr__(self, "rows", _axes_tuple(where, "rows", self.rows))
        object.__setattr__(self, "batch", _axes_tuple(where, "batch", self.batch))

    @property
    def has_view(self) -> bool:
        """Whether the rule says how to read a leaf as matrices."""
        return self.rows is not None or self.batch != ()


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a RAC-LoRA run: frozen, hashable, plain data.

    Every floating leaf with two axes is adapted unless the first rule that matches its
    path says otherwise; a leaf with more axes needs a rule that names its view; leaves
    that are no matrix (biases, norms) or too small for the rank are the ``rest``.

    Args:
      rank: Rank of every sketch, unless a rule says otherwise.
      alpha: Numerator of the scaling ``alpha / rank``; ``None`` means scaling 1.
      side: ``"left"`` sketches the rows, ``"right"`` the columns, ``"auto"`` the
        smaller of both (largest lambda), ties to the rows.
      sketch: ``"orthonormal"``, ``"gaussian"`` or ``"rademacher"`` (whitened),
        ``"coordinate"``, or ``"gaussian_raw"`` (N(0, 1), not a projector).
      resample_every: Steps a sketch lives, one link of the chain.
      rounding: How weights below float32 take a small step: ``"auto"`` and
        ``"stochastic"`` draw one of the two neighbours, ``"nearest"`` rounds,
        ``"master"`` keeps a float32 copy in the state.
      cache: Whether the state keeps the sketches of the running link. Without, they
        are drawn in every step and the state holds a seed only.
      rules: ``Rule``s; the first whose expression matches the whole path wins.
      rest: ``"dense"`` trains the leaves that are not adapted in full, ``"frozen"``
        leaves them as they are.

    Raises:
      ValueError: If a value is unknown or out of range.
      TypeError: If a value has the wrong type.

    Example:
      >>> spec = Spec(rank=8, rules=[Rule("head/.*", mode="dense")])
      >>> Spec.from_json(spec.to_json()) == spec
      True
    """

    rank: int
    _: dataclasses.KW_ONLY
    alpha: float | None = None
    side: str = "auto"
    sketch: str = "orthonormal"
    resample_every: int = 50
    rounding: str = "auto"
    cache: bool = True
    rules: Iterable[Rule] = ()
    rest: str = "dense"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _check_count("Spec", "rank", self.rank))
        object.__setattr__(self, "alpha", _check_alpha("Spec", self.alpha))
        _check_choice("Spec", "side", self.side, SIDES)
        _check_choice("Spec", "sketch", self.sketch, SKETCHES)
        every = _check_count("Spec", "resample_every", self.resample_every)
        object.__setattr__(self, "resample_every", every)
        _check_choice("Spec", "rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.cache, bool):
            raise TypeError(f"Spec: cache must be a bool, got {_kind(self.cache)}")
        _check_choice("Spec", "rest", self.rest, RESTS)
        if isinstance(self.rules, Rule) or not isinstance(self.rules, Iterable):
            raise TypeError(
                f"Spec: rules must be a sequence of Rule, got {_kind(self.rules)}; "
                "write rules=[Rule(...)]"
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"Spec: rules must hold Rule, got {_kind(rule)}")

    def to_json(self) -> str:
        """The spec as JSON text, to be kept beside a checkpoint.

        Returns:
          Text that ``Spec.from_json`` reads back to an equal spec.
        """
        fields = dataclasses.asdict(self)
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Reads what ``to_json`` wrote.

        Args:
          text: JSON text.

        Returns:
          The spec.

        Raises:
          ValueError: If the text is not JSON or a value is out of range.
          TypeError: If a field is missing or unknown.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError(f"a spec in JSON is an object, got {text[:40]!r}")
        rules = [Rule(**_tuples(rule)) for rule in fields.pop("rules", ())]
        return cls(**fields, rules=rules)

    def check_resumes(self, saved: Spec) -> None:
        """Refuses to go on with a chain that another spec began.

        Args:
          saved: The spec kept beside the checkpoint.

        Raises:
          ValueError: If any field but ``cache`` differs.
        """
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(saved, field.name)
            if field.name != "cache" and mine != theirs:
                raise ValueError(
                    f"this spec has {field.name}={mine!r}, the checkpoint was written "
                    f"with {field.name}={theirs!r}: the chain would not go on where it "
                    "stopped; resume with the saved spec, or start a new state with "
                    "tx.init"
                )


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


def as_spec(spec: Spec | int) -> Spec:
    """The spec itself, or ``Spec(rank)`` for an int.

    Args:
      spec: A ``Spec`` or a rank.

    Returns:
      A ``Spec``.

    Raises:
      TypeError: If it is neither.

    Example:
      >>> as_spec(8).rank
      8
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, jax.core.Tracer):
        raise TypeError(
            "spec must be static, got a traced value; under optax.inject_hyperparams "
            'pass a Spec, or static_args=("spec",)'
        )
    rank = None if isinstance(spec, bool) else _as_int(spec)
    if rank is None:
        raise TypeError(
            f"spec must be a Spec or an int rank, got {_kind(spec)}; write Spec(rank=8)"
        )
    return Spec(rank)


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
    shapes = tuple(
        (path, tuple(map(int, jnp.shape(leaf))), str(jnp.result_type(leaf)))
        for path, leaf in leaves.items()
    )
    return dict(_plan(spec, shapes, whole))


@functools.lru_cache(maxsize=256)
def _plan(
    spec: Spec, shapes: tuple[tuple[str, tuple[int, ...], str], ...], whole: bool
) -> dict[str, LeafPlan]:
    won: set[int] = set()
    plans: dict[str, LeafPlan] = {}
    for path, shape, dtype in shapes:
        rule = None
        for index, candidate in enumerate(spec.rules):
            if re.fullmatch(candidate.path, path):
                rule = candidate
                won.add(index)
                break
        plans[path] = _plan_leaf(spec, rule, path, shape, dtype)
    if whole and plans:
        _check_rules_win(spec, won, plans)
        _check_any_adapted(spec, plans)
    return plans


def _plan_leaf(
    spec: Spec, rule: Rule | None, path: str, shape: tuple[int, ...], dtype: str
) -> LeafPlan:
    leaf = LeafPlan(path=path, shape=shape, dtype=dtype, mode="frozen", reason="rule")
    if rule is not None and rule.mode == "frozen":
        return leaf
    if not jnp.issubdtype(dtype, jnp.inexact):
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


def _check_rules_win(spec: Spec, won: set[int], plans: dict[str, LeafPlan]) -> None:
    for index, rule in enumerate(spec.rules):
        if index not in won:
            shown = ", ".join(map(paths.show, list(plans)[:8]))
            raise ValueError(
                f"Rule({rule.path!r}) wins no leaf; the expression must match the whole "
                f"path and an earlier rule must not match first. The paths are {shown}"
                f"{', ...' if len(plans) > 8 else ''}"
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


def _kind(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"


def _check_count(where: str, name: str, value: Any) -> int:
    count = None if isinstance(value, bool) else _as_int(value)
    if count is None:
        raise TypeError(
            f"{where}: {name} must be an int, got {_kind(value)}; it fixes shapes, so "
            f"write a static one, such as {name}=8"
        )
    if count < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {count}")
    return count


def _as_int(value: Any) -> int | None:
    """The int that a value is, if it is one and not traced."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _check_alpha(where: str, alpha: Any) -> float | None:
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(
            f"{where}: alpha must be a number or None for scaling 1, got {_kind(alpha)}"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{where}: alpha must be positive and finite, got {alpha}")
    return float(alpha)


def _check_choice(where: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"{where}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}"
        )


def _axes_tuple(where: str, name: str, axes: Any) -> tuple[int, ...]:
    parts = axes if isinstance(axes, (tuple, list)) else (axes,)
    found = [None if isinstance(axis, bool) else _as_int(axis) for axis in parts]
    if None in found:
        raise TypeError(
            f"{where}: {name} must be an int or a tuple of ints, got {_kind(axes)}"
        )
    return tuple(axis for axis in found if axis is not None)


def _resolve(where: str, name: str, axes: Any, ndim: int) -> tuple[int, ...]:
    out = [axis for axis in axes if not -ndim <= axis < ndim]
    resolved = tuple(sorted(axis % ndim for axis in axes)) if not out else ()
    if out or len(set(resolved)) != len(resolved):
        raise ValueError(
            f"{where}: {name}={tuple(axes)} must be distinct axes between {-ndim} and "
            f"{ndim - 1}"
        )
    return resolved


def _tuples(rule: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in rule.items()}
