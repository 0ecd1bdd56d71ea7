"""Leaf <-> canonical path: one name for a leaf, whichever view of the model holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def canonical(keypath: tuple[Any, ...]) -> str:
    """Joins a JAX key path into a canonical path.

    A trailing attribute ``value`` is the inside of a box (``nnx.Variable``,
    ``nn.Partitioned``), not a level of the tree, and is dropped. So linen, nnx and
    plain dicts name a leaf alike.

    Args:
      keypath: A key path as ``jax.tree_util.tree_flatten_with_path`` gives it.

    Returns:
      The names joined by ``/``; the empty string for a tree that is one leaf.

    Example:
      >>> import jax
      >>> [(path, _)], _ = jax.tree_util.tree_flatten_with_path({"a": [1.0]})
      >>> canonical(path)
      'a/0'
    """
    while keypath and keypath[-1] == GetAttrKey("value"):
        keypath = keypath[:-1]
    return "/".join(_name(key) for key in keypath)


def _name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=name):
            return str(name)
        case GetAttrKey(name=name):
            return str(name)
    return str(key)


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[dict[str, Any], Any]:
    """Flattens a tree into ``{path: leaf}``, in tree order, and its structure.

    Args:
      tree: Any pytree.
      is_leaf: As in ``jax.tree.flatten``.

    Returns:
      The leaves by canonical path, and the treedef for ``jax.tree.unflatten``.

    Raises:
      ValueError: If two leaves have the same path.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves: dict[str, Any] = {}
    for keypath, leaf in pairs:
        path = canonical(keypath)
        if path in leaves:
            raise ValueError(
                f"two leaves have the path {path!r}: sketches are drawn by path, so "
                "paths must differ; rename one of the keys, for example an int key "
                "beside the same number as a string"
            )
        leaves[path] = leaf
    return leaves, treedef


def unflatten(treedef: Any, leaves: dict[str, Any]) -> Any:
    """The tree with these leaves, which stand in the order ``flatten`` gave."""
    return jax.tree.unflatten(treedef, list(leaves.values()))


def show(path: str) -> str:
    """The path as it stands in messages; the root of a one-leaf tree has a name."""
    return repr(path) if path else "(the only leaf)"
