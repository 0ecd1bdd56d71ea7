"""Decoders of Tunix, filled from a folder of the hub or a llama2.c checkpoint."""

from __future__ import annotations

import functools
import json
import pathlib
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tunix.models.llama3 import model as llama
from tunix.models.qwen3 import model as qwen

import raclora_jax as rl
from finetuning import naming
from raclora_jax import flax as rl_flax
from raclora_jax import peft

FAMILIES = {"llama": (llama.Llama3, llama), "qwen3": (qwen.Qwen3, qwen)}
_ROPE = {family: module.apply_rope for family, (_, module) in FAMILIES.items()}
_HEADER = ("width", "hidden", "layers", "heads", "kv_heads", "vocab", "length")

_MODULES = {
    "attn/q_proj/w": "self_attn.q_proj",
    "attn/k_proj/w": "self_attn.k_proj",
    "attn/v_proj/w": "self_attn.v_proj",
    "attn/o_proj/w": "self_attn.o_proj",
    "mlp/gate_proj/kernel": "mlp.gate_proj",
    "mlp/up_proj/kernel": "mlp.up_proj",
    "mlp/down_proj/kernel": "mlp.down_proj",
}
_NORMS = {
    "input_layernorm/w": "input_layernorm",
    "post_attention_layernorm/w": "post_attention_layernorm",
    "attn/q_norm/w": "self_attn.q_norm",
    "attn/k_norm/w": "self_attn.k_norm",
}


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
      ValueError: If there is no config, or the architecture is none of those here.
    """
    if folder.suffix == ".bin":
        return _llama2c(folder, bf16=bf16, remat=remat)
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} has no config.json: it is no model's folder")
    stated = json.loads(file.read_text())
    family = stated.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{file}: model_type {family!r} is not among {', '.join(FAMILIES)}"
        )
    scaling = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    if scaling.get("rope_type", "default") != "default":
        raise ValueError(f"{file}: rope_type {scaling['rope_type']!r} is not read here")
    heads = stated["num_attention_heads"]
    model = _empty(
        family,
        remat,
        num_layers=stated["num_hidden_layers"],
        vocab_size=stated["vocab_size"],
        embed_dim=stated["hidden_size"],
        hidden_dim=stated["intermediate_size"],
        num_heads=heads,
        head_dim=stated.get("head_dim") or stated["hidden_size"] // heads,
        num_kv_heads=stated["num_key_value_heads"],
        rope_theta=stated.get("rope_theta") or scaling.get("rope_theta", 10_000),
        norm_eps=stated["rms_norm_eps"],
        tied=stated.get("tie_word_embeddings", False),
    )
    tree, restore = rl_flax.to_tree(model)
    dtype = jnp.bfloat16 if bf16 else jnp.float32
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
    params = peft.load_model(folder, like, views(like), names(like))
    return Decoder(
        params, restore, stated["max_position_embeddings"], stated["vocab_size"]
    )


def _empty(family: str, remat: bool, *, tied: bool, **sizes: Any) -> nnx.Module:
    make, module = FAMILIES[family]
    # Tunix 0.1.7 turns heads by the default of its function, whatever the config says.
    module.apply_rope = functools.partial(_ROPE[family], rope_theta=sizes["rope_theta"])
    policy = module.RematConfig.BLOCK if remat else module.RematConfig.NONE
    tying = {
        name: tied
        for name in ("weight_tying", "use_tied_embedding")
        if name in module.ModelConfig.__dataclass_fields__
    }
    config = module.ModelConfig(**sizes, **tying, remat_config=policy)
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))


def views(params: Any) -> rl.Spec:
    """A spec that says of every matrix which axes are rows; ranks are not its matter."""
    return spec_for(params, 1)


def spec_for(params: Any, rank: int, **options: Any) -> rl.Spec:
    """The matrices of all layers through sketches; embedding, head and norms frozen."""
    inputs = {"attn/o_proj/w": (0, 1)}
    rules = [
        rl.Rule(rf"layers/\d+/{name}", rows=inputs.get(name, (0,))) for name in _MODULES
    ]
    return rl.Spec(rank, rules=[*rules, rl.Rule(".*", mode="frozen")], **options)


def names(params: Any) -> dict[str, peft.Target]:
    """The parameter of the hub's model that each leaf is."""
    rules: list[tuple] = [
        ("embedder/input_embedding", "model.embed_tokens.weight", "embedding"),
        ("lm_head/w", "lm_head.weight"),
        ("final_norm/w", "model.norm.weight", "plain"),
    ]
    for ours, theirs in _MODULES.items():
        rules.append((rf"layers/(\d+)/{ours}", rf"model.layers.\1.{theirs}.weight"))
    for ours, theirs in _NORMS.items():
        name = rf"model.layers.\1.{theirs}.weight"
        rules.append((rf"layers/(\d+)/{ours}", name, "plain"))
    return naming.targets(params, rules)


def _llama2c(file: pathlib.Path, *, bf16: bool, remat: bool) -> Decoder:
    """A checkpoint of llama2.c, version 0: seven sizes, then float32 matrices."""
    data = file.read_bytes()
    sizes = dict(zip(_HEADER, struct.unpack("7i", data[:28]), strict=True))
    tied, vocab = sizes["vocab"] > 0, abs(sizes["vocab"])
    width, layers, heads = sizes["width"], sizes["layers"], sizes["heads"]
    kv_heads, hidden, size = sizes["kv_heads"], sizes["hidden"], width // heads
    numbers, at = np.frombuffer(data[28:], np.float32), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        count = int(np.prod(shape))
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
    model = _empty(
        "llama",
        remat,
        num_layers=layers,
        vocab_size=vocab,
        embed_dim=width,
        hidden_dim=hidden,
        num_heads=heads,
        head_dim=size,
        num_kv_heads=kv_heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        tied=tied,
    )
    tree, restore = rl_flax.to_tree(model)
    dtype = jnp.bfloat16 if bf16 else jnp.float32
    for path, leaf in flatten_dict(tree, sep="/").items():
        if leaves[path].shape != leaf.shape:
            raise ValueError(f"{file}: {path} is {leaves[path].shape}, not {leaf.shape}")
    params = {path: jnp.asarray(leaf, dtype) for path, leaf in leaves.items()}
    return Decoder(unflatten_dict(params, sep="/"), restore, sizes["length"], vocab)
