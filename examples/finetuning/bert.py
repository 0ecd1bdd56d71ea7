"""BERT and RoBERTa encoders with a classification head, as nnx modules."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from finetuning import folders
from raclora_jax import flax as rl_flax
from raclora_jax import peft

_SIZES = (  # in the order of ``Config``
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, read from a ``config.json``.

    ``offset`` is where positions start: RoBERTa counts from behind the padding id.
    """

    kind: str
    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    positions: int
    types: int
    epsilon: float
    padding: int
    offset: int

    @classmethod
    def read(cls, folder: pathlib.Path) -> Config:
        """From a folder in the hub's layout."""
        file, stated = folder / "config.json", folders.stated(folder)
        kind, act = stated.get("model_type"), stated.get("hidden_act")
        if kind not in ("bert", "roberta") or act != "gelu":
            raise ValueError(
                f"{file}: expected model_type bert or roberta with hidden_act gelu, got "
                f"{kind} with {act}"
            )
        padding = stated.get("pad_token_id", 0)
        offset = padding + 1 if kind == "roberta" else 0
        try:
            sizes = [stated[name] for name in _SIZES]
        except KeyError as error:
            raise ValueError(f"{file} has no {error}") from error
        return cls(kind, *sizes, padding, offset)


class Attention(nnx.Module):
    """Every token looks at every token that is no padding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        size = (config.width, config.width)
        self.query, self.key, self.value, self.output = (
            nnx.Linear(*size, rngs=rngs) for _ in range(4)
        )
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: Array, mask: Array) -> Array:
        heads = (*x.shape[:2], self.heads, -1)
        parts = (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.reshape(heads) for part in parts)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        return self.norm(x + self.output(mixed.reshape(x.shape)))


class Layer(nnx.Module):
    """Attention and a feed-forward network, each followed by its norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.up = nnx.Linear(config.width, config.hidden, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        x = self.attention(x, mask)
        hidden = jax.nn.gelu(self.up(x), approximate=False)
        return self.norm(x + self.down(hidden))


class Classifier(nnx.Module):
    """The encoder, a dense layer on its first token, and an output for each label.

    The layout is that of ``AutoModelForSequenceClassification``.
    """

    def __init__(self, config: Config, outputs: int, rngs: nnx.Rngs):
        self.word = nnx.Embed(config.vocab, config.width, rngs=rngs)
        self.position = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.type = nnx.Embed(config.types, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        small = nnx.initializers.normal(0.02)
        self.pooler = nnx.Linear(config.width, config.width, kernel_init=small, rngs=rngs)
        self.head = nnx.Linear(config.width, outputs, kernel_init=small, rngs=rngs)
        self.config = config

    def __call__(self, ids: Array, types: Array) -> Array:
        """Logits ``(batch, outputs)`` of ids and segment ids ``(batch, length)``."""
        return self.head(jnp.tanh(self.pooler(self.hidden(ids, types)[:, 0])))

    def hidden(self, ids: Array, types: Array) -> Array:
        """Hidden states behind the last layer, ``(batch, length, width)``."""
        mask = ids != self.config.padding
        positions = jnp.arange(ids.shape[1]) + self.config.offset
        positions = jnp.where(mask, positions, self.config.padding)
        if self.config.types == 1:
            types = jnp.zeros_like(types)
        x = self.norm(self.word(ids) + self.position(positions) + self.type(types))
        for layer in self.layers:
            x = layer(x, mask)
        return x


def names(config: Config, params: dict, start: str | None) -> dict[str, peft.Target]:
    """The parameter of the hub's model that each leaf is.

    Before the encoder's stands ``start``, or what a classifier of the hub has there.
    """
    found, usual = peft.names_of(config.kind, params), f"{config.kind}."
    if start is None:
        return found
    return {
        path: dataclasses.replace(target, name=start + target.name.removeprefix(usual))
        if target.name.startswith(usual)
        else target
        for path, target in found.items()
    }


def load(folder: pathlib.Path, outputs: int, seed: int) -> tuple[Classifier, list[str]]:
    """A classifier with the weights of a folder, and the leaves that it has not.

    The head of another task, with other outputs, is begun anew.
    """
    config = Config.read(folder)
    model = Classifier(config, outputs, nnx.Rngs(seed))
    tree, restore = rl_flax.to_tree(model)
    held = peft.parameters(folder)
    targets = {
        path: dataclasses.replace(target, name=_held_as(target.name, held))
        for path, target in names(config, tree, prefix(folder)).items()
    }
    leaves = flatten_dict(tree, sep="/")
    other_head = held.get(targets["head/bias"].name) != (outputs,)
    fresh = [
        path
        for path in leaves
        if (path.startswith(("pooler/", "head/")) and targets[path].name not in held)
        or (path.startswith("head/") and other_head)
    ]
    known = {path: leaf for path, leaf in leaves.items() if path not in fresh}
    read = peft.load_model(
        folder, unflatten_dict(known, sep="/"), 1, {path: targets[path] for path in known}
    )
    everything = leaves | flatten_dict(read, sep="/")
    return restore(unflatten_dict(everything, sep="/")), fresh


def _held_as(name: str, held: dict[str, tuple[int, ...]]) -> str:
    """The name of a parameter in a folder; the first BERTs have other ones of norms."""
    old = re.sub("LayerNorm.weight$", "LayerNorm.gamma", name)
    old = re.sub("LayerNorm.bias$", "LayerNorm.beta", old)
    return old if name not in held and old in held else name


def prefix(folder: pathlib.Path) -> str:
    """What stands before the encoder's parameters in a folder."""
    end = "embeddings.word_embeddings.weight"
    found = [name for name in peft.parameters(folder) if name.endswith(end)]
    if not found:
        raise ValueError(f"{folder} holds no {end}: it is no BERT and no RoBERTa")
    return found[0].removesuffix(end)
