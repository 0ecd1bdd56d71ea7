"""BAdam: Adam on one block of leaves, then on the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._core import checks, paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.types import KeyLike, Leaves, LossFn, PyTree
from raclora_jax.methods._layers import (
    Layer,
    as_leaves,
    as_vector,
    in_layers,
    layer_of,
    size_of,
    wide_dtype,
)
from raclora_jax.methods._method import Method, nbytes, rate_at


class BlockState(NamedTuple):
    """State of BAdam.

    Attributes:
      params: The weights.
      moments: Adam's state for a vector as long as the largest block.
      count: int32 scalar, steps taken.
    """

    params: PyTree
    moments: optax.OptState
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def badam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    steps: int,
    layer: Layer = layer_of,
    key: KeyLike,
) -> Method:
    """BAdam: Adam on one block of leaves for some steps, then on the next.

    All others rest. A block is a layer; a leaf of none is a block of its own. Each pass
    visits all blocks in an order drawn anew, and the moments start again with each. A
    step is one branch of as many as there are blocks, each with the gradient of its own
    block alone: moments and gradients are those of the largest block, and the backward
    pass ends at the first layer that is trained. Under ``jax.vmap`` every branch runs,
    and leaves that stack layers for a scan are one block.

    Args:
      learning_rate: A float or a schedule of the steps.
      steps: How many a block is trained for; 50 to 100 in the paper's runs.
      layer: ``layer(path)``, the name of its layer or ``None``; by default the path
        through its first part that ends in a number.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. Its trained numbers are those of the largest block.

    Raises:
      ValueError: If ``steps`` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> method = badam(1e-3, steps=50, key=0)
      >>> method.trained({"layer_0": jnp.zeros((6, 4)), "layer_1": jnp.zeros((4, 3))})
      24

    References:
      Luo, Yu and Li, `BAdam: A Memory Efficient Full Parameter Optimization Method for
      Large Language Models <https://arxiv.org/abs/2404.02827>`_, 2024.
    """
    checks.count("steps", steps)
    data, adam = key_data(key), optax.scale_by_adam()

    def blocks(leaves: Leaves) -> list[list[str]]:
        layers, rest = in_layers(leaves, layer)
        return [*layers.values(), *([path] for path in rest)]

    def longest(leaves: Leaves) -> int:
        return max(size_of(leaves, block) for block in blocks(leaves))

    def fresh(leaves: Leaves) -> optax.OptState:
        return adam.init(jnp.zeros(longest(leaves), wide_dtype(leaves)))

    def init(params: PyTree) -> BlockState:
        params = jax.tree.map(jnp.asarray, params)
        leaves, _ = paths.flatten(params)
        return BlockState(params, fresh(leaves), jnp.zeros((), jnp.int32))

    def step(state: BlockState, loss_fn: LossFn, *args: Any) -> tuple[BlockState, Array]:
        leaves, treedef = paths.flatten(state.params)
        turn, every = state.count // steps, blocks(leaves)
        own = jax.random.fold_in(leaf_key(data, "blocks", ""), turn // len(every))
        order = jax.random.permutation(own, len(every))
        begins = state.count % steps == 0
        moments = jax.tree.map(
            lambda new, old: jnp.where(begins, new, old), fresh(leaves), state.moments
        )
        rate = rate_at(learning_rate, state.count)

        def train(block: list[str]) -> Any:
            def loss(own: Leaves) -> Array:
                return loss_fn(paths.unflatten(treedef, leaves | own), *args)

            own = {path: leaves[path] for path in block}
            value, grads = jax.value_and_grad(loss)(own)
            vector = as_vector(grads, block, longest(leaves))
            direction, after = adam.update(vector, moments)
            updates = as_leaves(-rate * direction, own, block)
            return leaves | optax.apply_updates(own, updates), after, value

        # One branch a block: what a branch does not train, it does not differentiate.
        branches = [lambda block=block: train(block) for block in every]
        leaves, moments, value = lax.switch(order[turn % len(every)], branches)
        count = optax.safe_increment(state.count)
        return BlockState(paths.unflatten(treedef, leaves), moments, count), value

    return Method(
        init,
        step,
        lambda state: state.params,
        lambda params: longest(paths.flatten(params)[0]),
        lambda params: nbytes(jax.eval_shape(init, params).moments),
    )
