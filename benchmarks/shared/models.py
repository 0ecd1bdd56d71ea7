"""The models the speed studies train: one interface over linen and nnx.

Every model reads inputs into activations (an embedding, or the image as it is), turns
those into logits, and is trained by cross-entropy. The seam between the two is where
the floor of the studies differentiates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

# The sizes of a decoder or an encoder for a quick look.
TINY = {"width": 64, "layers": 1, "vocab": 256, "sequences": 2, "length": 32}


class Batch(NamedTuple):
    """What one step trains on.

    Attributes:
      inputs: Token ids ``(sequences, length)``, or features.
      targets: int32 labels, one per prediction.
    """

    inputs: Array
    targets: Array


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as pure functions of a plain tree of parameters.

    Args:
      name: What tables call it.
      init: ``init(key) -> params``, nested dicts of arrays.
      apply: ``apply(params, inputs) -> logits``.
      embed: ``embed(params, inputs) -> activations``.
      logits: ``logits(params, activations) -> logits``.
      batch: ``batch(key) -> Batch``.
      source: The linen module, or the function that builds the nnx one.
    """

    name: str
    init: Callable[[Any], Any]
    apply: Callable[[Any, Array], Array]
    embed: Callable[[Any, Array], Array]
    logits: Callable[[Any, Array], Array]
    batch: Callable[[Any], Batch]
    source: Any

    def loss(self, params: Any, batch: Batch) -> Array:
        """Mean cross-entropy."""
        return cross_entropy(self.apply(params, batch.inputs), batch.targets)

    def loss_of_activations(self, activations: Array, params: Any, batch: Batch) -> Array:
        """The same loss, from behind the embedding."""
        return cross_entropy(self.logits(params, activations), batch.targets)

    def shapes(self) -> tuple[Any, Batch]:
        """Abstract params and batch: nothing is allocated."""
        key = jax.random.key(0)
        return jax.eval_shape(self.init, key), jax.eval_shape(self.batch, key)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean over all predictions, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def tokens(vocab: int, sequences: int, length: int) -> Callable[[Any], Batch]:
    """Batches of random text and the token after each."""

    def draw(key: Any) -> Batch:
        text = jax.random.randint(key, (sequences, length + 1), 0, vocab)
        return Batch(text[:, :-1], text[:, 1:])

    return draw


def features(shape: tuple[int, ...], classes: int) -> Callable[[Any], Batch]:
    """Batches of Gaussian features ``(samples, ...)`` and random labels."""

    def draw(key: Any) -> Batch:
        inputs = jax.random.normal(key, shape)
        return Batch(inputs, jax.random.randint(key, shape[:1], 0, classes))

    return draw


# Linen -------------------------------------------------------------------------------


class Embedded(nn.Module):
    """A linen model whose activations are its inputs."""

    def embed(self, inputs: Array) -> Array:
        """The activations behind the inputs."""
        return inputs

    def __call__(self, inputs: Array) -> Array:
        """Logits of the inputs."""
        return self.logits(self.embed(inputs))


class Block(nn.Module):
    """Pre-norm attention and MLP without biases."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        same = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.dtype}
        y = nn.LayerNorm(**same)(x)
        causal = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(self.heads, **same)(y, mask=causal)
        y = nn.LayerNorm(**same)(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], **same)(y))
        return x + nn.Dense(x.shape[-1], **same)(y), None


class LlamaBlock(nn.Module):
    """Llama's block: RMS norms, rotated grouped-query attention, gated MLP."""

    heads: int
    kv_heads: int
    hidden: int
    dtype: Any = jnp.bfloat16
    attention: str = "xla"

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        width, size = x.shape[-1], x.shape[-1] // self.heads
        own = {"dtype": self.dtype, "param_dtype": self.dtype}
        dense = functools.partial(nn.DenseGeneral, use_bias=False, **own)
        y = nn.RMSNorm(**own)(x)
        query = rotated(dense((self.heads, size), name="query")(y))
        key = rotated(dense((self.kv_heads, size), name="key")(y))
        value = dense((self.kv_heads, size), name="value")(y)
        y = jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.attention
        )
        x = x + dense(width, axis=(-2, -1), name="out")(y)
        y = nn.RMSNorm(**own)(x)
        y = nn.silu(dense(self.hidden, name="gate")(y)) * dense(self.hidden, name="up")(y)
        return x + dense(width, name="down")(y), None


def rotated(x: Array) -> Array:
    """Rotary positions on ``(sequences, length, heads, size)``."""
    length, size = x.shape[1], x.shape[3]
    rates = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(length)[:, None, None] * rates
    real, imaginary = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    turned = real * cos - imaginary * sin, real * sin + imaginary * cos
    return jnp.concatenate(turned, axis=-1)


class Decoder(Embedded):
    """Embedding, blocks one by one or scanned, final norm, head."""

    vocab: int
    width: int
    layers: int
    block: Callable[..., nn.Module]
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Makes the layers."""
        same = {"dtype": self.dtype, "param_dtype": self.dtype}
        self.embedding = nn.Embed(self.vocab, self.width, **same)
        kind, options = self.block.func, self.block.keywords
        kind = nn.remat(kind, prevent_cse=not self.scan) if self.remat else kind
        if self.scan:
            kind = nn.scan(
                kind,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            self.blocks = kind(**options)
        else:
            self.blocks = [kind(**options) for _ in range(self.layers)]
        self.norm = nn.RMSNorm(**same)
        self.head = nn.Dense(self.vocab, use_bias=False, **same)

    def embed(self, inputs: Array) -> Array:
        """Token ids to vectors."""
        return self.embedding(inputs)

    def logits(self, x: Array) -> Array:
        """Vectors to scores of the next token."""
        for block in [self.blocks] if self.scan else self.blocks:
            x, _ = block(x, None)
        return self.head(self.norm(x))


class ConvNet(Embedded):
    """3 x 3 convolutions with group norms, the width doubling at every stride."""

    width: int
    stages: int
    classes: int

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Images, NHWC, to scores of the classes."""
        for stage in range(self.stages):
            for stride in (2 if stage else 1, 1):
                x = nn.Conv(self.width << stage, (3, 3), stride, use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(8)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


class MLP(Embedded):
    """Hidden layers of one width with biases and ReLUs."""

    width: int
    layers: int
    classes: int

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Features to scores of the classes."""
        for _ in range(self.layers - 1):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.classes)(x)


def linen(
    name: str,
    module: nn.Module,
    batch: Callable[[Any], Batch],
    under: Callable[[], Any] = contextlib.nullcontext,
) -> Model:
    """A linen module as a ``Model``; ``under`` is a context that its calls run in."""

    def apply(params: Any, x: Array, method: str = "__call__") -> Array:
        with under():
            return module.apply({"params": params}, x, method=method)

    def init(key: Any) -> Any:
        with under():
            return module.init(key, batch(key).inputs)["params"]

    embed, logits = (functools.partial(apply, method=m) for m in ("embed", "logits"))
    return Model(name, init, apply, embed, logits, batch, module)


# NNX ---------------------------------------------------------------------------------


class EncoderBlock(nnx.Module):
    """Pre-norm attention and MLP with biases."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, keep_rngs=False, rngs=rngs
        )
        self.before_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.before_attention(x))
        return x + self.down(nnx.gelu(self.up(self.before_mlp(x))))


class Encoder(nnx.Module):
    """Embedding, blocks, final norm, a score per token."""

    def __init__(
        self, vocab: int, width: int, layers: int, heads: int, *, rngs: nnx.Rngs
    ):
        self.embedding = nnx.Embed(vocab, width, rngs=rngs)
        blocks = [EncoderBlock(width, heads, rngs=rngs) for _ in range(layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, rngs=rngs)

    def embed(self, inputs: Array) -> Array:
        """Token ids to vectors."""
        return self.embedding(inputs)

    def logits(self, x: Array) -> Array:
        """Vectors to scores of the vocabulary."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def __call__(self, inputs: Array) -> Array:
        return self.logits(self.embed(inputs))


def of_nnx(
    name: str, build: Callable[[nnx.Rngs], nnx.Module], batch: Callable[[Any], Batch]
) -> Model:
    """An nnx module as a ``Model``: its parameters a pure dict, rebuilt in each call."""
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, _, rest = nnx.split(abstract, nnx.Param, ...)

    def init(key: Any) -> Any:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: Any, x: Array, method: str = "__call__") -> Array:
        module = nnx.merge(graph, nnx.State(params), rest)
        return getattr(module, method)(x)

    embed, logits = (functools.partial(apply, method=m) for m in ("embed", "logits"))
    return Model(name, init, apply, embed, logits, batch, build)


# The models, by size -----------------------------------------------------------------


def decoder(
    *,
    width: int = 512,
    layers: int = 4,
    vocab: int = 4096,
    sequences: int = 4,
    length: int = 256,
    scan: bool = False,
    remat: bool = False,
) -> Model:
    """A decoder with heads of 64."""
    block = functools.partial(Block, heads=max(1, width // 64))
    module = Decoder(vocab, width, layers, block, scan, remat)
    name = f"decoder {layers}x{width}" + ", scan" * scan + ", remat" * remat
    return linen(name, module, tokens(vocab, sequences, length))


def llama(
    *,
    width: int = 2048,
    layers: int = 22,
    heads: int = 32,
    kv_heads: int = 4,
    hidden: int = 5632,
    vocab: int = 32_000,
    sequences: int = 8,
    length: int = 2048,
    scan: bool = True,
    remat: bool = True,
    dtype: Any = jnp.bfloat16,
    attention: str = "xla",
) -> Model:
    """A Llama of 1.1 billion weights, unless told otherwise."""
    block = functools.partial(
        LlamaBlock,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        dtype=dtype,
        attention=attention,
    )
    module = Decoder(vocab, width, layers, block, scan, remat, dtype)
    name = f"llama {layers}x{width}" + ", scan" * scan + ", remat" * remat
    return linen(name, module, tokens(vocab, sequences, length))


def encoder(
    *,
    width: int = 512,
    layers: int = 4,
    vocab: int = 4096,
    sequences: int = 4,
    length: int = 256,
) -> Model:
    """An nnx encoder with heads of 64."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return Encoder(vocab, width, layers, max(1, width // 64), rngs=rngs)

    batch = tokens(vocab, sequences, length)
    return of_nnx(f"nnx encoder {layers}x{width}", build, batch)


def conv_net(
    *, width: int = 64, stages: int = 3, side: int = 32, samples: int = 32
) -> Model:
    """A network of twice as many convolutions as stages."""
    batch = features((samples, side, side, 3), 10)
    return linen(f"conv net {2 * stages}x{width}", ConvNet(width, stages, 10), batch)


def mlp(*, width: int = 1024, layers: int = 4, samples: int = 1024) -> Model:
    """A multi-layer perceptron."""
    module = MLP(width, layers, 10)
    return linen(f"MLP {layers}x{width}", module, features((samples, width), 10))
