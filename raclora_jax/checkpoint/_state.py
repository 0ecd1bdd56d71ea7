"""What of a run is saved, and into what it is read back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from raclora_jax._chain.state import SketchCache, is_state
from raclora_jax._core import paths
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import Leaf, Leaves, PyTree, TreeDef
from raclora_jax.checkpoint._everyone import one_line
from raclora_jax.checkpoint._leaves import described, zeros


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: The step it was saved under.
      state: The tree, with the structure and the shardings that were asked for.
      data: The position in the data, as it was given to ``save``.
      spec: The spec of the run that saved it.
    """

    step: int
    state: Any
    data: Any
    spec: Spec


def abstract_state(
    tx: optax.GradientTransformation, params: PyTree, *, shardings: PyTree = None
) -> tuple[Any, Any]:
    """``(params, opt_state)`` as shapes, dtypes and shardings: what to restore into.

    Args:
      tx: The transformation of the run.
      params: Arrays, or abstract arrays with shardings.
      shardings: A sharding per leaf of ``tx.init(params)``; may be left out where the
        params sit on one device.

    Returns:
      Two trees of ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: If the params are spread over devices and no shardings are given: to
        put the state whole on each would be the wrong guess. If the shardings are those
        of another tree.
      TypeError: If a leaf of the params is no array.

    Example:
      >>> import raclora_jax as rl
      >>> tx = rl.raclora(1e-3, rl.Spec(2), key=0)
      >>> params, state = abstract_state(tx, {"kernel": jnp.ones((6, 4))})
      >>> params["kernel"].shape, state.count.dtype
      ((6, 4), dtype('int32'))
    """
    leaves, treedef = paths.flatten(params)
    leaves = {path: _abstract(path, leaf) for path, leaf in leaves.items()}
    params = paths.unflatten(treedef, leaves)
    state = jax.eval_shape(tx.init, params)
    if shardings is not None:
        try:
            return params, jax.tree.map(_placed, state, shardings)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "shardings must be a tree like tx.init(params), with a sharding for each "
                f"leaf: {one_line(error)}"
            ) from error
    homes = {leaf.sharding for leaf in jax.tree.leaves(params)} - {None}
    devices = set().union(*(home.device_set for home in homes))
    if len(devices) > 1:
        raise ValueError(
            f"the params are spread over {len(devices)} devices, and nothing says where "
            "the optimizer state goes; pass shardings=, one for each leaf of "
            "tx.init(params)"
        )
    home = next(iter(homes), None)
    return params, jax.tree.map(lambda leaf: _placed(leaf, home), state)


def _abstract(path: str, leaf: Leaf) -> jax.ShapeDtypeStruct:
    shape, dtype = described(path, leaf)
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(shape, getattr(leaf, "dtype", dtype), sharding=sharding)


def _placed(leaf: Leaf, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def saved_leaves(state: PyTree) -> tuple[Leaves, TreeDef]:
    """``{path: leaf}`` without cached sketches, which are derived, and the treedef."""

    def bare(node: Leaf) -> Leaf:
        return node._replace(sketches=None) if is_state(node) else node

    return paths.flatten(jax.tree.map(bare, state, is_leaf=is_state))


def with_sketches(state: PyTree, like: PyTree) -> PyTree:
    """A restored state with a cache that the first update finds stale and redraws."""

    def filled(target: Leaf, node: Leaf) -> Leaf:
        if not is_state(target):
            return node
        kept = target.sketches
        # -1, which no link is: the cache is stale at whatever link the run goes on.
        link = jnp.asarray(zeros(kept.link)) - 1
        values = jax.tree.map(zeros, kept.values)
        return node._replace(sketches=SketchCache(link, values))

    return jax.tree.map(filled, like, state, is_leaf=is_state)


def table(leaves: Leaves) -> dict[str, list[Any]]:
    """``{path: [dtype, shape]}``: what makes two models or optimizers the same."""
    return {
        path: [dtype, list(shape)]
        for path, leaf in leaves.items()
        for shape, dtype in [described(path, leaf)]
    }


def check_table(there: dict[str, list[Any]], leaves: Leaves, step: int) -> None:
    """Refuses leaves that are not those of a checkpoint, naming the first and both."""
    here = table(leaves)

    def said(entry: list[Any] | None) -> str:
        return "no leaf" if entry is None else f"{entry[0]} of shape {tuple(entry[1])}"

    for path in [*here, *there]:
        if here.get(path) != there.get(path):
            raise ValueError(
                f"leaf {paths.show(path)}: the checkpoint of step {step} holds "
                f"{said(there.get(path))}, this run {said(here.get(path))}; it is of "
                "another model or optimizer: restore into the state it was saved from, "
                "or start in another directory"
            )
