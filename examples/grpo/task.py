"""What trainer and sampler share: a small Llama, prompts with a reward, and the wire."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl.rollout.base_rollout import RolloutConfig

import raclora_jax as rl
from raclora_jax import flax as rl_flax

KEY = 7
LETTERS = "abcdefgh"
CONFIG = llama.ModelConfig(
    num_layers=2,
    vocab_size=16,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)
SPEC = rl.Spec(
    16,
    sketch="block",
    alpha="dim",
    resample_every=1,  # a link of one step: its message is the rows that changed
    rules=[
        rl.Rule(".*o_proj/w", rows=(0, 1)),
        rl.Rule(".*(proj/w|kernel)", rows=(0,)),
        rl.Rule(".*", mode="frozen"),
    ],
)
SAMPLING = RolloutConfig(
    max_tokens_to_generate=4, max_prompt_length=4, kv_cache_size=8, temperature=1.0
)


class Tokens:
    """One token for each letter, as Tunix asks for it."""

    def encode(self, text):
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[one - 3] for one in ids if 3 <= one < 3 + len(LETTERS))

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


def base():
    """The model that both begin with; of a real run, one that can do something."""
    tree, restore = rl_flax.to_tree(llama.Llama3(CONFIG, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)

    def drawn(leaf):
        if leaf.ndim < 2:
            return leaf
        return jnp.array(draw.normal(size=leaf.shape) / CONFIG.embed_dim**0.5, "f4")

    return restore(jax.tree.map(drawn, tree))


def prompts(step):
    """The same for a step whenever it is asked for."""
    return list(np.random.default_rng(step).choice([*LETTERS], 8))


def reward(prompts, completions, **_):
    """How much of an answer is the letter of its prompt."""
    pairs = zip(prompts, completions, strict=True)
    return [said.count(prompt) / 4 for prompt, said in pairs]


def digest(model):
    """A number that tells the bits of the weights."""
    leaves = jax.tree.leaves(jax.device_get(rl_flax.to_tree(model)[0]))
    return f"{zlib.crc32(b''.join(leaf.tobytes() for leaf in leaves)):08x}"


def to_wire(what):
    """Plain data as bytes; messages are bytes already, so that nothing is pickled."""
    return json.dumps(what).encode()


def from_wire(raw):
    return json.loads(raw)
