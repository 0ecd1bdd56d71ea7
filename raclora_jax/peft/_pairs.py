"""A change of the weights as pairs of factors: of a link, of several, merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core import paths, rounding
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.lowrank import formed
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sides import in_link
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax._forms.adapter import AdapterChain, matched, sketches_of


class Pair(NamedTuple):
    """The change of one leaf, ``sum over rank of down x up``, laid out as the leaf.

    Attributes:
      down: Array ``(batch..., rank, *axes of the rows)``, the input's side.
      up: Array ``(batch..., rank, *axes of the columns)``, the output's.
      batch: How many batch axes there are.
    """

    down: Array
    up: Array
    batch: int = 0

    @property
    def rank(self) -> int:
        """How many outer products it sums."""
        return int(self.down.shape[self.batch])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A change of the weights.

    Args:
      pairs: ``{path: Pair}`` of the leaves changed in low rank.
      dense: ``{path: change}`` of the leaves changed in full, in their own shape.
    """

    pairs: Mapping[str, Pair]
    dense: Mapping[str, Array] = dataclasses.field(default_factory=dict)


def of_link(
    base_params: PyTree, factors: PyTree, chain: AdapterChain, spec: Spec | int
) -> Adapter:
    """What the running link of a chain adds to its base, exactly.

    ``scaling * S F`` as a pair: the sketch at its own side, the factor at the other.

    Args:
      base_params: The weights of the link.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run.

    Returns:
      The ``Adapter``.

    Raises:
      ValueError: If factors, chain and base do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> import raclora_jax as rl
      >>> W = {"kernel": jnp.ones((6, 4))}
      >>> factors, chain = rl.init_adapter(W, 2, key=0)
      >>> of_link(W, factors, chain, 2).pairs["kernel"].down.shape
      (2, 6)
    """
    _, _, plans, values = matched(base_params, factors, chain, as_spec(spec))
    sketches = sketches_of(chain, plans)
    pairs, dense = {}, {}
    for path, plan in plans.items():
        if plan.mode == "dense":
            dense[path] = values[path]
        if plan.adapted:
            one = _side_in_use(plan, sketches[path])
            sketch = formed(in_link(sketches[path], one), one)
            # Scaling goes into the factor, since a Pair has none.
            factor = one.scaling * in_link(values[path], one)
            sides = (sketch, factor) if one.side == "left" else (factor, sketch)
            pairs[path] = Pair(*sides, len(one.batch))
    return Adapter(pairs, dense)


def _side_in_use(plan: LeafPlan, sketch: Any) -> LeafPlan:
    if not plan.sides:
        return plan
    return plan.sides[0] if bool(sketch.is_left) else plan.sides[1]


def summed(adapters: Iterable[Adapter]) -> Adapter:
    """The sum of changes, exactly: ranks add up.

    A chain of links of one rank gives rank x links: exact, and for a few links small.

    Args:
      adapters: Of one model, such as ``of_link`` of every link of a chain.

    Returns:
      The ``Adapter``.

    Raises:
      ValueError: If there is none, or they change different leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> one = Adapter({"kernel": Pair(jnp.ones((2, 6)), jnp.ones((2, 4)))})
      >>> summed([one, one, one]).pairs["kernel"].rank
      6
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("no adapters to add up; hand over one at least")
    first = adapters[0]
    for other in adapters[1:]:
        differing = (set(first.pairs) ^ set(other.pairs)) | (
            set(first.dense) ^ set(other.dense)
        )
        if differing:
            raise ValueError(
                f"leaf {paths.show(min(differing))} is changed by some of the adapters "
                "only, or in full by some; add up adapters of one spec"
            )

    def joined(path: str) -> Pair:
        pairs = [adapter.pairs[path] for adapter in adapters]
        axis = pairs[0].batch
        down, up = (
            jnp.concatenate([pair[side] for pair in pairs], axis) for side in (0, 1)
        )
        return Pair(down, up, axis)

    return Adapter(
        {path: joined(path) for path in first.pairs},
        {
            path: jnp.sum(jnp.stack([each.dense[path] for each in adapters]), axis=0)
            for path in first.dense
        },
    )


def merged(params: PyTree, adapter: Adapter, spec: Spec | int, *, key: KeyLike) -> PyTree:
    """The weights with an adapter added, rounded once into their dtype.

    A chain goes on from there: ``init_adapter`` on what this returns.

    Args:
      params: The weights.
      adapter: What to add.
      spec: Says the views of the leaves, and by ``rounding`` how a sum below float32 is
        rounded.
      key: Of stochastic rounding.

    Returns:
      New weights, dtypes kept.

    Raises:
      ValueError: If the adapter changes what is no leaf, a leaf twice, or by another
        shape.

    Example:
      >>> import jax.numpy as jnp
      >>> change = Adapter({"kernel": Pair(jnp.ones((2, 6)), jnp.ones((2, 4)))})
      >>> float(merged({"kernel": jnp.ones((6, 4))}, change, 2, key=0)["kernel"][0, 0])
      3.0
    """
    spec = as_spec(spec)
    leaves, treedef = paths.flatten(params)
    plans = plan_tree(spec, params)
    for path in (*adapter.pairs, *adapter.dense):
        if path not in leaves:
            raise ValueError(f"the adapter changes {paths.show(path)}, which is no leaf")
        if path in adapter.pairs and path in adapter.dense:
            raise ValueError(
                f"the adapter changes {paths.show(path)} by a pair and in full; keep one"
            )
    data = key_data(key)

    def one(path: str, weight: Any) -> Any:
        plan = plans[path]
        if path in adapter.pairs:
            change = delta(adapter.pairs[path], plan)
        elif path in adapter.dense:
            change = jnp.asarray(adapter.dense[path], plan.wide_dtype)
        else:
            return weight
        if change.shape != plan.shape:
            raise ValueError(
                f"leaf {paths.show(path)} of shape {plan.shape}: the adapter's change "
                f"has the shape {change.shape}"
            )
        exact = jnp.asarray(weight, plan.wide_dtype) + change
        how = leaf_key(data, "merge", path)
        return rounding.settle(exact, plan.dtype, spec.rounding, how).astype(plan.dtype)

    return paths.unflatten(treedef, {p: one(p, w) for p, w in leaves.items()})


def delta(pair: Pair, plan: LeafPlan) -> Array:
    """The change that a pair stands for, in at least float32."""
    _check_pair(pair, plan)
    down, up = (
        jnp.asarray(side, plan.wide_dtype).reshape(*plan.batch_shape, pair.rank, -1)
        for side in (pair.down, pair.up)
    )
    # down (batch..., rank, in), up (batch..., rank, out).
    product = jnp.matmul(down.mT, up, precision=jax.lax.Precision.HIGHEST)
    order = (*plan.batch, *plan.rows, *plan.cols)
    apart = product.reshape([plan.shape[axis] for axis in order])
    return jnp.transpose(apart, [order.index(axis) for axis in range(len(order))])


def _check_pair(pair: Pair, plan: LeafPlan) -> None:
    stack = len(plan.batch)
    if not plan.rows:
        raise ValueError(
            f"leaf {paths.show(plan.path)} of shape {plan.shape} is {plan.mode} in this "
            "spec, so that nothing says which of its axes are rows; adapt it"
        )
    for name, axes in (("down", plan.rows), ("up", plan.cols)):
        side = getattr(pair, name)
        sizes = tuple(plan.shape[axis] for axis in axes)
        if side.shape[:stack] != plan.batch_shape or side.shape[stack + 1 :] != sizes:
            raise ValueError(
                f"leaf {paths.show(plan.path)} of shape {plan.shape}: {name} must be "
                f"{(*plan.batch_shape, 'rank', *sizes)}, got {side.shape}"
            )
