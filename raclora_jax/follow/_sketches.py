"""The sketches of a link, drawn by one program on trainer and follower."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from raclora_jax._core.digest import digests
from raclora_jax._core.picks import Picks
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.rounding import places_of
from raclora_jax._core.sides import in_link
from raclora_jax._core.types import Drawn, Leaf, PyTree
from raclora_jax._forms.link_end import draw
from raclora_jax.follow._position import key_of


class Own(NamedTuple):
    """What a link has drawn for one leaf.

    Attributes:
      plan: Plan of the side in use, with the sharding of the weight and without its path,
        so that leaves of one kind share a program.
      sketch: Its sketch, on one device.
      digest: A number that tells its bits.
      seen: Its ``probe``.
    """

    plan: LeafPlan
    sketch: Drawn
    digest: int
    seen: np.ndarray


def own_sketches(run: str, link: int, plans: dict[str, LeafPlan]) -> dict[str, Own]:
    """The sketches of a link for the leaves of some plans, by path."""
    devices = [plan.sharding.mesh.devices for plan in plans.values() if plan.sharding]
    device = devices[0].flat[0] if devices else jax.devices()[0]
    bare = tuple(with_sharding(plans[path], None) for path in sorted(plans))
    found = _drawn(run, link, bare, device)
    return {
        path: one._replace(
            plan=dataclasses.replace(
                with_sharding(one.plan, plans[path].sharding), path=""
            )
        )
        for path, one in found.items()
    }


# Of trainer and follower in one process, and no link more: a draw is dear, and its
# sketches are held as long as they are in here.
@functools.lru_cache(maxsize=2)
def _drawn(
    run: str, link: int, plans: tuple[LeafPlan, ...], device: Any
) -> dict[str, Own]:
    # On a mesh of one device, whatever the weights are on: where a draw is partitioned,
    # or fused with its use, it may round otherwise.
    auto = (AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("one",), auto, devices=[device])):
        both = draw(key_of(run), np.int32(link), plans)
        used = {plan.path: _side(plan, both[plan.path]) for plan in plans}
        sketches = {p: in_link(both[p], plan) for p, plan in used.items()}
        found = digests({p: raw_of(sketch) for p, sketch in sketches.items()})
        seen = {p: np.asarray(probe(sketches[p], plan)) for p, plan in used.items()}
    return {p: Own(plan, sketches[p], found[p], seen[p]) for p, plan in used.items()}


def _side(plan: LeafPlan, drawn: Drawn) -> LeafPlan:
    """The plan of the side that the link uses."""
    if not plan.sides:
        return plan
    left, right = plan.sides
    return left if bool(drawn.is_left) else right


def raw_of(sketch: Drawn) -> Leaf:
    """A sketch as one array."""
    return sketch.index if isinstance(sketch, Picks) else sketch


def probe(sketch: Drawn, plan: LeafPlan) -> Array:
    """Enough of a sketch to know it by: a number of each row, or all its picks."""
    raw: Array = raw_of(sketch)
    if plan.selection is not None:
        return raw
    side = raw.shape[len(plan.batch) + 1 :]
    # Another draw has other sums; those of two programs are the same up to rounding.
    weights = jnp.cos(places_of(side).astype(raw.dtype))
    return jnp.sum(raw * weights, axis=tuple(range(-len(side), 0)))


def everywhere(arrays: PyTree, weight: Leaf) -> Any:
    """Arrays in whole on each device that a weight is on."""
    home = weight.sharding
    if isinstance(home, NamedSharding):
        home = NamedSharding(home.mesh, PartitionSpec())
    return jax.device_put(arrays, home)
