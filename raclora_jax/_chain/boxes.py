"""Axis names that a library keeps around an array, handed on from a leaf to its state.

A box (``nn.Partitioned``, ``nn.LogicallyPartitioned``, ``nnx.Param`` with a sharding) is
a node with one array in it and a name for each of its axes. They are known by what they
can do, so that Flax need not be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sharding import inherited
from raclora_jax._core.sides import named
from raclora_jax._core.types import Label, Leaf, PyTree

# A name for each axis, ``None`` for one that has none.
Names = tuple[Any, ...]


class Boxed(NamedTuple):
    """What an array of the state may be, by its shape.

    Attributes:
      shape: Its shape.
      names: The names of its axes.
      box: The box of its leaf.
    """

    shape: tuple[int, ...]
    names: Names
    box: Any


def boxes_of(params: PyTree) -> dict[str, Any]:
    """``{path: box}`` for the leaves that are in one with names."""
    nodes, _ = paths.flatten(params, is_leaf=_is_box)
    return {path: node for path, node in nodes.items() if any(_names(node))}


def boxed(state: PyTree, plans: Mapping[str, LeafPlan], boxes: dict[str, Any]) -> Any:
    """A ``RacLoraState`` whose factors, sketches and moments are in boxes of their own.

    Args:
      state: The state.
      plans: ``{path: plan}``.
      boxes: ``{path: box}`` of the leaves.

    Returns:
      The state with the same arrays, each in a copy of its leaf's box that names its own
      axes.
    """
    known: dict[tuple[str, str], list[Boxed]] = {}
    for path, box in boxes.items():
        for part, name, found in _arrays(plans[path], box):
            known.setdefault((part, name), []).append(found)

    def one(keypath: tuple[Any, ...], leaf: Leaf) -> Leaf:
        for found in known.get(_where(keypath), ()):
            if found.shape == leaf.shape:
                return _put(found.box, leaf, found.names)
        return leaf

    return jax.tree_util.tree_map_with_path(one, state)


def unboxed(tree: PyTree) -> Any:
    """A tree with the arrays of its boxes in their places."""

    def bare(node: Leaf) -> Leaf:
        return jax.tree.leaves(node)[0] if _is_box(node) else node

    return jax.tree.map(bare, tree, is_leaf=_is_box)


def boxed_as(tree: PyTree, like: PyTree) -> Any:
    """A tree with its arrays in the boxes that another tree of its kind has."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def keeping_boxes(update: Callable[..., Any]) -> Callable[..., Any]:
    """An optax ``update`` that sees a state without the boxes that it is handed in."""

    def around(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[Any, Any]:
        answer, new = update(updates, unboxed(state), params, **extra)
        return answer, boxed_as(new, state)

    return around


def _arrays(plan: LeafPlan, box: Any) -> Iterator[tuple[str, str, Boxed]]:
    """Where in a state a leaf has arrays, under which name, and what they may be.

    What an inner rule keeps for a leaf is known by its shape alone: of the factor's
    (moments), or of the factor's without the rank (a second moment for each column).
    """
    leaf = (*_names(box), *(None for _ in plan.shape[len(_names(box)) :]))
    if plan.mode == "frozen":
        return
    yield "master", plan.path, Boxed(plan.shape, leaf, box)
    if not plan.adapted:
        yield "dense", plan.path, Boxed(plan.shape, leaf, box)
        return
    for name, one in named(plan).items():
        factor = _inherited(one, leaf, one.factor_shape, one.factor_axes)
        rank = len(one.batch)
        yield "lowrank", name, Boxed(one.factor_shape, factor, box)
        # What a rule keeps for each column.
        shape = (*one.factor_shape[:rank], *one.factor_shape[rank + 1 :])
        yield "lowrank", name, Boxed(shape, (*factor[:rank], *factor[rank + 1 :]), box)
        axes = one.sketch_axes[: len(one.sketch_shape)]
        sketch = _inherited(one, leaf, one.sketch_shape, axes)
        yield "sketches", name, Boxed(one.sketch_shape, sketch, box)


def _inherited(
    plan: LeafPlan, leaf: Names, shape: tuple[int, ...], axes: Sequence[Label]
) -> Names:
    """The names of an array; with those that its leaf lost, if they are a mesh's."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if plan.sharding is not None:
        mesh = plan.sharding.mesh
    flat = {
        n for name in leaf if name for n in ((name,) if isinstance(name, str) else name)
    }
    if flat <= {*mesh.axis_names}:
        sharding = NamedSharding(mesh, PartitionSpec(*leaf))
        spread = plan.selection is None or shape == plan.factor_shape
        found = inherited(sharding, shape, axes, spread=spread).sharding.spec
        return (*found, *(None for _ in shape[len(found) :]))
    return tuple(leaf[axis] if isinstance(axis, int) else None for axis in axes)


def _where(keypath: tuple[Any, ...]) -> tuple[str, str]:
    """The part of a state that an array is in, and the name of its leaf there."""
    part = ""
    name = ""
    for key in keypath:
        match key:
            case GetAttrKey(name="lowrank" | "dense" | "sketches" | "master" as found):
                part = part or found
            case DictKey(key=found):
                name = str(found)
            case GetAttrKey(name="left" | "right" as side) if part == "sketches":
                name = f"{name}/{side}".lstrip("/")
    return part, name


def _is_box(node: Leaf) -> bool:
    linen = hasattr(node, "replace_boxed") and hasattr(node, "names")
    nnx = hasattr(node, "get_metadata") and hasattr(node, "set_metadata")
    return linen or nnx


def _names(node: Leaf) -> Names:
    if not _is_box(node):
        return ()
    if hasattr(node, "names"):
        return tuple(node.names)
    return tuple(node.get_metadata().get("out_sharding") or ())


def _put(box: Any, array: Leaf, names: Names) -> Any:
    if hasattr(box, "names"):
        return box.replace(value=array, names=names)
    copy = box.replace(array)
    copy.set_metadata(out_sharding=names)
    for spare in ("sharding_names", "param_scan_axis"):  # the leaf's axes said once more
        if copy.has_metadata(spare):
            copy.del_metadata(spare)
    return copy
