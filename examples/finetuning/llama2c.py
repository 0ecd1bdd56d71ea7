"""A checkpoint of llama2.c as leaves of Tunix's Llama."""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any

import numpy as np

_HEADER = ("width", "hidden", "layers", "heads", "kv_heads", "vocab", "length")


def read(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Sizes as a config of the hub has them, and ``{path: leaf}``.

    Version 0: seven sizes, then float32 matrices.

    Raises:
      ValueError: If the file is shorter than its sizes say, or says none.
    """
    data = file.read_bytes()
    if len(data) < 28:
        raise ValueError(f"{file} is cut short")
    sizes = dict(zip(_HEADER, struct.unpack("<7i", data[:28]), strict=True))
    counts = sizes | {"vocab": abs(sizes["vocab"])}
    whole = (
        min(counts.values()) > 0
        and sizes["width"] % (2 * sizes["heads"]) == 0
        and sizes["heads"] % sizes["kv_heads"] == 0
    )
    if not whole:
        raise ValueError(f"{file} is no checkpoint of llama2.c: it begins with {sizes}")
    tied, vocab = sizes["vocab"] > 0, counts["vocab"]
    width, layers, heads = sizes["width"], sizes["layers"], sizes["heads"]
    kv_heads, hidden, size = sizes["kv_heads"], sizes["hidden"], width // heads
    numbers, at = np.frombuffer(data, "<f4", (len(data) - 28) // 4, 28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        count = math.prod(shape)
        if at + count > len(numbers):
            raise ValueError(f"{file} is cut short")
        at += count
        return numbers[at - count : at].reshape(shape)

    def turned(matrices: np.ndarray) -> np.ndarray:
        """By head; llama2.c turns neighbouring numbers of one and not its halves."""
        parts = matrices.reshape(layers, -1, size // 2, 2, width)
        return parts.transpose(0, 1, 3, 2, 4).reshape(layers, -1, size, width)

    leaves = {"embedder/input_embedding": take(vocab, width)}
    before = take(layers, width)
    query = turned(take(layers, heads * size, width))
    key = turned(take(layers, kv_heads * size, width))
    value = take(layers, kv_heads, size, width)
    out = take(layers, width, heads, size)
    after = take(layers, width)
    gate, down, up = (
        take(layers, *shape)
        for shape in ((hidden, width), (width, hidden), (hidden, width))
    )
    leaves["final_norm/w"] = take(width)
    take(2, sizes["length"], size // 2)  # sines and cosines
    if not tied:
        leaves["lm_head/w"] = take(vocab, width).T
    for index in range(layers):
        own = {
            "attn/q_proj/w": query[index].transpose(2, 0, 1),
            "attn/k_proj/w": key[index].transpose(2, 0, 1),
            "attn/v_proj/w": value[index].transpose(2, 0, 1),
            "attn/o_proj/w": out[index].transpose(1, 2, 0),
            "mlp/gate_proj/kernel": gate[index].T,
            "mlp/up_proj/kernel": up[index].T,
            "mlp/down_proj/kernel": down[index].T,
            "input_layernorm/w": before[index],
            "post_attention_layernorm/w": after[index],
        }
        leaves |= {f"layers/{index}/{name}": leaf for name, leaf in own.items()}
    stated = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": tied,
        "max_position_embeddings": sizes["length"],
    }
    return stated, leaves
