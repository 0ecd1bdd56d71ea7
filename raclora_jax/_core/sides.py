"""Where a leaf's side is drawn: both factors are held, and each link uses one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from raclora_jax._core.picks import Picks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sharding import zeros
from raclora_jax._core.types import Drawn, FactorValue, Leaf

T = TypeVar("T")


class BothFactors(NamedTuple):
    """The factors of both sides of a leaf; of a gradient, the one not in use is zero.

    Attributes:
      left: Array ``(batch..., rank, *axes of the columns)``.
      right: Array ``(batch..., rank, *axes of the rows)``.
    """

    left: Array
    right: Array


class BothSketches(NamedTuple):
    """The sketches of both sides of a leaf, and which of them the link uses.

    Attributes:
      left: The sketch of the rows.
      right: The sketch of the columns.
      is_left: Bool scalar.
    """

    left: Array
    right: Array
    is_left: Array


def is_both(node: Leaf) -> bool:
    """Whether a node holds something of both sides, for ``is_leaf``."""
    return isinstance(node, BothFactors | BothSketches)


def is_drawn(node: Leaf) -> bool:
    """Whether a node is a sketch of several arrays, or of picks, for ``is_leaf``."""
    return isinstance(node, BothSketches | Picks)


def in_use(factors: BothFactors, is_left: Array) -> BothFactors:
    """The factors with zero for the one that the link does not use."""
    left, right = factors
    return BothFactors(jnp.where(is_left, left, 0), jnp.where(is_left, 0, right))


def in_link(value: Any, plan: LeafPlan) -> Array:
    """Of a factor or a sketch what a plan of one side is about."""
    return getattr(value, plan.side) if is_both(value) else value


def named(plan: LeafPlan) -> dict[str, LeafPlan]:
    """``{path: plan}``, or ``{path/left: plan, path/right: plan}`` of its two sides.

    No leaf has such a path: the leaf itself stands where its branch would begin.
    """
    if not plan.sides:
        return {plan.path: plan}
    return {f"{plan.path}/{one.side}".lstrip("/"): one for one in plan.sides}


def apart(plan: LeafPlan, value: Any) -> dict[str, Array]:
    """A factor or a sketch by the names of ``named``."""
    return {name: in_link(value, one) for name, one in named(plan).items()}


def joined(plan: LeafPlan, values: Mapping[str, Array]) -> FactorValue:
    """The factor that ``apart`` took apart, from a dict of many."""
    found = [values[name] for name in named(plan)]
    return BothFactors(*found) if plan.sides else found[0]


def of_factors(plan: LeafPlan, make: Callable[[LeafPlan], Any]) -> Any:
    """``make`` of the leaf's plan, or the pair of what it makes of its two sides."""
    return BothFactors(*map(make, plan.sides)) if plan.sides else make(plan)


def of_sketches(plan: LeafPlan, make: Callable[[LeafPlan], Any], is_left: Any) -> Any:
    """``of_factors`` for sketches, with what stands for ``is_left`` of two."""
    if not plan.sides:
        return make(plan)
    left, right = map(make, plan.sides)
    return BothSketches(left, right, is_left)


def shapes(value: Any) -> Any:
    """The shape of an array or of picks, or the shapes of both."""
    return jax.tree.map(jnp.shape, value, is_leaf=lambda node: isinstance(node, Picks))


def factor_shapes(plan: LeafPlan) -> Any:
    """``shapes`` of the factor of a leaf."""
    return of_factors(plan, lambda one: one.factor_shape)


def sketch_shapes(plan: LeafPlan) -> Any:
    """``shapes`` of the sketch of a leaf."""
    return of_sketches(plan, lambda one: one.sketch_shape, ())


def factor_shardings(plan: LeafPlan) -> Any:
    """The sharding of the factor of a leaf, or of both."""
    return of_factors(plan, lambda one: one.factor_sharding)


def sketch_shardings(plan: LeafPlan) -> Any:
    """The sharding of the sketch of a leaf, or of both."""
    if plan.sharding is None:
        return None
    everywhere = NamedSharding(plan.sharding.mesh, PartitionSpec())
    return of_sketches(plan, lambda one: one.as_sketch(one.sketch_sharding), everywhere)


def zero_trained(plan: LeafPlan) -> FactorValue:
    """What a leaf trains, at zero: the factor, both factors, or a dense difference."""

    def zero(one: LeafPlan) -> Array:
        return zeros(one.trained_shape, one.wide_dtype, one.trained_sharding)

    made: FactorValue = of_factors(plan, zero)
    return made


def zero_sketch(plan: LeafPlan) -> Drawn:
    """A sketch of zeros, before anything is drawn."""

    def zero(one: LeafPlan) -> Drawn:
        array = zeros(one.sketch_shape, one.sketch_dtype, one.sketch_sharding)
        return one.as_sketch(array)

    made: Drawn = of_sketches(plan, zero, jnp.asarray(False))
    return made


def switched(
    plans: Mapping[str, LeafPlan],
    sketches: Mapping[str, Drawn],
    one: Callable[[dict[str, LeafPlan], dict[str, Array]], T],
) -> T:
    """Calls a function of plans and sketches with the sides that the link uses.

    One number is drawn for all leaves of a link, and a leaf is left if it is below the
    leaf's chance. So k different chances have k + 1 cases, in order; the program holds
    each of them and runs one.

    Args:
      plans: ``{path: plan}``.
      sketches: ``{path: sketch}`` as ``draw_all`` gives them.
      one: ``one(plans, sketches)`` of leaves with one side each; gives a tree of arrays.

    Returns:
      What ``one`` gave.
    """
    # One branch for a whole case, not one for each leaf: a conditional that is entered a
    # hundred times keeps the compiler from fusing across it.
    by_chance = {
        plan.chance: path for path, plan in plans.items() if plan.chance is not None
    }
    if not by_chance:
        return one(dict(plans), dict(sketches))
    chances = sorted(by_chance, reverse=True)

    def case(left: list[float]) -> Callable[[], T]:
        def chosen(plan: LeafPlan) -> LeafPlan:
            if not plan.sides:
                return plan
            return plan.sides[0] if plan.chance in left else plan.sides[1]

        own = {path: chosen(plan) for path, plan in plans.items()}
        drawn = {path: in_link(sketch, own[path]) for path, sketch in sketches.items()}
        return lambda: one(own, drawn)

    cases = [case(chances[:count]) for count in range(len(chances) + 1)]
    drawn_left = [sketches[path].is_left for path in by_chance.values()]
    return lax.switch(jnp.sum(jnp.stack(drawn_left)), cases)
