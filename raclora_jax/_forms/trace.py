"""Views read off a model: how its own operations use each leaf."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from raclora_jax._autodiff.reads import read_inputs
from raclora_jax._autodiff.stage import abstracted, stage
from raclora_jax._autodiff.uses import Use, Uses, user_level
from raclora_jax._autodiff.watch import Seen, watch
from raclora_jax._autodiff.weight import leaf_weight
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree, shape_and_dtype
from raclora_jax._core.spec import Rule, Spec, check_rules_win, winner
from raclora_jax._core.types import Leaf, PyTree, is_number

# The modes of leaves that are read as matrices.
_VIEWED = ("lowrank", "full")


def trace_spec(
    fn: Callable[..., Any], params: PyTree, *args: Any, rank: int, **spec: Any
) -> Spec:
    """A ``Spec`` whose views are read off the operations of a model.

    The function is staged, not run. Axes that a product or a convolution contracts are
    the rows, and so is the axis of a lookup; axes that a scan, an index or a stacked
    product takes one by one are the batch; the others are the columns. A leaf that is
    looked up takes its smaller side where the spec says ``"auto"``. Where uses
    disagree, as for an embedding that is the head too, the stored order decides. A leaf
    with two or more axes that is never contracted is no matrix: it joins the ``rest``.
    So does one whose use cannot be read, with a warning that names the rule to add.

    Args:
      fn: ``fn(params, *args)``, the loss or the forward pass.
      params: Tree of arrays or ``ShapeDtypeStruct``s.
      *args: What else ``fn`` takes; abstract arrays are enough.
      rank: Rank of every sketch, unless a rule says otherwise.
      **spec: Further fields of ``Spec``. A rule without a view gets the traced one.

    Returns:
      A spec with a rule for every leaf that has two or more axes.

    Raises:
      TypeError: If a leaf is no array; the message names it.
      ValueError: If ``fn`` never uses a leaf with two or more axes, a rule does not fit,
        no leaf is left to adapt, or ``rest="frozen"`` would freeze one whose use cannot
        be read.

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
            rules[path] = _rule(path, ndim, uses.found.get(path, []), said, wanted)
        elif said is not None:
            rules[path] = said
    traced = dataclasses.replace(wanted, rules=_grouped(rules))
    plans = plan_tree(traced, params)
    unread = {
        path: (operation, leaves[path].ndim)
        for path, operation in uses.lost.items()
        if rules[path].mode not in _VIEWED and _needs_view(path, wanted)
    }
    _tell_unread(unread, wanted.rest)
    if all(plan.mode != "lowrank" for plan in plans.values()):
        raise ValueError(
            f"no leaf is left to adapt: of {len(plans)} none is seen to be contracted or "
            "has a rule that names its view; add such a rule, Rule(path, rows=...)"
        )
    return traced


def _tell_unread(unread: dict[str, tuple[str, int]], rest: str) -> None:
    """Warns of leaves whose use shows no view, or refuses where they would be frozen."""
    if not unread:
        return
    listed = [
        f"{paths.show(path)} in {operation}, add "
        f"Rule({re.escape(path)!r}, rows={tuple(range(ndim - 1))})"
        for path, (operation, ndim) in unread.items()
    ]
    text = (
        "these leaves are read in a way that shows no rows, so they are "
        f"{'frozen' if rest == 'frozen' else 'trained in full'}; to adapt one, add its "
        f"rule, with the axes that are summed for rows: {'; '.join(listed[:8])}"
        f"{f'; and {len(listed) - 8} more' if len(listed) > 8 else ''}"
    )
    if rest == "frozen":
        raise ValueError(f"{text}; or say so with mode='frozen' in its rule")
    warnings.warn(text, stacklevel=user_level())


def _abstract(path: str, leaf: Leaf) -> jax.ShapeDtypeStruct:
    shape, dtype = shape_and_dtype(path, leaf)
    return jax.ShapeDtypeStruct(shape, dtype if is_number(dtype) else leaf.dtype)


def _watched(
    fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...], spec: Spec
) -> Uses:
    """What ``fn`` does with its leaves, found without running it."""
    leaves, treedef = paths.flatten(params)
    shapes = [_abstract(path, leaf) for path, leaf in leaves.items()]
    inputs, filled = abstracted(args)
    staged = stage(
        lambda params, arrays: fn(params, *filled(arrays)),
        jax.tree.unflatten(treedef, shapes),
        inputs,
    )
    uses = Uses()

    def follow(arrays: list[Any]) -> None:
        values = [
            Seen((leaf_weight(array, _unplanned(path, array), uses),))
            if array.ndim > 1
            else Seen()
            for path, array in zip(leaves, arrays, strict=True)
        ]
        # What a function of the leaves alone closes over is its data.
        closed_over = Seen() if inputs else None
        watch(staged.jaxpr, [*values, *(None for _ in inputs)], closed_over)

    jax.eval_shape(follow, shapes)
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
    return rule is None or (rule.mode in _VIEWED and not rule.has_view)


def _rule(path: str, ndim: int, views: list[Use], said: Rule | None, spec: Spec) -> Rule:
    """The rule of one leaf: what the user said of it, with the view that was seen."""
    found = _view(ndim, views)
    said = Rule(path) if said is None else said
    if found is None:
        return dataclasses.replace(said, mode=spec.rest, side=None)
    rows, batch = found
    side = spec.side if said.side is None else said.side
    if side == "auto" and any(view.is_lookup for view in views):
        # A step sees few of the words, and a sketch of all words would move every one.
        side = "smaller"
    own = {} if side == spec.side else {"side": side}
    return dataclasses.replace(said, rows=rows, batch=batch, **own)


def _view(ndim: int, views: list[Use]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Rows and batch of a leaf, or ``None`` if it is no matrix."""
    summed = frozenset[int]().union(*(view.contracted for view in views))
    # An axis that one use stacks and another sums belongs to the matrix.
    batch = frozenset[int]().union(*(view.batch for view in views)) - summed
    matrix = [axis for axis in range(ndim) if axis not in batch]
    # A sum over all of a leaf's axes is no product of a matrix.
    rows = [
        view.contracted
        for view in views
        if view.contracted and not view.contracted.issuperset(matrix)
    ]
    # Where uses disagree, the rows are those of the use that contracts the first axis.
    rows.sort(key=lambda axes: matrix[0] not in axes)
    if not rows:
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
