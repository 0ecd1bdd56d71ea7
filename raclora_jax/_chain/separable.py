"""Rules that act on each matrix by itself, and their states leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.tree_util import DictKey

from raclora_jax._chain.inner import as_rule, same_type
from raclora_jax._core.types import Leaf, OptState


class PerMatrix(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # optax is untyped
    """A rule that acts on each matrix by itself, as ``per_matrix`` says of one."""


def per_matrix(rule: optax.GradientTransformation) -> PerMatrix:
    """Says of an inner rule that it acts on each matrix by itself.

    A fused step updates one matrix at a time, so it takes a rule for which the update of
    a matrix depends on that matrix's gradient and state alone, also where several are
    stacked. What works number by number, such as ``optax.scale_by_adam()``, is seen to be
    of that kind, and ``raclora_jax.orthogonal`` says so itself. Of any other rule its
    author has to. A state may hold numbers common to all, such as a count, if they do not
    depend on gradients; all else it keeps for each matrix.

    Args:
      rule: An optax transformation, to be passed as ``inner``.

    Returns:
      The same rule, which a fused step takes.

    Raises:
      TypeError: If it is no optax transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax, raclora_jax as rl
      >>> def unit(updates, state, params=None):
      ...     def one(factor):
      ...         size = jnp.linalg.norm(factor, axis=(-2, -1), keepdims=True)
      ...         return factor / jnp.maximum(size, 1e-12)
      ...     return jax.tree.map(one, updates), state
      >>> rule = per_matrix(optax.GradientTransformation(lambda p: (), unit))
      >>> tx = rl.raclora(0.1, 2, inner=rule, key=0)
    """
    if not hasattr(rule, "init") or not hasattr(rule, "update"):
        raise TypeError(
            f"per_matrix takes an optax transformation, got {type(rule).__name__}"
        )
    return PerMatrix(rule.init, as_rule(rule).update)


def is_common(keypath: tuple[Any, ...], name: str) -> bool:
    """Whether a place in the state of one leaf holds what all leaves have in common."""
    return DictKey(name) not in keypath


def parts_of(whole: OptState, template: OptState) -> OptState:
    """The part of an inner state that has another one's leaves.

    Args:
      whole: State of a rule for many leaves.
      template: State of the same rule for some of them, shapes are enough.

    Returns:
      A tree like ``template``.
    """
    held = dict(jax.tree_util.tree_leaves_with_path(whole))
    return jax.tree_util.tree_map_with_path(lambda keypath, _: held[keypath], template)


def joined_parts(whole: OptState, parts: Iterable[OptState]) -> OptState:
    """An inner state with what its parts hold in the places they came from."""
    new: dict[tuple[Any, ...], Leaf] = {}
    for part in parts:
        new |= dict(jax.tree_util.tree_leaves_with_path(part))
    return jax.tree_util.tree_map_with_path(
        lambda keypath, old: same_type(new[keypath], old) if keypath in new else old,
        whole,
    )
