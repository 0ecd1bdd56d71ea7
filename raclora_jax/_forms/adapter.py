"""The adapter form: frozen base, one small trained tree, merged at the end of a link."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from raclora_jax._chain.state import next_of
from raclora_jax._core import paths, rounding
from raclora_jax._core.factor import check_factor
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.merge import merge_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_leaves
from raclora_jax._core.saved import tell_flax
from raclora_jax._core.sides import is_both, shapes, sketch_shapes, zero_trained
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.stamp import Stamp, check_stamp
from raclora_jax._core.types import Drawn, KeyLike, Leaf, Leaves, PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stamps:
    """The plans' stamps of a chain, ``((path, stamp), ...)``: a node without leaves."""

    by_path: tuple[tuple[str, Stamp], ...] = ()

    @classmethod
    def of(cls, plans: dict[str, LeafPlan]) -> Stamps:
        """The stamps of the adapted leaves."""
        tell_flax(cls)
        return cls(tuple((p, plan.stamp) for p, plan in plans.items() if plan.adapted))


class AdapterChain(NamedTuple):
    """Where the chain stands: arrays only.

    Attributes:
      link: int32 scalar, index of the running link.
      key_data: uint32 of shape (2,), all the randomness there is.
      sketches: ``{path: sketch}`` of the running link; empty under
        ``Spec(cache=False)``. Where the side is drawn both sketches, and ``is_left``.
      stamps: Static; the facts of the run, so that no function of another spec goes on
        with the chain. Empty if made by hand.
    """

    link: Array
    key_data: Array
    sketches: dict[str, Drawn]
    stamps: Stamps = Stamps()


def init_adapter(
    base_params: PyTree, spec: Spec | int, *, key: KeyLike
) -> tuple[Any, AdapterChain]:
    """Starts a chain on frozen weights.

    Args:
      base_params: The weights the chain starts from; shapes are enough.
      spec: A ``Spec`` or a rank.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      ``(factors, chain)``. ``factors`` is the small trained tree, all zeros and at
      least float32: ``(batch..., rank, *axes of the other side)`` for an adapted leaf,
      the pair ``left``, ``right`` of such where its side is drawn, a difference of the
      leaf's shape for a dense one, ``optax.MaskedNode()`` for a frozen one.

    Raises:
      ValueError: If the spec does not fit, or asks for ``rounding="master"``.

    Example:
      >>> import jax.numpy as jnp
      >>> factors, chain = init_adapter({"kernel": jnp.ones((6, 4))}, 2, key=0)
      >>> factors["kernel"].shape, chain.sketches["kernel"].shape
      ((2, 6), (2, 4))

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Algorithm 1.
    """
    spec = as_spec(spec)
    leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
    plans = plan_leaves(spec, leaves, whole=True)
    _check_rounding(spec, plans)
    link, data = jnp.zeros((), jnp.int32), key_data(key)
    sketches = _cached(spec, data, link, plans)
    chain = AdapterChain(link, data, sketches, Stamps.of(plans))
    return paths.unflatten(treedef, _zeros(plans)), chain


def effective_params(
    base_params: PyTree,
    factors: PyTree,
    chain: AdapterChain,
    spec: Spec | int,
    *,
    dequantize: Callable[[Any], Array] | None = None,
) -> PyTree:
    """The exact sum ``W + lift(F)`` in the wider dtype.

    Args:
      base_params: The weights of the link, held fixed.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run.
      dequantize: Reads a quantised leaf as an array, such as ``qwix.dequantize``.

    Returns:
      The tree of ``base_params`` in at least float32; frozen leaves as they are, but
      for quantised ones, which are read.

    Raises:
      ValueError: If factors, chain and base do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> W = {"kernel": jnp.ones((6, 4), jnp.bfloat16)}
      >>> factors, chain = init_adapter(W, 2, key=0)
      >>> effective_params(W, factors, chain, 2)["kernel"].dtype
      dtype('float32')
    """
    total = summed(
        base_params, factors, chain, as_spec(spec), lambda _, exact: exact, dequantize
    )
    if dequantize is None:
        return total
    return jax.tree.map(
        lambda leaf: dequantize(leaf) if is_quantised(leaf) else leaf,
        total,
        is_leaf=is_quantised,
    )


def merge(
    base_params: PyTree, factors: PyTree, chain: AdapterChain, spec: Spec | int
) -> PyTree:
    """``effective_params`` rounded once into the dtype of the weights.

    Args:
      base_params: The weights of the link, held fixed.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run; ``spec.rounding`` says how.

    Returns:
      New weights, dtypes of ``base_params`` kept.

    Raises:
      ValueError: If factors, chain and base do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> W = {"kernel": jnp.ones((6, 4), jnp.bfloat16)}
      >>> factors, chain = init_adapter(W, 2, key=0)
      >>> bool((merge(W, factors, chain, 2)["kernel"] == 1).all())
      True
    """
    spec = as_spec(spec)
    return _merged(matched(base_params, factors, chain, spec), chain, spec)


def next_link(
    base_params: PyTree, factors: PyTree, chain: AdapterChain, spec: Spec | int
) -> tuple[Any, Any, AdapterChain]:
    """Merges, draws the next sketches and puts the factors back to zero.

    Args:
      base_params: The weights of the link that ends.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run.

    Returns:
      ``(base_params, factors, chain)`` of the next link.

    Raises:
      ValueError: If factors, chain and base do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> W = {"kernel": jnp.ones((6, 4))}
      >>> factors, chain = init_adapter(W, 2, key=0)
      >>> W, factors, chain = next_link(W, factors, chain, 2)
      >>> int(chain.link)
      1
    """
    spec = as_spec(spec)
    found = matched(base_params, factors, chain, spec)
    merged = _merged(found, chain, spec)
    return merged, *begun(found.plans, factors, chain, spec)


def _merged(found: Matched, chain: AdapterChain, spec: Spec) -> PyTree:
    sketches = sketches_of(chain, found.plans)
    _check_sums(found)
    still = np.zeros(())

    def one(path: str, weight: Leaf) -> Leaf:
        plan = found.plans[path]
        if plan.mode == "frozen":
            return weight
        if plan.adapted:
            key = _merge_key(plan, chain) if rounding.is_low(plan.dtype) else None
            whole = found.values[path], sketches[path], still, plan
            return merge_leaf(jnp.asarray(weight), *whole, spec.rounding, key)
        exact = jnp.asarray(weight, plan.wide_dtype) + found.values[path]
        return settled(plan, exact, chain, spec)

    return paths.unflatten(found.treedef, {p: one(p, w) for p, w in found.leaves.items()})


def begun(
    plans: dict[str, LeafPlan], factors: PyTree, chain: AdapterChain, spec: Spec
) -> tuple[Any, AdapterChain]:
    """Factors at zero, and the chain at its next link."""
    link = next_of(chain.link)
    sketches = _cached(spec, chain.key_data, link, plans)
    zeros = jax.tree.map(jnp.zeros_like, factors)
    return zeros, chain._replace(link=link, sketches=sketches)


def settled(plan: LeafPlan, exact: Array, chain: AdapterChain, spec: Spec) -> Array:
    """A sum brought to the dtype of its weight, as the spec says."""
    key = _merge_key(plan, chain)
    return rounding.settle(exact, plan.dtype, spec.rounding, key).astype(plan.dtype)


def _merge_key(plan: LeafPlan, chain: AdapterChain) -> Array:
    """The key by which a weight is rounded at the end of a link."""
    key = leaf_key(chain.key_data, "merge", plan.path)
    return jax.random.fold_in(key, chain.link)


def is_quantised(node: Leaf) -> bool:
    """Whether a node is a quantised array, one leaf made of several (``qwix.QArray``)."""
    return hasattr(node, "qvalue") and hasattr(node, "shape")


def summed(
    base_params: PyTree,
    factors: PyTree,
    chain: AdapterChain,
    spec: Spec,
    finish: Callable[[LeafPlan, Array], Array],
    dequantize: Callable[[Any], Array] | None = None,
) -> PyTree:
    """``finish(plan, W + lift(F))`` for every trained leaf; frozen ones as they are."""
    found = matched(base_params, factors, chain, spec)
    leaves, treedef, plans, values = found
    sketches = sketches_of(chain, plans)
    if dequantize is None:
        _check_sums(found)

    def one(path: str, weight: Leaf) -> Leaf:
        plan = plans[path]
        if plan.mode == "frozen":
            return weight
        if dequantize is not None and is_quantised(weight):
            weight = dequantize(weight)
        delta = values[path]
        if plan.adapted:
            delta = lift_leaf(delta, sketches[path], plan)
        return finish(plan, jnp.asarray(weight, plan.wide_dtype) + delta)

    return paths.unflatten(treedef, {p: one(p, w) for p, w in leaves.items()})


def _check_sums(found: Matched) -> None:
    """Refuses quantised leaves, to which nothing can be added as they are."""
    way_out = (
        "merge with raclora_jax.quantized, which carries the rounding error, or sum "
        "in full precision with effective_params(..., dequantize=...)"
    )
    refuse_quantised(found.leaves, found.plans, "merged into", way_out)


class Matched(NamedTuple):
    """Weights and the factors that belong to them.

    Attributes:
      leaves: ``{path: weight}``.
      treedef: How they are a tree again.
      plans: ``{path: plan}``.
      values: ``{path: factor}``, and the trained differences of dense leaves.
    """

    leaves: Leaves
    treedef: Any
    plans: dict[str, LeafPlan]
    values: Leaves


def matched(
    base_params: PyTree, factors: PyTree, chain: AdapterChain, spec: Spec
) -> Matched:
    """Base leaves and the factors that belong to them, checked."""
    leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
    values, _ = paths.flatten(factors, is_leaf=is_both)
    plans = plan_leaves(spec, leaves)
    _check_rounding(spec, plans)
    for path, stamp in chain.stamps.by_path:
        if path in plans and plans[path].adapted:
            check_stamp(path, stamp, plans[path].stamp, "this chain")
    _check_factors(values, plans)
    return Matched(leaves, treedef, plans, values)


def refuse_quantised(
    leaves: Leaves, plans: dict[str, LeafPlan], verb: str, way_out: str
) -> None:
    """Refuses quantised leaves where nothing says how to read them."""
    for path, leaf in leaves.items():
        if is_quantised(leaf) and (verb == "read" or plans[path].mode != "frozen"):
            raise ValueError(
                f"leaf {paths.show(path)} is quantised ({leaf.dtype} of shape "
                f"{leaf.shape}) and cannot be {verb}; {way_out}"
            )


def sketches_of(chain: AdapterChain, plans: dict[str, LeafPlan]) -> dict[str, Drawn]:
    """The sketches of the running link: the cached ones, or the same drawn again."""
    kept = {path: sketch for path, sketch in chain.sketches.items() if path in plans}
    for path, sketch in kept.items():
        expected = sketch_shapes(plans[path])
        if shapes(sketch) != expected:
            raise ValueError(
                f"leaf {paths.show(path)}: expected a sketch of shape {expected}, got "
                f"{shapes(sketch)}; use the spec the chain was made with"
            )
    missing = [plan for path, plan in plans.items() if path not in kept]
    return kept | draw_all(chain.key_data, chain.link, missing)


def _check_factors(values: Leaves, plans: dict[str, LeafPlan]) -> None:
    """Refuses factors that were made for other weights or another spec."""
    trained = {path: plan for path, plan in plans.items() if plan.mode != "frozen"}
    for path, plan in trained.items():
        if path not in values:
            raise ValueError(
                f"leaf {paths.show(path)} is {plan.mode} in this spec but has no entry "
                "in factors; make them with init_adapter and the same spec"
            )
        if plan.mode == "lowrank":
            check_factor(values[path], plan)
        elif jnp.shape(values[path]) != plan.shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected a difference of shape {plan.shape}, "
                f"got {jnp.shape(values[path])}; make factors with init_adapter and the "
                "same spec"
            )
    for path in values:
        if path not in trained:
            why = "frozen in this spec" if path in plans else "no leaf of base_params"
            raise ValueError(
                f"factor {paths.show(path)} is {why}; make factors with init_adapter "
                "and the same spec"
            )


def _zeros(plans: dict[str, LeafPlan]) -> dict[str, Any]:
    return {
        path: optax.MaskedNode() if plan.mode == "frozen" else zero_trained(plan)
        for path, plan in plans.items()
    }


def _cached(
    spec: Spec, data: Array, link: Array, plans: dict[str, LeafPlan]
) -> dict[str, Drawn]:
    return draw_all(data, link, plans.values()) if spec.cache else {}


def _check_rounding(spec: Spec, plans: dict[str, LeafPlan]) -> None:
    low = [p for p, plan in plans.items() if rounding.is_low(plan.dtype)]
    if spec.rounding == "master" and low:
        raise ValueError(
            f"leaf {paths.show(low[0])}: rounding='master' keeps a float32 copy in the "
            "optimizer state, which the adapter form has not; use "
            "rounding='stochastic', or base_params in float32"
        )
