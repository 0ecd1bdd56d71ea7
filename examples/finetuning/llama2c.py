"""A checkpoint of llama2.c, as its file has it and as leaves of Tunix's Llama."""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """The header of a checkpoint; ``vocab`` is negative where the head is not tied."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int


def arrays(file: pathlib.Path) -> tuple[Sizes, dict[str, np.ndarray]]:
    """Sizes, and what the file holds by llama2.c's names: matrices are (layers, out, in).

    Version 0: seven sizes, then float32 numbers.

    Raises:
      ValueError: If the file is shorter or longer than its sizes say, or says none.
    """
    data = file.read_bytes()
    if len(data) < 28:
        raise ValueError(f"{file} is cut short: {len(data)} bytes hold no header")
    sizes = Sizes(*struct.unpack_from("<7i", data))
    dim, hidden, layers, heads, kv_heads, _, length = sizes
    tied, vocab = sizes.vocab > 0, abs(sizes.vocab)
    whole = (
        min(sizes._replace(vocab=vocab)) > 0
        and dim % (2 * heads) == 0
        and heads % kv_heads == 0
    )
    if not whole:
        raise ValueError(f"{file} is no checkpoint of llama2.c: it begins with {sizes}")
    shared = dim // heads * kv_heads
    shapes = {
        "embedding": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, shared, dim),
        "wv": (layers, shared, dim),
        "wo": (layers, dim, dim),
        "feed_forward_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "final_norm": (dim,),
        "rotations": (2, length, dim // heads // 2),  # cosines and sines
    }
    if not tied:
        shapes["head"] = (vocab, dim)
    counts = [math.prod(shape) for shape in shapes.values()]
    expected = 28 + 4 * sum(counts)
    if len(data) != expected:
        raise ValueError(
            f"{file} is cut short or goes on: {sizes}, the head "
            f"{'tied' if tied else 'not tied'}, takes {expected} bytes, the file has "
            f"{len(data)}"
        )
    parts = np.split(np.frombuffer(data, "<f4", offset=28), np.cumsum(counts)[:-1])
    named = zip(shapes.items(), parts, strict=True)
    return sizes, {name: part.reshape(shape) for (name, shape), part in named}


def read(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Sizes as a config of the hub has them, and ``{path: leaf}`` of Tunix's Llama.

    Raises:
      ValueError: If the file is no whole checkpoint.
    """
    sizes, held = arrays(file)
    width, layers, heads = sizes.dim, sizes.layers, sizes.heads
    size = width // heads

    def turned(name: str) -> np.ndarray:
        """By head; llama2.c turns neighbouring numbers of one and not its halves."""
        parts = held[name].reshape(layers, -1, size // 2, 2, width)
        return parts.transpose(0, 1, 3, 2, 4).reshape(layers, -1, size, width)

    query, key = turned("wq"), turned("wk")
    value = held["wv"].reshape(layers, -1, size, width)
    out = held["wo"].reshape(layers, width, heads, size)
    leaves = {
        "embedder/input_embedding": held["embedding"],
        "final_norm/w": held["final_norm"],
    }
    if "head" in held:
        leaves["lm_head/w"] = held["head"].T
    for index in range(layers):
        own = {
            "attn/q_proj/w": query[index].transpose(2, 0, 1),
            "attn/k_proj/w": key[index].transpose(2, 0, 1),
            "attn/v_proj/w": value[index].transpose(2, 0, 1),
            "attn/o_proj/w": out[index].transpose(1, 2, 0),
            "mlp/gate_proj/kernel": held["w1"][index].T,
            "mlp/up_proj/kernel": held["w3"][index].T,
            "mlp/down_proj/kernel": held["w2"][index].T,
            "input_layernorm/w": held["attention_norm"][index],
            "post_attention_layernorm/w": held["feed_forward_norm"][index],
        }
        leaves |= {f"layers/{index}/{name}": leaf for name, leaf in own.items()}
    stated = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "vocab_size": abs(sizes.vocab),
        "hidden_size": width,
        "intermediate_size": sizes.hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": sizes.vocab > 0,
        "max_position_embeddings": sizes.length,
    }
    return stated, leaves
