"""What a spec will cost: every leaf, in numbers, bytes and lambda, before any compute."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raclora_jax._autodiff.stage import abstracted
from raclora_jax._autodiff.uses import Uses
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan, plan_tree
from raclora_jax._core.sides import named
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaf, PyTree, is_number
from raclora_jax._forms.apply import apply_updates
from raclora_jax._forms.gradient import reporting
from raclora_jax._forms.optimizer import raclora


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What something costs: a leaf, or a whole tree under one method.

    Args:
      trained: Numbers trained.
      weight_bytes: Bytes of the weights.
      gradient_bytes: Bytes of the gradient, in factor coordinates where adapted.
      state_bytes: Bytes of the inner rule's state, of a master copy, and of what a
        transformation in front keeps.
      sketch_bytes: Bytes of the cached sketches.
      traffic_bytes: Bytes a data-parallel all-reduce carries per step.
    """

    trained: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    sketch_bytes: int
    traffic_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Cost):
    """The cost of one leaf, and why.

    Args:
      path: Canonical path.
      view: How the leaf is read, ``[batch] x rows x cols``.
      mode: ``"lowrank"``, ``"dense"`` or ``"frozen"``.
      why: What decided the mode.
      rank: Rank of the sketch, 0 if not adapted.
      side: Sketched side, or the probability of the left one where it is drawn; empty
        if not adapted.
      lam: Smallest eigenvalue of the mean projector, ``rank / dim``; 1 for dense.
    """

    path: str
    view: str
    mode: str
    why: str
    rank: int
    side: str
    lam: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What ``summary`` returns: print it, or read its fields.

    Args:
      rows: One ``Row`` per leaf, in tree order.
      total: The run itself; counters included.
      full: Full fine-tuning with Adam, float32 moments.
      lora: LoRA of the same ranks, both factors trained, Adam.
      warnings: What to look at again.
      peak_bytes: What a whole compiled step holds at once, with donated params and
        state; ``None`` without a loss.
    """

    rows: tuple[Row, ...]
    total: Cost
    full: Cost
    lora: Cost
    warnings: tuple[str, ...]
    peak_bytes: int | None = None

    def __str__(self) -> str:
        head = "path view mode rank side lambda trained weights gradient state sketch"
        lines: list[tuple[str, ...]] = [(*head.split(), "traffic")]
        lines += [
            (row.path or "(leaf)", row.view, row.mode, *_adapted_cells(row), *_costs(row))
            for row in self.rows
        ]
        for name, cost in (
            ("total", self.total),
            ("full fine-tuning, Adam", self.full),
            ("LoRA, Adam", self.lora),
        ):
            lines.append((name, "", "", "", "", "", *_costs(cost)))
        notes = [f"warning: {text}" for text in self.warnings]
        if self.peak_bytes is not None:
            notes.insert(0, f"peak of a compiled step: {_human(self.peak_bytes)}")
        return "\n".join([*_aligned(lines), *notes])


def summary(
    params: PyTree,
    spec: Spec | int,
    loss_fn: Callable[..., Any] | None = None,
    *args: Any,
    inner: optax.GradientTransformation | None = None,
    before: optax.GradientTransformation | None = None,
    has_aux: bool = False,
) -> Summary:
    """Prices every leaf of a spec: view, rank, lambda, trained numbers and bytes.

    With a loss it also compiles a whole step, without running it: its peak memory, and
    a warning for each use of a leaf whose gradient is formed in full.

    Args:
      params: Tree of arrays or ``ShapeDtypeStruct``s.
      spec: A ``Spec`` or a rank.
      loss_fn: ``loss_fn(params, *args)``, as for ``value_and_grad``.
      *args: What else the loss takes; abstract arrays are enough.
      inner: The rule whose state is counted; Adam by default.
      before: A transformation in front of ``raclora`` whose state is counted with the
        leaf it belongs to, such as ``estimators.page``, which keeps leaves at full size.
        The compiled step is without it.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      A ``Summary``; ``print`` shows the table, ``.rows`` are for programs.

    Raises:
      ValueError: If the spec does not fit the tree.

    Example:
      >>> import jax
      >>> params = {"kernel": jax.ShapeDtypeStruct((1024, 512), "float32")}
      >>> costs = summary(params, 8)
      >>> costs.rows[0].view, costs.total.trained, costs.full.trained
      ('1024 x 512', 8192, 524288)
    """
    spec = as_spec(spec)
    leaves, treedef = paths.flatten(params)
    plans = plan_tree(spec, params)
    shapes = {p: _abstract(leaf) for p, leaf in leaves.items()}
    tx = raclora(0.0, spec, inner=inner, key=0)
    shaped = paths.unflatten(treedef, shapes)
    state = jax.eval_shape(tx.init, shaped)
    in_front = () if before is None else jax.eval_shape(before.init, shaped)
    held = _bytes_by_path((state.inner_state, state.master, in_front), plans)
    sketches = _bytes_by_path(state.sketches, plans)
    rows = tuple(
        _row(plan, held.get(path, 0), sketches.get(path, 0))
        for path, plan in plans.items()
    )
    total = _total(rows)
    counters = held.get(None, 0) + sketches.get(None, 0)
    counters += sum(_nbytes(getattr(state, name)) for name in _COUNTERS)
    total = dataclasses.replace(total, state_bytes=total.state_bytes + counters)
    warnings, peak = _warnings(plans), None
    if loss_fn is not None:
        peak, uses = _compiled(loss_fn, spec, has_aux, tx, shaped, state, args)
        warnings += tuple(
            f"leaf {paths.show(path)}: its gradient is formed in full by {operation}"
            for path, operation in uses.fallbacks
        )
    return Summary(rows, total, _full(plans), _lora(plans), warnings, peak)


_COUNTERS = ("count", "link", "step_in_link", "law", "key_data", "skipped")


def _compiled(
    loss_fn: Callable[..., Any],
    spec: Spec,
    has_aux: bool,
    tx: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    args: tuple[Any, ...],
) -> tuple[int | None, Uses]:
    """Peak bytes of a step, as the compiler plans it, and what it saw of the model."""
    seen: list[Uses] = []
    grad_fn = reporting(loss_fn, spec, has_aux, seen.append)
    inputs, filled = abstracted(args)

    def step(params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        value, grads = grad_fn(params, state, *filled(inputs))
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, value

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, inputs)
    memory = lowered.compile().memory_analysis()
    if memory is None:  # a backend that does not say
        return None, seen[0]
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes, seen[0]


def _abstract(leaf: Leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _nbytes(array: Leaf) -> int:
    return int(array.size) * array.dtype.itemsize


def _bytes_by_path(state: PyTree, plans: dict[str, LeafPlan]) -> dict[str | None, int]:
    """Bytes of a state by the leaf whose path they end in; counters under ``None``."""
    owners = {name: path for path, plan in plans.items() for name in named(plan)}
    owners |= {path: path for path in plans}
    found: dict[str | None, int] = {}
    for where, leaf in paths.flatten(state)[0].items():
        parts = where.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        owner = next((owners[end] for end in ends if end in owners), None)
        found[owner] = found.get(owner, 0) + _nbytes(leaf)
    return found


def _row(plan: LeafPlan, state_bytes: int, sketch_bytes: int) -> Row:
    trained = plan.trained_size
    itemsize = plan.wide_dtype.itemsize if plan.mode == "lowrank" else _itemsize(plan)
    return Row(
        path=plan.path,
        view=_view(plan),
        mode=plan.mode,
        why=plan.reason,
        rank=plan.rank,
        side=str(plan.side),
        lam={"lowrank": plan.lam, "dense": 1.0, "frozen": 0.0}[plan.mode],
        trained=trained,
        weight_bytes=math.prod(plan.shape) * _itemsize(plan),
        gradient_bytes=trained * itemsize,
        state_bytes=state_bytes,
        sketch_bytes=sketch_bytes,
        traffic_bytes=trained * itemsize,
    )


def _itemsize(plan: LeafPlan) -> int:
    return jnp.dtype(plan.dtype).itemsize if is_number(plan.dtype) else 0


def _view(plan: LeafPlan) -> str:
    if plan.mode != "lowrank":
        return " x ".join(map(str, plan.shape)) or "scalar"
    batch = "".join(f"[{size}] x " for size in plan.batch_shape)
    groups = (plan.rows, plan.cols)
    sides = ["*".join(str(plan.shape[axis]) for axis in group) for group in groups]
    return batch + " x ".join(sides)


def _total(rows: tuple[Row, ...]) -> Cost:
    names = [field.name for field in dataclasses.fields(Cost)]
    return Cost(**{name: sum(getattr(row, name) for row in rows) for name in names})


def _adam(trained: int, gradient_bytes: int, weight_bytes: int) -> Cost:
    """Adam with float32 moments and a step counter."""
    return Cost(
        trained=trained,
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        state_bytes=8 * trained + 4,
        sketch_bytes=0,
        traffic_bytes=gradient_bytes,
    )


def _full(plans: dict[str, LeafPlan]) -> Cost:
    trained = [p for p in plans.values() if (p.mode, p.cause) != ("frozen", "rule")]
    numbers = sum(math.prod(plan.shape) for plan in trained)
    gradients = sum(math.prod(plan.shape) * _itemsize(plan) for plan in trained)
    return _adam(numbers, gradients, _weights(plans))


def _lora(plans: dict[str, LeafPlan]) -> Cost:
    numbers = gradients = factors = 0
    for plan in plans.values():
        if plan.mode == "lowrank":
            sizes = plan.size_of(plan.rows) + plan.size_of(plan.cols)
            pair = plan.rank * sizes * math.prod(plan.batch_shape)
            factors += pair
            numbers += pair
            gradients += pair * plan.wide_dtype.itemsize
        elif plan.mode == "dense":
            numbers += math.prod(plan.shape)
            gradients += math.prod(plan.shape) * _itemsize(plan)
    return _adam(numbers, gradients, _weights(plans) + 4 * factors)


def _weights(plans: dict[str, LeafPlan]) -> int:
    return sum(math.prod(plan.shape) * _itemsize(plan) for plan in plans.values())


def _warnings(plans: dict[str, LeafPlan]) -> tuple[str, ...]:
    said = []
    assumed = [p.path for p in plans.values() if p.mode == "lowrank" and p.assumed_view]
    if assumed:
        said.append(
            f"{len(assumed)} leaves with two axes were read as (rows, cols) without a "
            f"rule or a trace, first {paths.show(assumed[0])}; a stacked vector such as "
            "a scanned norm scale looks the same"
        )
    small: dict[str, list[str]] = {}
    for plan in plans.values():
        if plan.cause == "rank":
            small.setdefault(f"{plan.mode}: {plan.reason}", []).append(plan.path)
    for why, members in small.items():
        first = f"leaf {paths.show(members[0])}"
        who = (
            f"{first} is"
            if len(members) == 1
            else f"{first} and {len(members) - 1} more are"
        )
        said.append(f"{who} {why}")
    for one in (one for plan in plans.values() for one in plan.each):
        if one.sketch == "block" and one.dim % one.rank:
            said.append(
                f"leaf {paths.show(one.path)}: blocks of {one.rank} of {one.dim} rows "
                f"leave {one.dim % one.rank} out of each cycle of "
                f"{one.dim // one.rank} links, others each time, and are gathered; a "
                "rank that divides the rows slices, and leaves out none"
            )
    if not any(plan.adapted for plan in plans.values()):
        said.append(
            "no leaf is adapted: a spec reads leaves with two axes as matrices, and a "
            "params tree flattened to a vector has none"
        )
    return tuple(said)


def _adapted_cells(row: Row) -> tuple[str, str, str]:
    if row.mode != "lowrank":
        return "", "", ""
    return str(row.rank), row.side, f"{row.lam:.3g}"


def _costs(cost: Cost) -> tuple[str, ...]:
    held = (cost.weight_bytes, cost.gradient_bytes, cost.state_bytes, cost.sketch_bytes)
    return f"{cost.trained:,}", *map(_human, (*held, cost.traffic_bytes))


def _human(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 3  # path, view and mode are words; what follows is numbers

    def pad(index: int, cell: str) -> str:
        width = widths[index]
        return cell.ljust(width) if index < words else cell.rjust(width)

    text = ["  ".join(pad(i, c) for i, c in enumerate(line)).rstrip() for line in lines]
    return [text[0], "-" * len(text[0]), *text[1:-3], "-" * len(text[0]), *text[-3:]]
