"""LoRA beside the weights of a Tunix decoder, by qwix."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import raclora_jax as rl
from finetuning import families
from finetuning.decoder import Decoder
from finetuning.training import Trainer
from raclora_jax import flax as rl_flax

LossOf = Callable[[Decoder], Callable[..., jax.Array]]


def trainer(
    decoder: Decoder, spec: rl.Spec, rate: optax.Schedule, loss_of: LossOf, seed: int
) -> Trainer:
    """Adam on qwix's pairs for the leaves that a spec adapts.

    Raises:
      ValueError: If the spec asks for what qwix's LoRA has not, or adapts a leaf for
        which qwix makes no pair: it reads products of a module's own parameter.
    """
    ranks = {
        row.path: row.rank
        for row in rl.summary(decoder.params, spec).rows
        if row.mode == "lowrank"
    }
    if spec.alpha == "dim" or any(rule.alpha is not None for rule in spec.rules):
        raise ValueError("--method lora takes a spec with one alpha, a number")
    scaling = {
        path: 1.0 if spec.alpha is None else spec.alpha / rank
        for path, rank in ranks.items()
    }
    tree, restore = _with_pairs(decoder, ranks, scaling, seed)
    pairs = {path: leaf for path, leaf in tree.items() if "_lora_" in path}
    for path in ranks:
        if f"{path}_lora_a" not in pairs:
            raise ValueError(
                f"qwix makes no LoRA for {path}, which is no parameter of a product of "
                "its module; freeze it in a --spec, or choose another --method"
            )
    loss_fn = loss_of(decoder._replace(restore=restore))
    tx = optax.adam(rate)

    def init(params: Any) -> Any:
        return params, pairs, tx.init(pairs)

    def step(state: Any, *batch: Any) -> tuple[Any, jax.Array]:
        params, pairs, opt_state = state

        def loss(pairs: Any) -> jax.Array:
            whole = flatten_dict(params, sep="/") | pairs
            return loss_fn(unflatten_dict(whole, sep="/"), *batch)

        value, grads = jax.value_and_grad(loss)(pairs)
        updates, opt_state = tx.update(grads, opt_state)
        return (params, optax.apply_updates(pairs, updates), opt_state), value

    def merged(state: Any) -> Any:
        params, pairs, _ = state
        leaves = flatten_dict(params, sep="/")
        for path, factor in scaling.items():
            left, right = pairs[f"{path}_lora_a"], pairs[f"{path}_lora_b"]
            change = factor * _product(left, right, families.rows_of(path))
            leaves[path] = (leaves[path] + change).astype(leaves[path].dtype)
        return unflatten_dict(leaves, sep="/")

    def size(params: Any) -> int:
        state = jax.eval_shape(tx.init, pairs)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    return Trainer(init, step, merged, size)


def _with_pairs(
    decoder: Decoder, ranks: dict[str, int], scaling: dict[str, float], seed: int
) -> tuple[dict[str, Any], Any]:
    """Leaves of the model with qwix's pairs, and the way back to the module."""
    rules = [
        qwix.LoraRule(
            module_path=re.escape(path.rpartition("/")[0]),
            rank=rank,
            alpha=rank * scaling[path],
        )
        for path, rank in ranks.items()
    ]
    ids = jnp.zeros((1, 2), jnp.int32)
    module = qwix.apply_lora_to_model(
        decoder.restore(decoder.params),
        qwix.LoraProvider(rules),
        ids,
        jnp.arange(2)[None],
        None,
        jnp.ones((1, 2, 2), bool),
        rngs=nnx.Rngs(seed),
    )
    tree, restore = rl_flax.to_tree(module)
    return flatten_dict(tree, sep="/"), restore


def _product(left: jax.Array, right: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """``left @ right`` with its axes where the weight has them."""
    product = jnp.tensordot(left, right, 1)
    others = [axis for axis in range(product.ndim) if axis not in rows]
    return jnp.transpose(
        product, [(*rows, *others).index(a) for a in range(product.ndim)]
    )
