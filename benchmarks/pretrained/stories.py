"""stories260K, a small pretrained Llama, with its tokenizer, and text to tune it on.

The checkpoint and the tokenizer have the layout of llama2.c; the model is plain JAX.
"""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from finetuning import llama2c
from finetuning.llama2c import Sizes
from finetuning.tokens import Merges
from jax import Array

EPSILON = 1e-5
ROTARY_BASE = 10_000.0
PROBLEMS = 2000  # of GSM8K
# By their llama2.c names: the matrices of a layer, and what is not tuned.
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
REST = ("embedding", "attention_norm", "feed_forward_norm", "final_norm")

Params = dict[str, Any]


class Model(NamedTuple):
    """A checkpoint.

    Attributes:
      config: Its header.
      layers: ``{"layer_i": {"wq": (in, out), ...}}``, the matrices that are tuned.
      rest: Embedding, which is the head too, and the gains of the norms.
    """

    config: Sizes
    layers: Params
    rest: Params


class Text(NamedTuple):
    """Token ids: the first nine tenths to train on, the rest to validate on."""

    train: np.ndarray
    validation: np.ndarray


# Checkpoint --------------------------------------------------------------------------


def load(path: pathlib.Path) -> Model:
    """Reads a llama2.c checkpoint whose head is its embedding.

    Args:
      path: The ``.bin`` file.

    Returns:
      The model, kernels as ``(in, out)``, float32.

    Raises:
      ValueError: If the file is no whole checkpoint, or has weights that are not finite.
    """
    config, arrays = llama2c.arrays(path)
    if "head" in arrays:
        raise ValueError(f"{path}: the head is not tied")
    if not all(np.isfinite(numbers).all() for numbers in arrays.values()):
        raise ValueError(f"{path}: not all weights are finite")
    layers = {
        f"layer_{i}": {name: jnp.array(arrays[name][i].T) for name in MATRICES}
        for i in range(config.layers)
    }
    return Model(config, layers, {name: jnp.array(arrays[name]) for name in REST})


# Model -------------------------------------------------------------------------------


def logits(layers: Params, rest: Params, tokens: Array, config: Sizes) -> Array:
    """``(batch, length)`` token ids to ``(batch, length, vocabulary)``."""
    x = rest["embedding"][tokens]
    angles = rotations(tokens.shape[-1], config.dim // config.heads)
    for i in range(config.layers):
        layer = layers[f"layer_{i}"]
        y = normalised(x, rest["attention_norm"][i])
        x = x + attention(layer, y, angles, config)
        y = normalised(x, rest["feed_forward_norm"][i])
        x = x + (jax.nn.silu(y @ layer["w1"]) * (y @ layer["w3"])) @ layer["w2"]
    return normalised(x, rest["final_norm"]) @ rest["embedding"].T


def loss(layers: Params, rest: Params, tokens: Array, config: Sizes) -> Array:
    """Mean cross entropy of every next token, ``tokens`` of (batch, length + 1)."""
    scores = logits(layers, rest, tokens[:, :-1], config)
    right = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - right)


def normalised(x: Array, gain: Array) -> Array:
    """Root mean square 1, times the gain."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * gain


def rotations(length: int, width: int) -> tuple[Array, Array]:
    """Cosines and sines, ``(length, 1, width / 2)``."""
    frequencies = ROTARY_BASE ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotated(x: Array, angles: tuple[Array, Array]) -> Array:
    """Neighbouring pairs of the last axis turned by their angles."""
    cosine, sine = angles
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * cosine - odd * sine, even * sine + odd * cosine)
    return jnp.stack(turned, axis=-1).reshape(x.shape)


def attention(
    layer: Params, x: Array, angles: tuple[Array, Array], config: Sizes
) -> Array:
    """Causal attention whose key and value heads each serve several query heads."""
    batch, length, _ = x.shape

    def heads(name: str, count: int) -> Array:
        return (x @ layer[name]).reshape(batch, length, count, -1)

    query = rotated(heads("wq", config.heads), angles)
    key = rotated(heads("wk", config.kv_heads), angles)
    mixed = jax.nn.dot_product_attention(
        query, key, heads("wv", config.kv_heads), is_causal=True
    )
    return mixed.reshape(batch, length, -1) @ layer["wo"]


# Text --------------------------------------------------------------------------------


class Tokenizer(Merges):
    """Byte pair encoding as llama2.c does it, and back.

    Args:
      path: Its ``.bin`` file.
      size: How many tokens it holds.

    Raises:
      ValueError: If the file does not hold exactly that many tokens.
    """

    def __init__(self, path: pathlib.Path, size: int):
        super().__init__(path)
        if len(self.pieces) != size:
            raise ValueError(f"{path} holds {len(self.pieces)} pieces, not {size}")

    def decode(self, ids: Any) -> str:
        """The text of some ids."""
        parts = [bytes([i - 3]) if 3 <= i <= 258 else self.pieces[i] for i in ids]
        return b"".join(parts).decode(errors="replace")


def shakespeare(data_dir: pathlib.Path) -> str:
    """Tiny Shakespeare."""
    return _unzipped(data_dir / "tinyshakespeare" / "input.txt.gz")


def gsm8k(data_dir: pathlib.Path, problems: int | None = PROBLEMS) -> str:
    """The first problems of GSM8K's training split, each with its worked answer."""
    lines = _unzipped(data_dir / "gsm8k" / "train.jsonl.gz").splitlines()[:problems]
    problems = map(json.loads, lines)
    return "\n\n".join(f"{one['question']}\n{one['answer']}" for one in problems)


def wikitext(data_dir: pathlib.Path) -> str:
    """WikiText-2, its validation split."""
    return _unzipped(data_dir / "wikitext2" / "valid.txt.gz")


TEXTS = {"Shakespeare": shakespeare, "GSM8K": gsm8k, "WikiText-2": wikitext}


def _unzipped(path: pathlib.Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def encoded(text: str, encode: Callable[[str], list[int]]) -> Text:
    """A text in tokens, its characters split nine to one."""
    cut = len(text) * 9 // 10
    parts = (encode(part) for part in (text[:cut], text[cut:]))
    return Text(*(np.array(ids, np.int32) for ids in parts))


def files(data_dir: pathlib.Path) -> tuple[Model, Tokenizer]:
    """The checkpoint and its tokenizer."""
    folder = data_dir / "stories260k"
    model = load(folder / "stories260K.bin")
    return model, Tokenizer(folder / "tok512.bin", model.config.vocab)


def windows(ids: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """``length + 1`` tokens from every start: inputs and, one later, targets."""
    return ids[np.asarray(starts)[..., None] + np.arange(length + 1)]


def spread_windows(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """Windows at equal distances over a text."""
    last = len(ids) - length - 1
    return windows(ids, np.linspace(0, last, count).astype(int), length)


def greedy(model: Model, count: int) -> list[int]:
    """The most likely continuation of the start token."""
    score = jax.jit(logits, static_argnums=3)
    ids = np.zeros((1, count + 1), np.int32)
    ids[0, 0] = 1
    for i in range(count):
        scores = score(model.layers, model.rest, ids[:, :-1], model.config)
        ids[0, i + 1] = int(jnp.argmax(scores[0, i]))
    return ids[0, 1:].tolist()
