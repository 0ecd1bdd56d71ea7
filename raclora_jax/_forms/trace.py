"""Views read off a model: how its own operations use each leaf."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from raclora_jax._autodiff.interpret import arrays, evaluate, read_inputs
from raclora_jax._autodiff.stage import abstracted, stage
from raclora_jax._autodiff.uses import Use, Uses
from raclora_jax._autodiff.weight import leaf_weight
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan, check_rules_win, plan_tree, winner
from raclora_jax._core.spec import Rule, Spec


def trace_spec(
    fn: Callable[..., Any], params: Any, *args: Any, rank: int, **spec: Any
) -> Spec:
    """A ``Spec`` whose views are read off the operations of a model.

    The function is staged, not run. Axes that a product or a convolution contracts are
    the rows, and so is the axis of a lookup; axes that a scan, an index or a stacked
    product takes one by one are the batch; the others are the columns. Where uses
    disagree, as for an embedding that is the head too, the stored order decides. A leaf
    with two or more axes that is never contracted is no matrix: it joins the ``rest``.

    Args:
      fn: ``fn(params, *args)``, the loss or the forward pass.
      params: Tree of arrays or ``ShapeDtypeStruct``s.
      *args: What else ``fn`` takes; abstract arrays are enough.
      rank: Rank of every sketch, unless a rule says otherwise.
      **spec: Further fields of ``Spec``. A rule without a view gets the traced one.

    Returns:
      A spec with a rule for every leaf that has two or more axes.

    Raises:
      ValueError: If ``fn`` never uses a leaf with two or more axes, or a rule does not
        fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"query": jax.ShapeDtypeStruct((16, 4, 8), "float32")}
      >>> x = jax.ShapeDtypeStruct((5, 16), "float32")
      >>> fn = lambda p, x: jnp.einsum("te,ehd->thd", x, p["query"])
      >>> spec = trace_spec(fn, params, x, rank=2)
      >>> spec.rules[0].rows
      (0,)
    """
    wanted = Spec(rank, **spec)
    leaves, _ = paths.flatten(params)
    check_rules_win(wanted, list(leaves))
    uses = _watched(fn, params, args, wanted)
    rules: dict[str, Rule] = {}
    for path, leaf in leaves.items():
        said, ndim = winner(wanted, path), len(jnp.shape(leaf))
        if ndim > 1 and _needs_view(path, wanted):
            rules[path] = _rule(path, ndim, uses.views.get(path, []), said, wanted)
        elif said is not None:
            rules[path] = said
    traced = dataclasses.replace(wanted, rules=_grouped(rules))
    plan_tree(traced, params)
    return traced


def _watched(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], spec: Spec
) -> Uses:
    """What ``fn`` does with its leaves, found without running it."""
    leaves, treedef = paths.flatten(params)
    shapes = [
        jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        for leaf in leaves.values()
    ]
    inputs, filled = abstracted(args)
    staged = stage(
        lambda params, arrays: fn(params, *filled(arrays)),
        jax.tree.unflatten(treedef, shapes),
        inputs,
    )
    uses = Uses()

    def watch(arrays_in: list[Any], rest: list[Any]) -> list[Any]:
        values = [
            leaf_weight(array, _unplanned(path, array), uses) if array.ndim > 1 else array
            for path, array in zip(leaves, arrays_in, strict=True)
        ]
        return arrays(evaluate(staged.jaxpr, [*values, *rest]), "output")

    jax.eval_shape(watch, shapes, inputs)
    read = read_inputs(staged.jaxpr)
    for index, (path, shape) in enumerate(zip(leaves, shapes, strict=True)):
        needs = len(shape.shape) > 1 and _needs_view(path, spec)
        if needs and index not in read:
            raise ValueError(
                f"leaf {paths.show(path)} of shape {shape.shape} is never used by the "
                "function, so it has no view; leave it out of params, or add "
                f"Rule({re.escape(path)!r}, mode='frozen')"
            )
    return uses


def _unplanned(path: str, array: Any) -> LeafPlan:
    return LeafPlan(path=path, shape=array.shape, dtype=str(array.dtype), mode="lowrank")


def _needs_view(path: str, spec: Spec) -> bool:
    rule = winner(spec, path)
    return rule is None or (rule.mode == "lowrank" and not rule.has_view)


def _rule(path: str, ndim: int, views: list[Use], said: Rule | None, spec: Spec) -> Rule:
    """The rule of one leaf: what the user said of it, with the view that was seen."""
    found = _view(ndim, views)
    said = Rule(path) if said is None else said
    if found is None:
        return dataclasses.replace(said, mode=spec.rest)
    rows, batch = found
    return dataclasses.replace(said, rows=rows, batch=batch)


def _view(ndim: int, views: list[Use]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Rows and batch of a leaf, or ``None`` if it is no matrix."""
    summed = frozenset[int]().union(*(view.contracted for view in views))
    batch = frozenset[int]().union(*(view.batch for view in views)) - summed
    matrix = [axis for axis in range(ndim) if axis not in batch]
    rows = [view.contracted for view in views if view.contracted]
    # Where uses disagree, the rows are those of the use that contracts the first axis.
    rows.sort(key=lambda axes: matrix[0] not in axes)
    if not rows or len(rows[0]) == len(matrix):
        return None
    return tuple(sorted(rows[0])), tuple(sorted(batch))


def _grouped(rules: dict[str, Rule]) -> list[Rule]:
    """One rule for all the leaves that are treated alike."""
    groups: dict[Rule, list[str]] = {}
    for path, rule in rules.items():
        groups.setdefault(dataclasses.replace(rule, path=""), []).append(path)
    return [
        dataclasses.replace(rule, path="|".join(map(re.escape, members)))
        for rule, members in groups.items()
    ]
