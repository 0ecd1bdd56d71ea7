"""A base in codes from its making to its export, link by link."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix
from jax import Array

from raclora_jax._core import checks, paths
from raclora_jax._core.keys import leaf_key
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_leaves
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaf, PyTree
from raclora_jax._forms.adapter import (
    AdapterChain,
    begun,
    is_quantised,
    settled,
    summed,
)
from raclora_jax.quantized._codes import (
    check_quantisable,
    empty,
    matched,
    none,
    requantised,
    wide,
)

QTYPES = ("int8", "int4", "nf4")


class Held(NamedTuple):
    """Bytes on the devices, as their buffers are laid out.

    Attributes:
      base: Of the codes, the scales and the leaves that are not quantised.
      error: Of the carried rounding errors.
      factors: Of the trained tree.
    """

    base: int
    error: int
    factors: int


def quantize(
    params: PyTree, spec: Spec | int, qtype: str, *, block: int | None = None
) -> tuple[Any, Any]:
    """Quantises every adapted leaf; its rounding error is carried from the start.

    ``W = scale * code + e``: one scale for each column of a leaf, as the model reads it,
    or for each ``block`` rows of a column. Embedding and head are adapted leaves too,
    unless a rule of the spec says otherwise.

    Args:
      params: The weights.
      spec: A ``Spec`` or a rank; leaves it trains in full or freezes stay as they are.
      qtype: ``"int8"``, ``"int4"`` or ``"nf4"``.
      block: Rows that share a scale, along the last axis of the rows; all if not given.

    Returns:
      ``(base_params, error)``: the tree with a ``qwix.QArray`` in place of each adapted
      leaf, and the tree of errors, an int8 ``QArray`` where a leaf is quantised and
      ``optax.MaskedNode()`` elsewhere.

    Raises:
      ValueError: If the type is unknown, a block does not divide a leaf, a leaf is
        quantised or holds a number that is not finite, or no leaf is adapted.

    Example:
      >>> import jax, raclora_jax as rl
      >>> from raclora_jax import quantized
      >>> W = {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}
      >>> base_params, error = quantized.quantize(W, 2, "nf4", block=3)
      >>> base_params["kernel"].qtype, base_params["kernel"].scale.shape
      ('nf4', (2, 4))
      >>> exact = quantized.exact_params(base_params, error)["kernel"]
      >>> bool(abs(exact - W["kernel"]).max() < 0.01)
      True
    """
    checks.choice("qtype", qtype, QTYPES)
    if block is not None:
        checks.count("block", block)
    leaves, treedef = paths.flatten(params, is_leaf=is_quantised)
    plans = plan_leaves(as_spec(spec), leaves, whole=True)
    adapted = {path: plan for path, plan in plans.items() if plan.adapted}
    if not adapted:
        raise ValueError("no leaf is adapted by this spec, so there is none to quantise")
    for path, plan in adapted.items():
        check_quantisable(leaves[path], plan, block)
    base, errors = dict(leaves), none(leaves)
    for path, plan in adapted.items():
        exact = jnp.asarray(leaves[path], plan.wide_dtype)
        like = empty(plan, qtype, block)
        # The nearest code of the error: nothing is added up yet, so no bias is.
        base[path], errors[path] = requantised(exact, like, None)
    return paths.unflatten(treedef, base), paths.unflatten(treedef, errors)


def zero_error(base_params: PyTree, spec: Spec | int) -> Any:
    """The errors of a base that came quantised, so that nothing is known of them.

    Args:
      base_params: Weights with ``qwix.QArray`` leaves, which may be asymmetric.
      spec: The spec of the run.

    Returns:
      The tree of errors as of ``quantize``; frozen leaves have none.

    Example:
      >>> import jax.numpy as jnp, qwix
      >>> from raclora_jax import quantized
      >>> base_params = {"kernel": qwix.quantize(jnp.ones((6, 4)), "int8")}
      >>> quantized.zero_error(base_params, 2)["kernel"].qvalue.dtype
      dtype('int8')
    """
    leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
    plans = plan_leaves(as_spec(spec), leaves, whole=True)
    errors = none(leaves)
    for path, leaf in leaves.items():
        if is_quantised(leaf) and plans[path].mode != "frozen":
            codes = jnp.zeros_like(leaf.qvalue, jnp.int8)
            scale = jnp.ones_like(leaf.scale, plans[path].wide_dtype)
            errors[path] = qwix.QArray(codes, scale)
    return paths.unflatten(treedef, errors)


def merge(
    base_params: PyTree,
    error: PyTree,
    factors: PyTree,
    chain: AdapterChain,
    spec: Spec | int,
) -> tuple[Any, Any]:
    """Merges the factors, quantises anew and carries what the codes cannot hold.

    A leaf is quantised as it was: its type, blocks, symmetry and dtype of the scales.
    Other leaves are merged as by ``raclora_jax.merge``.

    Args:
      base_params: The weights of the link, quantised or not.
      error: The errors of the last merge.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run.

    Returns:
      ``(base_params, error)``.

    Raises:
      ValueError: If base, error, factors and chain do not belong together.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from raclora_jax import quantized
      >>> W = {"kernel": jnp.ones((6, 4))}
      >>> base_params, error = quantized.quantize(W, 2, "int8")
      >>> factors, chain = rl.init_adapter(base_params, 2, key=0)
      >>> factors = {"kernel": factors["kernel"] + 1e-3}
      >>> base_params, error = quantized.merge(base_params, error, factors, chain, 2)
    """
    spec = as_spec(spec)
    leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
    plans = plan_leaves(spec, leaves)
    errors = matched(error, leaves, plans)
    new_errors = none(leaves)

    def finish(plan: LeafPlan, exact: Array) -> Leaf:
        old = leaves[plan.path]
        if not is_quantised(old):
            return settled(plan, exact, chain, spec)
        key = leaf_key(chain.key_data, "quantised error", plan.path)
        # By link: the same draws in every merge would add up to a bias.
        key = jax.random.fold_in(key, chain.link)
        exact += qwix.dequantize(errors[plan.path])
        new, new_errors[plan.path] = requantised(exact, old, key)
        return new

    merged = summed(base_params, factors, chain, spec, finish, wide)
    return merged, paths.unflatten(treedef, new_errors)


# One program for all who end links on one device, see ``_forms.link_end``.
compiled_merge = jax.jit(merge, static_argnames="spec")


def next_link(
    base_params: PyTree,
    error: PyTree,
    factors: PyTree,
    chain: AdapterChain,
    spec: Spec | int,
) -> tuple[Any, Any, Any, AdapterChain]:
    """Merges with ``merge``, draws the next sketches, puts the factors back to zero.

    Args:
      base_params: The weights of the link that ends, quantised or not.
      error: The errors of the last merge.
      factors: The trained tree.
      chain: Where the chain stands.
      spec: The spec of the run.

    Returns:
      ``(base_params, error, factors, chain)`` of the next link.

    Raises:
      ValueError: If base, error, factors and chain do not belong together.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from raclora_jax import quantized
      >>> W = {"kernel": jnp.ones((6, 4))}
      >>> base_params, error = quantized.quantize(W, 2, "int8")
      >>> factors, chain = rl.init_adapter(base_params, 2, key=0)
      >>> run = quantized.next_link(base_params, error, factors, chain, 2)
      >>> base_params, error, factors, chain = run
      >>> int(chain.link)
      1
    """
    spec = as_spec(spec)
    merged, carried = merge(base_params, error, factors, chain, spec)
    leaves, _ = paths.flatten(base_params, is_leaf=is_quantised)
    return merged, carried, *begun(plan_leaves(spec, leaves), factors, chain, spec)


def exact_params(base_params: PyTree, error: PyTree) -> Any:
    """``W + e``: what the run has learnt up to its last merge, unquantised.

    What to export where the target holds full precision. What a step sees, and what is
    to be exported in the codes, is ``base_params``.

    Args:
      base_params: The weights, quantised or not.
      error: The errors of the last merge.

    Returns:
      The tree with arrays of at least float32 in place of quantised leaves.

    Raises:
      ValueError: If an error has not the shape of its leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import quantized
      >>> W = {"kernel": jnp.ones((6, 4))}
      >>> base_params, error = quantized.quantize(W, 2, "int8")
      >>> float(quantized.exact_params(base_params, error)["kernel"].sum())
      24.0
    """
    leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
    errors = matched(error, leaves, None)

    def one(path: str, leaf: Leaf) -> Leaf:
        if not is_quantised(leaf):
            return leaf
        read = wide(leaf)
        return read + qwix.dequantize(errors[path]) if path in errors else read

    return paths.unflatten(treedef, {p: one(p, leaf) for p, leaf in leaves.items()})


def held(base_params: PyTree, error: PyTree, factors: PyTree) -> Held:
    """Bytes that a run holds, asked of the buffers and not worked out from the types.

    A code of 4 bits takes a whole byte where a device does not pack them, as CPUs do
    not.

    Args:
      base_params: The weights.
      error: The errors.
      factors: The trained tree.

    Returns:
      Three sums over the arrays.

    Raises:
      TypeError: If a leaf is traced, abstract or no array.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from raclora_jax import quantized
      >>> base_params, error = quantized.quantize({"kernel": jnp.ones((6, 4))}, 2, "int8")
      >>> factors, chain = rl.init_adapter(base_params, 2, key=0)
      >>> quantized.held(base_params, error, factors)
      Held(base=40, error=40, factors=48)
    """

    def size(path: str, leaf: Leaf) -> int:
        try:
            return int(jnp.asarray(leaf).on_device_size_in_bytes())
        except (TypeError, AttributeError) as error:
            raise TypeError(
                f"leaf {paths.show(path)} must be an array on a device, got "
                f"{checks.kind(leaf)}"
            ) from error

    def total(tree: PyTree) -> int:
        leaves, _ = paths.flatten(tree)
        return sum(size(path, leaf) for path, leaf in leaves.items())

    return Held(total(base_params), total(error), total(factors))
