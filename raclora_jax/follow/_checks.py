"""What cannot be made a message of, by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.rounding import is_low
from raclora_jax._core.types import PyTree
from raclora_jax.follow._position import Position, words_of


def check_outside(tree: PyTree) -> None:
    """Refuses traced numbers, of which no message can be made."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "a message is made of numbers, got traced ones; encode outside of jit what "
            "the compiled step returned"
        )


def check_key(data: Array, position: Position, what: str) -> None:
    """Refuses a state or chain whose sketches are not those of the run."""
    words = words_of(data)
    if words != position.run[16:]:
        raise ValueError(
            f"{what} has another key than the run: expected {position.run[16:]}, got "
            f"{words}; hand start the key that it was made with"
        )


def check_leaf(plan: LeafPlan) -> None:
    """Refuses an adapted leaf whose step is not one of float32 sums alone."""
    where = f"leaf {paths.show(plan.path)}"
    if plan.wide_dtype != jnp.float32:
        raise ValueError(
            f"{where}: expected a weight of at most 32 bits, got {plan.dtype}; sums of "
            "64 bits are not the same in every program: train it in float32"
        )
    if plan.rounding == "master" and is_low(plan.dtype):
        raise ValueError(
            f"{where}: expected rounding='auto', 'stochastic' or 'nearest', got "
            "'master'; a follower has no float32 copy of the weight: take 'auto'"
        )


def check_picks(plan: LeafPlan, decays: bool) -> None:
    """Refuses an adapted leaf that a fused step moves in more rows than it picks."""
    where = f"leaf {paths.show(plan.path)}"
    one = plan.each[0]
    if one.selection is None:
        raise ValueError(
            f"{where}: expected a law that picks rows, got {one.law!r}, by which "
            "all rows move and a fused step keeps no factor; take sketch='block', or "
            "rl.value_and_grad, tx.update and encode"
        )
    if decays:
        raise ValueError(
            f"{where}: expected no weight decay, which moves rows that are not sent; "
            "leave the leaf out by mask=, or take rl.value_and_grad, tx.update and encode"
        )
