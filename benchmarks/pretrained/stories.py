"""stories260K, a small pretrained Llama, with its tokenizer, and text to tune it on.

The checkpoint and the tokenizer have the layout of llama2.c; the model is plain JAX.
"""

from __future__ import annotations

import gzip
import itertools
import math
import pathlib
import re
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

EPSILON = 1e-5
ROTARY_BASE = 10_000.0
# The matrices of a layer by their llama2.c names, in the order they enter the file.
ATTENTION = ("wq", "wk", "wv", "wo")
FEED_FORWARD = ("w1", "w2", "w3")

Params = dict[str, Any]


class Config(NamedTuple):
    """The header of a checkpoint."""

    dim: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    length: int


class Model(NamedTuple):
    """A checkpoint.

    Attributes:
      config: Its header.
      layers: ``{"layer_i": {"wq": (in, out), ...}}``, the matrices that are tuned.
      rest: Embedding, which is the head too, and the gains of the norms.
    """

    config: Config
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
      ValueError: If the header makes no sense or the file is shorter or longer than it
        says.
    """
    raw = path.read_bytes()
    if len(raw) < 28:
        raise ValueError(f"{path}: {len(raw)} bytes hold no header of seven int32")
    config = Config(*struct.unpack_from("<7i", raw))
    _check(config, path)
    width = config.dim // config.heads
    shapes = _shapes(config)
    count = sum(math.prod(shape) for shape in shapes.values())
    expected = 28 + 4 * (count + config.length * width)  # the tables of the rotation
    if len(raw) != expected:
        raise ValueError(
            f"{path}: {config} takes {expected} bytes, the file has {len(raw)}"
        )
    numbers = np.frombuffer(raw, "<f4", count, offset=28)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{path}: not all weights are finite")
    arrays, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        arrays[name] = numbers[start:stop].reshape(shape)
        start = stop
    matrices = {name: arrays.pop(name) for name in (*ATTENTION, *FEED_FORWARD)}
    layers = {
        f"layer_{i}": {name: jnp.array(w[i].T) for name, w in matrices.items()}
        for i in range(config.layers)
    }
    return Model(config, layers, {name: jnp.array(w) for name, w in arrays.items()})


def _check(config: Config, path: pathlib.Path) -> None:
    if min(config) < 1:
        raise ValueError(f"{path}: sizes must be positive, and the head tied: {config}")
    if config.dim % config.heads or config.heads % config.key_heads:
        raise ValueError(f"{path}: heads do not divide the width: {config}")
    if config.dim // config.heads % 2:
        raise ValueError(f"{path}: a rotation needs heads of even width: {config}")


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """What the file holds, in its order; matrices are (layers, out, in)."""
    n, dim, hidden = config.layers, config.dim, config.hidden
    shared = dim // config.heads * config.key_heads
    return {
        "embedding": (config.vocabulary, dim),
        "attention_norm": (n, dim),
        "wq": (n, dim, dim),
        "wk": (n, shared, dim),
        "wv": (n, shared, dim),
        "wo": (n, dim, dim),
        "feed_forward_norm": (n, dim),
        "w1": (n, hidden, dim),
        "w2": (n, dim, hidden),
        "w3": (n, hidden, dim),
        "final_norm": (dim,),
    }


# Model -------------------------------------------------------------------------------


def logits(layers: Params, rest: Params, tokens: Array, config: Config) -> Array:
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


def loss(layers: Params, rest: Params, tokens: Array, config: Config) -> Array:
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
    layer: Params, x: Array, angles: tuple[Array, Array], config: Config
) -> Array:
    """Causal attention whose key and value heads each serve several query heads."""
    batch, length, _ = x.shape

    def heads(name: str, count: int) -> Array:
        return (x @ layer[name]).reshape(batch, length, count, -1)

    query = rotated(heads("wq", config.heads), angles)
    key = rotated(heads("wk", config.key_heads), angles)
    mixed = jax.nn.dot_product_attention(
        query, key, heads("wv", config.key_heads), is_causal=True
    )
    return mixed.reshape(batch, length, -1) @ layer["wo"]


# Text --------------------------------------------------------------------------------


class Tokenizer:
    """Byte pair encoding as llama2.c does it.

    Args:
      path: Its ``.bin`` file.
      size: How many tokens it holds.

    Raises:
      ValueError: If the file does not hold exactly that many tokens.
    """

    def __init__(self, path: pathlib.Path, size: int):
        raw, at = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        scores: list[float] = []
        try:
            for _ in range(size):
                score, length = struct.unpack_from("<fi", raw, at)
                piece = raw[at + 8 : at + 8 + length]
                if length < 0 or len(piece) < length:
                    raise struct.error("cut")
                self.pieces.append(piece)
                scores.append(score)
                at += 8 + length
        except struct.error:
            raise ValueError(f"{path}: the file ends before {size} tokens") from None
        if at != len(raw):
            raise ValueError(f"{path}: bytes are left behind {size} tokens")
        # Token 3 + b is byte b; it is spelled <0xNN> and never found by spelling.
        self._index = {piece: i for i, piece in enumerate(self.pieces) if i > 258}
        self._rank = {piece: scores[i] for piece, i in self._index.items()}
        self._seen: dict[str, list[int]] = {}

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, with the space llama2.c puts before it.

        No token has a space behind its first place, so words are encoded one by one.
        """
        words = re.findall(" ?[^ ]+| ", " " + text)
        return np.array([i for word in words for i in self._word(word)], np.int32)

    def decode(self, ids: Any) -> str:
        """The text of some ids."""
        parts = [bytes([i - 3]) if 3 <= i <= 258 else self.pieces[i] for i in ids]
        return b"".join(parts).decode(errors="replace")

    def _word(self, word: str) -> list[int]:
        if word not in self._seen:
            parts = [letter.encode() for letter in word]
            while len(parts) > 1:
                pairs = [a + b for a, b in itertools.pairwise(parts)]
                best = max(pairs, key=lambda pair: self._rank.get(pair, -math.inf))
                if best not in self._rank:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = [best]
            self._seen[word] = [i for part in parts for i in self._ids(part)]
        return self._seen[word]

    def _ids(self, part: bytes) -> list[int]:
        known = self._index.get(part)
        return [3 + byte for byte in part] if known is None else [known]


def shakespeare(data_dir: pathlib.Path, tokenizer: Tokenizer) -> Text:
    """Tiny Shakespeare in tokens, its characters split nine to one."""
    path = data_dir / "tinyshakespeare" / "input.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    cut = len(text) * 9 // 10
    return Text(tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:]))


def files(data_dir: pathlib.Path) -> tuple[Model, Tokenizer]:
    """The checkpoint and its tokenizer."""
    folder = data_dir / "stories260k"
    model = load(folder / "stories260K.bin")
    return model, Tokenizer(folder / "tok512.bin", model.config.vocabulary)


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
