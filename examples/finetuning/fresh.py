"""A small decoder that has learnt nothing, as a folder of the hub, and texts for it.

The texts are those that come with Python: its reference, and the code of its library.
"""

from __future__ import annotations

import json
import pathlib
import pydoc_data.topics
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from finetuning import decoder, families, folders
from raclora_jax import flax as rl_flax

VOCABULARY = 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MOST = 2**21  # letters of code


def reference() -> str:
    """The topics of Python's ``help``: its language reference."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def library() -> str:
    """Code of the standard library, module behind module."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts, held = [], 0
    for file in sorted(folder.glob("*.py")):
        parts.append(file.read_text(encoding="utf-8"))
        held += len(parts[-1])
        if held > _MOST:
            break
    return "".join(parts)[:_MOST]


def write(folder: pathlib.Path, texts: list[str], seed: int) -> None:
    """Config, weights at random, and a tokenizer whose pieces are from the texts.

    Args:
      folder: Made; it must not be there.
      texts: What the tokenizer is to be short in.
      seed: Of the weights.
    """
    like, _ = rl_flax.to_tree(families.model(folder / "config.json", CONFIG, remat=False))
    draw = np.random.default_rng(seed)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.ones(leaf.shape)
        name = "/".join(str(key.key) for key in path)
        inputs = np.prod([leaf.shape[axis] for axis in families.rows_of(name)])
        size = 0.02 if name.startswith("embedder") else inputs**-0.5
        return jnp.asarray(size * draw.normal(size=leaf.shape), jnp.float32)

    with folders.whole(folder) as partial:
        decoder.save(partial, jax.tree.map_with_path(one, like))
        (partial / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
        _tokenizer(texts).save(str(partial / "tokenizer.json"))


def _tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Pairs of bytes merged by how often they come; every text can be said."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made
