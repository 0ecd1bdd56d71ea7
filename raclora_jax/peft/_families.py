"""What families of models on the hub call the leaves of their JAX modules."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from raclora_jax._core import paths
from raclora_jax._core.types import PyTree
from raclora_jax.peft._targets import Target, targets

# Tunix's decoders: leaves of a layer, and modules behind ``model.layers.N``.
_DECODER = {
    "attn/(q|k|v|o)_proj/w": r"self_attn.\2_proj",
    "mlp/(gate|up|down)_proj/kernel": r"mlp.\2_proj",
    # Of Qwen 3 with experts, in stacks.
    "mlp/(gate|up|down)_proj": r"mlp.experts.{}.\2_proj",
    "mlp/router/kernel": "mlp.gate",
    # Of Gemma 3: (heads, width, size of a head).
    "attn/(q|k|v)_einsum/w": r"self_attn.\2_proj",
    "attn/attn_vec_einsum/w": "self_attn.o_proj",
}
_DECODER_NORMS = {
    "(input|post_attention)_layernorm/w": r"\2_layernorm",
    "attn/(q|k)_norm/w": r"self_attn.\2_norm",
    "pre_attention_norm/scale": "input_layernorm",
    "post_attention_norm/scale": "post_attention_layernorm",
    "(pre|post)_ffw_norm/scale": r"\2_feedforward_layernorm",
    "attn/_query_norm/scale": "self_attn.q_norm",
    "attn/_key_norm/scale": "self_attn.k_norm",
}
# Encoders: parts of a layer, and modules behind ``encoder.layer.N``.
_ENCODER = {
    "attention/(query|key|value)": r"attention.self.\2",
    "attention/output": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_HEADS = {
    "bert": {"pooler": "bert.pooler.dense", "head": "classifier"},
    "roberta": {"pooler": "classifier.dense", "head": "classifier.out_proj"},
}
_DECODERS = ("llama", "qwen3", "qwen3_moe", "gemma3_text")
_Rules = list[Any]


def names_of(family: str, params: PyTree) -> dict[str, Target]:
    """The parameter of the hub's model that every leaf of a known family is.

    Decoders are as Tunix has them: ``layers/0/attn/q_proj/w``. Where they have no
    ``lm_head/w``, the embedding is the head too. What Gemma 3 stacks
    (``attn/kv_einsum``) is taken apart first, into ``attn/k_einsum`` and
    ``attn/v_einsum``. Encoders have ``word``, ``position``, ``type``, ``norm``,
    ``pooler``, ``head`` and ``layers/0/attention/query/kernel``.

    Args:
      family: The ``model_type`` of the config: ``"llama"``, ``"qwen3"``, ``"qwen3_moe"``,
        ``"gemma3_text"``, ``"bert"`` or ``"roberta"``.
      params: The weights, or their shapes.

    Returns:
      ``{path: Target}``, as ``targets`` gives it.

    Raises:
      ValueError: If the family is none of these, or a leaf is none of it.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"layers": {"0": {"attn": {"o_proj": {"w": jnp.ones((2, 3, 6))}}}}}
      >>> names_of("llama", params)["layers/0/attn/o_proj/w"].name
      'model.layers.0.self_attn.o_proj.weight'
    """
    leaves, _ = paths.flatten(params)
    if family in _DECODERS:
        rules = _decoder_rules()
    elif family in _HEADS:
        rules = _encoder_rules(family)
    else:
        known = ", ".join((*_DECODERS, *_HEADS))
        raise ValueError(f"the family {family!r} is not among {known}; see targets")
    used = [rule for rule in rules if any(re.fullmatch(rule[0], path) for path in leaves)]
    found = targets(params, used)
    apart = "lm_head/w" in leaves or family in _HEADS
    return {
        path: dataclasses.replace(target, tied=False if apart else "lm_head.weight")
        if target.kind == "embedding"
        else target
        for path, target in found.items()
    }


def _decoder_rules() -> _Rules:
    rules: _Rules = [
        ("embedder/input_embedding", "model.embed_tokens.weight", "embedding"),
        ("lm_head/w", "lm_head.weight"),
        ("final_norm/(w|scale)", "model.norm.weight", "plain"),
    ]
    for modules, kind in ((_DECODER, "linear"), (_DECODER_NORMS, "plain")):
        for ours, theirs in modules.items():
            name = rf"model.layers.\1.{theirs}.weight"
            rules.append((rf"layers/(\d+)/{ours}", name, kind))
    return rules


def _encoder_rules(family: str) -> _Rules:
    rules: _Rules = [
        (
            f"{ours}/embedding",
            f"{family}.embeddings.{theirs}_embeddings.weight",
            "embedding",
        )
        for ours, theirs in (
            ("word", "word"),
            ("position", "position"),
            ("type", "token_type"),
        )
    ]
    modules = {"norm": f"{family}.embeddings.LayerNorm"} | _HEADS[family]
    modules |= {
        rf"layers/(\d+)/{ours}": rf"{family}.encoder.layer.\1.{theirs}"
        for ours, theirs in _ENCODER.items()
    }
    for ours, theirs in modules.items():
        rules += [
            (f"{ours}/kernel", f"{theirs}.weight"),
            (f"{ours}/scale", f"{theirs}.weight", "plain"),
            (f"{ours}/bias", f"{theirs}.bias", "plain"),
        ]
    return rules
