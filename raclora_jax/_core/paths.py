"""Leaf <-> canonical path: one name for a leaf, whichever view of the model holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey

from raclora_jax._core.types import Leaf, Leaves, PyTree, TreeDef

KeyPath = tuple[Any, ...]


def canonical(keypath: KeyPath) -> str:
    """Joins a JAX key path into a canonical path.

    Args:
      keypath: A key path as ``jax.tree_util.tree_flatten_with_path`` gives it, without
        the inside of boxes.

    Returns:
      The names joined by ``/``; the empty string for a tree that is one leaf.

    Example:
      >>> import jax
      >>> [(path, _)], _ = jax.tree_util.tree_flatten_with_path({"a": [1.0]})
      >>> canonical(path)
      'a/0'
    """
    return jax.tree_util.keystr(keypath, simple=True, separator="/")


def _unboxed(keypaths: Iterable[KeyPath]) -> Callable[[KeyPath], KeyPath]:
    """Takes the inside of boxes off the end of a key path.

    A box (``nnx.Variable``, ``nn.Partitioned``) is a node whose one child is an attribute
    ``value``; it is no level of the tree, so that linen, nnx and plain dicts name a leaf
    alike. A node with other children beside ``value`` is none: ``(query, key, value)``.
    """
    children: dict[KeyPath, set[Any]] = {}
    for keypath in keypaths:
        for depth, key in enumerate(keypath):
            children.setdefault(keypath[:depth], set()).add(key)

    def unboxed(keypath: KeyPath) -> KeyPath:
        while keypath and children[keypath[:-1]] == {GetAttrKey("value")}:
            keypath = keypath[:-1]
        return keypath

    return unboxed


def _is_hidden(node: Leaf) -> bool:
    """Whether a node stands for a leaf that a partial tree leaves out."""
    return node is None or isinstance(node, optax.MaskedNode)


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[Leaves, Any]:
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
    unboxed = _unboxed(keypath for keypath, _ in _with_hidden(tree, is_leaf))
    leaves: Leaves = {}
    for keypath, leaf in pairs:
        path = canonical(unboxed(keypath))
        if path in leaves:
            raise ValueError(
                f"two leaves have the path {path!r}: sketches are drawn by path, so "
                "paths must differ; rename one of the keys, for example an int key "
                "beside the same number as a string"
            )
        leaves[path] = leaf
    return leaves, treedef


def _with_hidden(tree: PyTree, is_leaf: Callable[[Any], bool] | None) -> list[Any]:
    def stops(node: Leaf) -> bool:
        return _is_hidden(node) or (is_leaf is not None and is_leaf(node))

    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops)


def unflatten(treedef: TreeDef, leaves: Leaves) -> PyTree:
    """The tree with these leaves, which stand in the order ``flatten`` gave."""
    return jax.tree.unflatten(treedef, list(leaves.values()))


def show(path: str) -> str:
    """The path as it stands in messages; the root of a one-leaf tree has a name."""
    return repr(path) if path else "(the only leaf)"
