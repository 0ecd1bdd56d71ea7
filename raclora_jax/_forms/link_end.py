"""The end of a link on one device, leaf by leaf: the same bits on every mesh.

A program over a mesh may round otherwise than one of a single device, and one that draws
a sketch where it is used otherwise than one that is handed it. Here sketches are drawn by
one program, and each leaf is merged by one that sees nothing else, whatever it lies on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, SingleDeviceSharding

from raclora_jax._chain.state import next_of
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.sharding import sharding_of
from raclora_jax._core.sides import sketch_shardings
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import Drawn, Leaf, PyTree
from raclora_jax._forms.adapter import AdapterChain, is_quantised, matched, merge


@functools.partial(jax.jit, static_argnames="spec")
def merged(
    base_params: PyTree, factors: PyTree, chain: AdapterChain, spec: Spec
) -> tuple[Any]:
    """``merge``, compiled, in the form that ``link_end`` takes."""
    return (merge(base_params, factors, chain, spec),)


def link_end(
    trees: Sequence[PyTree],
    factors: PyTree,
    chain: AdapterChain,
    spec: Spec,
    merged: Callable[..., tuple[Any, ...]] = merged,
) -> tuple[Any, ...]:
    """Merges, draws the next sketches and puts the factors back to zero.

    Args:
      trees: The weights of the link that ends, and what else ``merged`` changes with
        them.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run.
      merged: ``merged(*trees, factors, chain, spec=spec)``, compiled.

    Returns:
      ``(*trees, factors, chain)`` of the next link, each array where it was.

    Raises:
      ValueError: If factors, chain and base do not belong together.
    """
    found = matched(trees[0], factors, chain, spec)
    adapted = {path: plan for path, plan in found.plans.items() if plan.adapted}
    data, link = jax.device_get((chain.key_data, chain.link))
    sketches = sketches_at(data, int(link), adapted)
    flat, treedefs = zip(
        *(paths.flatten(tree, is_leaf=is_quantised) for tree in trees), strict=True
    )
    new = [dict(leaves) for leaves in flat]
    dense = [path for path, plan in found.plans.items() if plan.mode == "dense"]
    device = _device([*found.leaves.values()])
    for group in [*([path] for path in adapted), *([dense] if dense else [])]:
        parts = [{p: leaves[p] for p in group if p in leaves} for leaves in flat]
        own = {path: sketches[path] for path in group if path in sketches}
        with _alone(device):
            out = merged(
                *jax.tree.map(
                    functools.partial(_whole, device=device),
                    (*parts, {path: found.values[path] for path in group}),
                ),
                AdapterChain(link, data, own, chain.stamps),
                spec=spec,
            )
        # Put back at once: one leaf at a time is in whole on one device.
        for leaves, olds, news in zip(new, parts, out, strict=True):
            leaves.update({p: jax.tree.map(placed, news[p], olds[p]) for p in olds})
    chain = chain._replace(link=next_of(chain.link))
    zeros = jax.tree.map(
        lambda factor: placed(np.zeros(factor.shape, factor.dtype), factor), factors
    )
    return (
        *map(paths.unflatten, treedefs, new),
        zeros,
        with_sketches(chain, adapted, spec),
    )


def with_sketches(
    chain: AdapterChain, plans: dict[str, LeafPlan], spec: Spec
) -> AdapterChain:
    """A chain with the sketches of its link, as every mesh draws them."""
    if not spec.cache:
        return chain._replace(sketches={})
    data, link = jax.device_get((chain.key_data, chain.link))
    drawn = sketches_at(data, int(link), plans)
    found = {
        path: _beside(drawn[path], chain.sketches.get(path), plans[path])
        for path in drawn
    }
    return chain._replace(sketches=found)


def sketches_at(
    data: np.ndarray, link: int, plans: dict[str, LeafPlan]
) -> dict[str, Drawn]:
    """The sketches of a link on the host, drawn by one program on one device."""
    bare = tuple(with_sharding(plans[path], None) for path in sorted(plans))
    return _drawn(tuple(data.tolist()), link, bare)


# Of the link that ends and the one that begins, which is the former the next time.
@functools.lru_cache(maxsize=2)
def _drawn(
    words: tuple[int, ...], link: int, plans: tuple[LeafPlan, ...]
) -> dict[str, Drawn]:
    with _alone(jax.local_devices()[0]):
        drawn = draw(np.array(words, np.uint32), np.int32(link), plans)
        return jax.device_get(drawn)


@functools.partial(jax.jit, static_argnames="plans")
def draw(data: Array, link: Array, plans: tuple[LeafPlan, ...]) -> dict[str, Drawn]:
    """``draw_all``, compiled, for all who are to have the same bits."""
    return draw_all(data, link, plans)


def _alone(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Where programs know of no mesh that somebody has set around them."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    auto = (AxisType.Auto,)
    return jax.set_mesh(jax.make_mesh((1,), ("one",), auto, devices=[device]))


def _device(leaves: list[Leaf]) -> Any:
    """The first device of this process that a leaf is on."""
    for leaf in jax.tree.leaves(leaves):
        if _is_bound(leaf):
            devices: Any = leaf.sharding.addressable_devices
            return min(devices, key=lambda device: device.id)
    return jax.local_devices()[0]


def _whole(leaf: Leaf, device: Any) -> Leaf:
    """A leaf in whole on one device; one that is free to go anywhere stays so."""
    if not _is_bound(leaf):
        return leaf
    # A plain device would leave the mesh in the type of an array on explicit axes.
    alone = SingleDeviceSharding(device)
    return jax.device_put(leaf if leaf.is_fully_addressable else on_host(leaf), alone)


def _is_bound(leaf: Leaf) -> bool:
    """Whether an array is where somebody put it."""
    return isinstance(leaf, Array) and (leaf.committed or sharding_of(leaf) is not None)


def on_host(leaf: Leaf) -> np.ndarray:
    """A leaf in whole on the host of every process, wherever its shards are."""
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def placed(new: Leaf, old: Leaf) -> Array:
    """A new array where the old one was."""
    if _is_bound(old):
        return jax.device_put(new, old.sharding)
    return jnp.asarray(new)


def _beside(sketch: Drawn, old: Drawn | None, plan: LeafPlan) -> Drawn:
    """A new sketch where the old one was, or where its leaf says."""
    if old is not None:
        return jax.tree.map(placed, sketch, old)
    if plan.sharding is not None:
        return jax.device_put(sketch, sketch_shardings(plan))
    return jax.tree.map(jnp.asarray, sketch)
