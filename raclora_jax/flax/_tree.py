"""Any Flax view of a model as one plain tree with canonical paths, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from raclora_jax._core import paths
from raclora_jax._core.types import Leaf, PyTree
from raclora_jax._extras import extra

with extra("flax"):
    from flax import nnx

# An nnx.Module, or any view that holds a model's parameters.
Model: TypeAlias = Any


def to_tree(model: Model) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The trainable leaves of any Flax view of a model as one plain tree.

    Every view of one model gives the same tree, so the same paths and sketches: an
    ``nnx.Module``, its ``nnx.State`` or pure dict, linen variables or params, as a dict
    or ``FrozenDict``, with or without ``nn.Partitioned`` boxes.

    Args:
      model: One of the above. Of a module, a state or linen variables only the
        parameters are taken (``nnx.Param``, the collection ``"params"``).

    Returns:
      ``(tree, restore)``: nested plain dicts of arrays, and a function that puts such a
      tree back into a new object of the kind that came in.

    Raises:
      TypeError: If ``model`` is none of these.
      ValueError: From ``restore``, if a leaf is missing, new or of another shape.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
      >>> tree, restore = to_tree(layer)
      >>> sorted(tree), restore(tree).kernel.shape
      (['bias', 'kernel'], (6, 4))
    """
    return part_as_tree(model, nnx.Param)


def part_as_tree(model: Model, wrt: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """``to_tree`` of the variables that a filter of nnx takes."""
    params, finish = _parameters(model, wrt)
    leaves, treedef = paths.flatten(params)
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = leaf

    def restore(tree: PyTree) -> PyTree:
        back, _ = paths.flatten(tree)
        for path in [*leaves, *back]:
            expected = _shape(leaves, path)
            if _shape(back, path) != expected:
                raise ValueError(
                    f"leaf {paths.show(path)}: expected {expected}, got "
                    f"{_shape(back, path)}; restore takes a tree like the one to_tree "
                    "gave"
                )
        return finish(jax.tree.unflatten(treedef, [back[path] for path in leaves]))

    return tree, restore


def check_module(model: object, name: str) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"flax.{name} takes an nnx.Module, got {type(model).__name__}; for linen "
            f"params and plain trees use raclora_jax.{name}"
        )


def _parameters(model: Model, wrt: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The trainable part of a view, and how to put a new one in its place."""
    if isinstance(model, nnx.Module):
        graphdef, *states = nnx.split(model, wrt, ...)
        params, rest = states

        def merged(new: PyTree) -> nnx.Module:
            # Variables of its own: those of the model may be of an outer trace.
            return nnx.merge(graphdef, new, jax.tree.map(lambda leaf: leaf, rest))

        return params, merged
    if isinstance(model, nnx.State) and _holds_variables(model):
        split = nnx.split_state(model, wrt, ...)
        return split[0], lambda new: nnx.merge_state(new, split[1])
    if isinstance(model, Mapping) and isinstance(model.get("params"), Mapping):
        kind: Callable[[Any], Any] = type(model)
        return model["params"], lambda new: kind({**model, "params": new})
    if isinstance(model, Mapping | nnx.State):
        return model, lambda new: new
    raise TypeError(
        f"to_tree takes an nnx.Module, an nnx.State, or linen variables or params, got "
        f"{type(model).__name__}; of a TrainState pass .params"
    )


def _holds_variables(state: PyTree) -> bool:
    def is_variable(node: Leaf) -> bool:
        return isinstance(node, nnx.Variable)

    return any(map(is_variable, jax.tree.leaves(state, is_leaf=is_variable)))


def _shape(leaves: dict[str, Any], path: str) -> str:
    if path not in leaves:
        return "no leaf"
    return f"shape {jnp.shape(leaves[path])}"
