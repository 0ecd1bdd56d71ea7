"""What trainer and sampler share: a model of letters, its base, and the wire."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import raclora_jax as rl

KEY = 7
CONTEXT = 8
TEXT = (
    "a sketch is drawn and a factor is trained. the factor is lifted on the sketch and "
    "added to the weights. then another sketch is drawn. the weights move in full rank, "
    "and a message of a step is a seed and a few numbers. who holds the base and the "
    "messages holds the weights, to the bit. "
)
LETTERS = sorted(set(TEXT))
CODES = np.array([LETTERS.index(letter) for letter in TEXT])


def base_params():
    """The weights that trainer and sampler begin with; of a real run, its base model."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {
        "letters": (len(LETTERS), 16),
        "hidden": (CONTEXT * 16, 96),
        "out": (96, len(LETTERS)),
    }
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params |= {"bias": jnp.zeros(96)}
    return {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}


def logits(params, codes):
    wide = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
    x = wide["letters"][codes].reshape(*codes.shape[:-1], -1)
    return jnp.tanh(x @ wide["hidden"] + wide["bias"]) @ wide["out"]


def answer(params, prompt, count=40):
    """The likeliest letters after a prompt."""
    codes = [LETTERS.index(letter) for letter in prompt.rjust(CONTEXT) if letter in TEXT]
    for _ in range(count):
        codes.append(int(jnp.argmax(_logits(params, jnp.array(codes[-CONTEXT:])))))
    return "".join(LETTERS[code] for code in codes[-count:])


_logits = jax.jit(logits)


def digest(params):
    """A number that tells the bits of the weights."""
    leaves = jax.tree.leaves(jax.device_get(params))
    return f"{zlib.crc32(b''.join(leaf.tobytes() for leaf in leaves)):08x}"


def to_wire(position):
    """A position as bytes; messages are bytes already, so that nothing is pickled."""
    return json.dumps(position).encode()


def from_wire(raw):
    return rl.follow.Position(*json.loads(raw))
