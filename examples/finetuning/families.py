"""The families of Tunix's decoders: what their configs say, and which axes are rows.

Tunix fixes some things that a config of the hub may state otherwise. Where its model
would be another one than Transformers', the config is refused by name.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from tunix.models.gemma3 import model as gemma
from tunix.models.llama3 import model as llama
from tunix.models.qwen3 import model as qwen

Stated = dict[str, Any]


class Matrix(NamedTuple):
    """A matrix of a layer.

    Attributes:
      rows: The axes the model contracts over.
      batch: The axes that stack matrices.
    """

    rows: tuple[int, ...] = (0,)
    batch: tuple[int, ...] = ()


MATRICES = {
    "attn/q_proj/w": Matrix(),
    "attn/k_proj/w": Matrix(),
    "attn/v_proj/w": Matrix(),
    "attn/o_proj/w": Matrix((0, 1)),
    "mlp/gate_proj/kernel": Matrix(),
    "mlp/up_proj/kernel": Matrix(),
    "mlp/down_proj/kernel": Matrix(),
    # Of Qwen 3 with experts, in stacks.
    "mlp/gate_proj": Matrix((1,), (0,)),
    "mlp/up_proj": Matrix((1,), (0,)),
    "mlp/down_proj": Matrix((1,), (0,)),
    # Of Gemma 3: (heads, width, size of a head).
    "attn/q_einsum/w": Matrix((1,)),
    "attn/k_einsum/w": Matrix((1,)),
    "attn/v_einsum/w": Matrix((1,)),
    "attn/attn_vec_einsum/w": Matrix((0, 1)),
}
# What Gemma 3 stacks along the first axis, and the leaves of ``MATRICES`` that it holds.
STACKS = {
    "attn/kv_einsum/w": ("attn/k_einsum/w", "attn/v_einsum/w"),
    "attn/qkv_einsum/w": ("attn/q_einsum/w", "attn/k_einsum/w", "attn/v_einsum/w"),
}
_ROPE = {module: module.apply_rope for module in (llama, qwen)}


def rows_of(path: str) -> tuple[int, ...]:
    """The axes of a leaf that the model contracts over."""
    name = path.split("/", 2)[-1]
    if name in STACKS:
        return (2,)
    return MATRICES[name].rows if name in MATRICES else (0,)


def model(file: pathlib.Path, stated: Stated, *, remat: bool) -> nnx.Module:
    """The family's module without weights.

    Args:
      file: Where the config is from, for messages.
      stated: The config.
      remat: Whether layers are computed again in the backward pass.

    Raises:
      ValueError: If the family is none of these, or states what Tunix does otherwise.
    """
    family = stated.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{file}: model_type {family!r} is not among {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[family](file, stated, remat)
    except KeyError as error:
        raise ValueError(f"{file} has no {error}") from error


def _llama(file: pathlib.Path, stated: Stated, remat: bool) -> nnx.Module:
    _only(file, stated, hidden_act="silu")
    sizes = _sizes(stated) | {"weight_tying": stated.get("tie_word_embeddings", False)}
    return _turned(file, stated, remat, llama, llama.Llama3, sizes)


def _qwen(file: pathlib.Path, stated: Stated, remat: bool, **more: Any) -> nnx.Module:
    _only(file, stated, hidden_act="silu", use_sliding_window=False)
    tied = {"use_tied_embedding": stated.get("tie_word_embeddings", False)}
    sizes = _sizes(stated) | tied | more
    return _turned(file, stated, remat, qwen, qwen.Qwen3, sizes)


def _qwen_moe(file: pathlib.Path, stated: Stated, remat: bool) -> nnx.Module:
    silent = {"norm_topk_prob": False}  # what Transformers takes it for
    read = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    _only(file, silent | stated, **read)
    return _qwen(
        file,
        stated,
        remat,
        hidden_dim=stated["moe_intermediate_size"],
        num_experts=stated.get("num_local_experts") or stated["num_experts"],
        num_experts_per_tok=stated["num_experts_per_tok"],
    )


def _gemma(file: pathlib.Path, stated: Stated, remat: bool) -> nnx.Module:
    _only(
        file,
        stated,
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
        sliding_window_pattern=6,
    )
    sizes = _sizes(stated)
    sizes["num_embed"] = sizes.pop("vocab_size")
    del sizes["norm_eps"]
    kinds = [
        "full_attention" if number % 6 == 0 else "sliding_attention"
        for number in range(1, sizes["num_layers"] + 1)
    ]
    _only(file, stated, layer_types=kinds)
    near, far = _gemma_rope(stated)
    _only(file, near, rope_type="default")
    if far.get("rope_type", "default") not in ("default", "linear"):
        raise ValueError(f"{file}: rope_type {far['rope_type']!r} is not read here")
    norms = gemma.QueryPreAttentionNormalisation
    scalars = {
        sizes["embed_dim"] // sizes["num_heads"]: (
            norms.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        ),
        sizes["head_dim"]: norms.BY_ONE_OVER_SQRT_HEAD_DIM,
    }
    scalar = stated["query_pre_attn_scalar"]
    if scalar not in scalars:
        raise ValueError(
            f"{file}: query_pre_attn_scalar {scalar!r} is not read here, only "
            f"{' or '.join(map(str, scalars))}"
        )
    config = gemma.ModelConfig(
        **sizes,
        sliding_window_size=stated["sliding_window"],
        local_base_frequency=near["rope_theta"],
        global_base_frequency=far["rope_theta"],
        global_scale_factor=far.get("factor") or 1.0,
        query_pre_attn_norm=scalars[scalar],
        remat_config=_policy(gemma, remat),
    )
    return nnx.eval_shape(lambda: gemma.Gemma3(config, rngs=nnx.Rngs(0)))


FAMILIES: dict[str, Callable[[pathlib.Path, Stated, bool], nnx.Module]] = {
    "llama": _llama,
    "qwen3": _qwen,
    "qwen3_moe": _qwen_moe,
    "gemma3_text": _gemma,
}


def _sizes(stated: Stated) -> dict[str, Any]:
    heads = stated["num_attention_heads"]
    return {
        "num_layers": stated["num_hidden_layers"],
        "vocab_size": stated["vocab_size"],
        "embed_dim": stated["hidden_size"],
        "hidden_dim": stated["intermediate_size"],
        "num_heads": heads,
        "head_dim": stated.get("head_dim") or stated["hidden_size"] // heads,
        "num_kv_heads": stated["num_key_value_heads"],
        "norm_eps": stated["rms_norm_eps"],
    }


def _turned(
    file: pathlib.Path,
    stated: Stated,
    remat: bool,
    module: Any,
    make: Callable[..., nnx.Module],
    sizes: dict[str, Any],
) -> nnx.Module:
    """A Llama or Qwen, its heads turned by the base of its config."""
    told = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    kind = told.get("rope_type") or told.get("type") or "default"
    if kind != "default":
        raise ValueError(f"{file}: rope_type {kind!r} is not read here")
    theta = stated.get("rope_theta") or told.get("rope_theta") or 10_000.0
    # Tunix 0.1.7 turns heads by the default of its function, whatever the config says.
    module.apply_rope = functools.partial(_ROPE[module], rope_theta=theta)
    config = module.ModelConfig(
        **sizes, rope_theta=theta, remat_config=_policy(module, remat)
    )
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))


def _gemma_rope(stated: Stated) -> tuple[Stated, Stated]:
    """What turns heads in the layers with a window, and in those without."""
    told = stated.get("rope_parameters")
    if told is not None:
        return told["sliding_attention"], told["full_attention"]
    near = {"rope_theta": stated.get("rope_local_base_freq") or 10_000.0}
    far = {"rope_theta": stated.get("rope_theta") or 1_000_000.0}
    return near, far | (stated.get("rope_scaling") or {})


def _policy(module: Any, remat: bool) -> Any:
    return module.RematConfig.BLOCK if remat else module.RematConfig.NONE


def _only(file: pathlib.Path, stated: Stated, **read: Any) -> None:
    """Refuses a config that states something else than what Tunix's model does."""
    for name, value in read.items():
        if stated.get(name, value) not in (value, None):
            raise ValueError(
                f"{file}: {name} {stated[name]!r} is not read here, only {value!r}"
            )
