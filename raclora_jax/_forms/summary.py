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
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sides import named
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaf, PyTree, is_number
from raclora_jax._forms.apply import apply_updates
from raclora_jax._forms.costs import Cost, Row, Summary
from raclora_jax._forms.fused import reporting_step
from raclora_jax._forms.gradient import reporting
from raclora_jax._forms.optimizer import raclora


def summary(
    params: PyTree,
    spec: Spec | int,
    loss_fn: Callable[..., Any] | None = None,
    *args: Any,
    inner: optax.GradientTransformation | None = None,
    before: optax.GradientTransformation | None = None,
    has_aux: bool = False,
    fused: bool = False,
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
      fused: Whether the compiled step is that of ``fused_step``.

    Returns:
      A ``Summary``; ``print`` shows it with equal layers as one, ``.by_leaf()`` is the
      table of all leaves, ``.rows`` are for programs.

    Raises:
      ValueError: If the spec does not fit the tree.

    Example:
      >>> import jax
      >>> params = {"kernel": jax.ShapeDtypeStruct((1024, 512), "float32")}
      >>> costs = summary(params, 8)
      >>> costs.rows[0].view, costs.total.trained, costs.full.trained
      ('1024 x 512', 4096, 524288)
      >>> "layers/{0..11}/kernel" in str(summary({"layers": [params] * 12}, 8))
      True
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
    warnings, peak, moving = _warnings(plans), None, None
    if loss_fn is not None:
        seen: list[tuple[Uses, frozenset[str]]] = []
        step = _step(loss_fn, spec, tx, has_aux, fused, lambda *found: seen.append(found))
        peak = _peak(step, shaped, state, args)
        uses, moved = seen[0]
        moving = tuple(path for path in plans if path in moved) if fused else None
        warnings += tuple(
            f"leaf {paths.show(path)}: its gradient is formed in full by {operation}"
            for path, operation in uses.fallbacks
        )
    return Summary(rows, total, _full(plans), _lora(plans), warnings, peak, moving)


_COUNTERS = ("count", "link", "step_in_link", "law", "key_data", "skipped")


def _step(
    loss_fn: Callable[..., Any],
    spec: Spec,
    tx: optax.GradientTransformation,
    has_aux: bool,
    fused: bool,
    report: Callable[[Uses, frozenset[str]], None],
) -> Callable[..., PyTree]:
    """A whole step that reports what it saw of the model."""
    if fused:
        return reporting_step(loss_fn, tx, has_aux, report)
    grad_fn = reporting(loss_fn, spec, has_aux, lambda uses: report(uses, frozenset()))

    def step(params: PyTree, state: PyTree, *args: Any) -> PyTree:
        value, grads = grad_fn(params, state, *args)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, value

    return step


def _peak(
    step: Callable[..., PyTree], params: PyTree, state: PyTree, args: tuple[Any, ...]
) -> int | None:
    """Peak bytes of a step, as the compiler plans it, if the backend says."""
    inputs, filled = abstracted(args)

    def whole(params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        return step(params, state, *filled(inputs))

    lowered = jax.jit(whole, donate_argnums=(0, 1)).lower(params, state, inputs)
    memory = lowered.compile().memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # What is donated is argument and output, and is there once.
    return int(held - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


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
        # The longest ending first: bytes of a/kernel are not those of a leaf kernel.
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
        side=plan.side if plan.chance is None else str(plan.chance),
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
        if one.law == "block" and one.dim % one.rank:
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
