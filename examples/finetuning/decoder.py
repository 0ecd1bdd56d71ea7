"""Decoders of Tunix, filled from a folder of the hub or a llama2.c checkpoint."""

from __future__ import annotations

import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import raclora_jax as rl
from finetuning import families, folders, llama2c
from raclora_jax import flax as rl_flax
from raclora_jax import peft


class Decoder(NamedTuple):
    """A model and its weights.

    Attributes:
      params: The weights, a plain tree.
      restore: ``restore(params)``, the module.
      length: The longest text it can read.
      vocab: How many tokens it knows.
    """

    params: dict[str, Any]
    restore: Any
    length: int
    vocab: int

    def logits(self, params: Any, ids: Any, positions: Any, mask: Any) -> jax.Array:
        """``(batch, length, vocab)`` of ids, places and who sees whom."""
        found, _ = self.restore(params)(ids, positions, None, mask)
        return found.astype(jnp.float32)


def load(folder: pathlib.Path, *, bf16: bool, remat: bool) -> Decoder:
    """A decoder from a folder, or from a file of llama2.c.

    Raises:
      ValueError: If there is no config, the architecture is none of those here, or the
        folder has parameters that the model has no place for.
    """
    dtype = jnp.bfloat16 if bf16 else jnp.float32
    if folder.suffix == ".bin":
        stated, leaves = llama2c.read(folder)
        like, restore = _empty(folder, stated, dtype, remat)
        for path, leaf in flatten_dict(like, sep="/").items():
            if leaves[path].shape != leaf.shape:
                raise ValueError(
                    f"{folder}: {path} is {leaves[path].shape}, not {leaf.shape}"
                )
        whole = {path: jnp.asarray(leaf, dtype) for path, leaf in leaves.items()}
        params = unflatten_dict(whole, sep="/")
    else:
        stated = folders.stated(folder)
        like, restore = _empty(folder / "config.json", stated, dtype, remat)
        hub = jax.eval_shape(_apart, like)
        _check_all_is_read(folder, hub)
        read = peft.load_model(folder, hub, spec_for(hub, 1), names(hub))
        params = _together(read, like)
    return Decoder(
        params, restore, stated["max_position_embeddings"], stated["vocab_size"]
    )


def save(folder: pathlib.Path, params: Any, like: pathlib.Path | None = None) -> None:
    """Writes the weights as a folder of the hub; see ``peft.save_model``."""
    hub = _apart(params)
    peft.save_model(folder, hub, spec_for(hub, 1), names(hub), like=like)


def spec_for(params: Any, rank: int, **options: Any) -> rl.Spec:
    """The matrices of all layers through sketches; the rest is frozen."""
    rules = [
        rl.Rule(f"layers/\\d+/{name}", rows=matrix.rows, batch=matrix.batch)
        for name, matrix in families.MATRICES.items()
    ]
    for name in families.STACKS:
        rules.append(rl.Rule(f"layers/\\d+/{name}", rows=(2,), batch=(0,)))
    paths = list(flatten_dict(params, sep="/"))
    used = [r for r in rules if any(re.fullmatch(r.path, path) for path in paths)]
    return rl.Spec(rank, rules=[*used, rl.Rule(".*", mode="frozen")], **options)


def names(hub: Any) -> dict[str, peft.Target]:
    """The parameter of the hub's model that each leaf is, stacks apart."""
    return peft.names_of("llama", hub)  # the rules of all of Tunix's decoders are one set


def _empty(
    file: pathlib.Path, stated: dict[str, Any], dtype: Any, remat: bool
) -> tuple[Any, Any]:
    """Shapes of the weights, and the way from weights to the module."""
    tree, restore = rl_flax.to_tree(families.model(file, stated, remat=remat))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
    return like, restore


def _parts(path: str) -> list[str]:
    """The matrices of the hub's model that a leaf stacks; none if it is one itself."""
    layer, name = re.fullmatch(r"(layers/\d+/)?(.*)", path).groups()
    return [f"{layer}{part}" for part in families.STACKS.get(name, ())]


def _apart(params: Any) -> Any:
    """The tree with every stack as the matrices that it holds."""
    leaves = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        parts = _parts(path)
        leaves |= {part: leaf[index] for index, part in enumerate(parts)}
        if not parts:
            leaves[path] = leaf
    return unflatten_dict(leaves, sep="/")


def _together(hub: Any, like: Any) -> Any:
    """What ``_apart`` made of a tree like another."""
    leaves = flatten_dict(hub, sep="/")
    whole = {}
    for path in flatten_dict(like, sep="/"):
        parts = _parts(path)
        stacked = jnp.stack([leaves[part] for part in parts]) if parts else leaves[path]
        whole[path] = stacked
    return unflatten_dict(whole, sep="/")


def _check_all_is_read(folder: pathlib.Path, hub: Any) -> None:
    """Refuses a folder whose model has more in it than Tunix's."""
    found = names(hub).values()
    known = {name for target in found for name in (target.name, target.tied) if name}
    spare = [
        name
        for name in peft.parameters(folder)
        if re.sub(r"experts\.\d+", "experts.{}", name) not in known
        and not name.endswith("rotary_emb.inv_freq")
    ]
    if spare:
        raise ValueError(
            f"{folder} has {spare[0]}{f' and {len(spare) - 1} more' * (len(spare) > 1)}, "
            "for which Tunix's model has no place: it would be another model"
        )
