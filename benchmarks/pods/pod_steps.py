"""Sharded training steps of Llama shapes, as the pod study compiles them.

Plain functions over a tree of stacked leaves: a scan over layers, rematerialised in full,
bfloat16, causal attention in chunks of queries. Weights are split over ``fsdp`` on the
axis of the residual stream, and over ``tp`` on heads, hidden units and vocabulary; the
batch is split over ``fsdp``. Every method adapts each matrix and the embedding and trains
the norms in full, but for the floor, which freezes all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

import raclora_jax as rl
from benchmarks.shared import models, rivals
from benchmarks.shared.models import Batch, Model
from benchmarks.shared.rivals import Method

RANK = 16
CHUNK = 512  # queries at a time: scores of a whole sequence would fill the memory
LARGE = 100_000  # from this vocabulary on the loss too takes so many tokens at a time


class Sizes(NamedTuple):
    """The sizes of a Llama."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int = 32_000


LLAMA = {
    "7B": Sizes(4096, 32, 32, 32, 11_008),
    "13B": Sizes(5120, 40, 40, 40, 13_824),
    "70B": Sizes(8192, 80, 64, 8, 28_672),
    "8B": Sizes(4096, 32, 32, 8, 14_336, 128_256),
    "tiny": Sizes(512, 2, 4, 4, 1024, 2048),
    "tiny, large vocabulary": Sizes(64, 2, 4, 4, 128, LARGE),
}

# The axes of the matrices of a layer, rows first, and the mesh axes that split these.
_LAYER = {
    "query": ("width", "heads", "size"),
    "key": ("width", "kv_heads", "size"),
    "value": ("width", "kv_heads", "size"),
    "out": ("heads", "size", "width"),
    "gate": ("width", "hidden"),
    "up": ("width", "hidden"),
    "down": ("hidden", "width"),
}
_AROUND = {"embedding": ("vocab", "width"), "head": ("width", "vocab")}
_ROW_AXES = {"out": 2}  # of the others the first axis is the row
_SPLIT = {
    "width": "fsdp",
    "heads": "tp",
    "kv_heads": "tp",
    "hidden": "tp",
    "vocab": "tp",
    "size": None,
    "layers": None,
    "rank": None,
}


class Pair(NamedTuple):
    """A frozen matrix and the LoRA factors beside it.

    Attributes:
      weight: ``(*rows, *cols)``.
      down: ``(*rows, rank)``.
      up: ``(rank, *cols)``.
    """

    weight: Array
    down: Array
    up: Array


# The model ---------------------------------------------------------------------------


def llama(sizes: Sizes, sequences: int, length: int, mesh: Any) -> Model:
    """The model; its parameters are ``{"embedding", "layers", "norm", "head"}``."""
    split = functools.partial(_constrain, mesh)

    def init(key: Any) -> Any:
        def normal(index: int, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.bfloat16)

        layer = {
            name: normal(i, (sizes.layers, *_shape(axes, sizes)))
            for i, (name, axes) in enumerate(_LAYER.items())
        }
        ones = jnp.ones((sizes.layers, sizes.width), jnp.bfloat16)
        layer |= {"before_attention": ones, "before_mlp": ones}
        around = {
            name: normal(len(_LAYER) + i, _shape(axes, sizes))
            for i, (name, axes) in enumerate(_AROUND.items())
        }
        return {**around, "layers": layer, "norm": ones[0]}

    def embed(params: Any, tokens: Array) -> Array:
        return split(_looked_up(params["embedding"], tokens), "fsdp", None, None)

    def through(params: Any, x: Array) -> Array:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x: Array, own: Any) -> tuple[Array, None]:
            return split(_layer(x, own, split), "fsdp", None, None), None

        x, _ = lax.scan(layer, x, params["layers"])
        return _rms(x, params["norm"])

    def read(params: Any, x: Array) -> Array:
        return split(_product(x, params["head"]), "fsdp", None, "tp")

    def logits(params: Any, x: Array) -> Array:
        return read(params, through(params, x))

    def apply(params: Any, tokens: Array) -> Array:
        return logits(params, embed(params, tokens))

    name = f"llama {sizes.layers}x{sizes.width}"
    batch = models.tokens(sizes.vocab, sequences, length)
    if sizes.vocab < LARGE:
        return Model(name, init, apply, embed, logits, batch, None)
    return _InChunks(name, init, apply, embed, logits, batch, None, through, read)


@dataclasses.dataclass(frozen=True)
class _InChunks(Model):
    """A model whose logits never stand for all tokens at once.

    Args:
      through: ``through(params, activations)``, up to the head.
      read: ``read(params, activations) -> logits``, the head.
    """

    through: Callable[[Any, Array], Array]
    read: Callable[[Any, Array], Array]

    def loss(self, params: Any, batch: Batch) -> Array:
        """Mean cross-entropy."""
        return self.loss_of_activations(self.embed(params, batch.inputs), params, batch)

    def loss_of_activations(self, activations: Array, params: Any, batch: Batch) -> Array:
        """The same loss, from behind the embedding."""

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            x, targets = part
            return total + models.cross_entropy(self.read(params, x), targets), None

        x = self.through(params, activations)
        chunks = x.shape[1] // min(CHUNK, x.shape[1])
        parts = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0),
            (x, batch.targets),
        )
        total, _ = lax.scan(one, jnp.zeros(()), parts)
        return total / chunks


def _layer(x: Array, own: Any, split: Callable[..., Array]) -> Array:
    y = _rms(x, own["before_attention"])
    query, key, value = (
        split(_product(y, own[name]), "fsdp", None, "tp", None)
        for name in ("query", "key", "value")
    )
    mixed = _attention(models.rotated(query), models.rotated(key), value)
    mixed = split(mixed, "fsdp", None, "tp", None)
    x = x + _product(mixed, own["out"], axes=2)
    y = _rms(x, own["before_mlp"])
    gate, up = (split(_product(y, own[n]), "fsdp", None, "tp") for n in ("gate", "up"))
    return x + _product(jax.nn.silu(gate) * up, own["down"])


def _product(x: Array, matrix: Array | Pair, axes: int = 1) -> Array:
    if isinstance(matrix, Pair):
        down, up = matrix.down.astype(x.dtype), matrix.up.astype(x.dtype)
        beside = jnp.tensordot(jnp.tensordot(x, down, axes), up, 1)
        return jnp.tensordot(x, matrix.weight, axes) + beside
    return jnp.tensordot(x, matrix, axes)


def _looked_up(table: Array | Pair, tokens: Array) -> Array:
    if isinstance(table, Pair):
        hidden = jnp.take(table.down, tokens, axis=0).astype(table.weight.dtype)
        beside = jnp.tensordot(hidden, table.up.astype(hidden.dtype), 1)
        return jnp.take(table.weight, tokens, axis=0) + beside
    return jnp.take(table, tokens, axis=0)


def _attention(query: Array, key: Array, value: Array) -> Array:
    """Causal attention, a chunk of queries at a time, each rematerialised."""
    sequences, length, heads, size = query.shape
    chunk, groups = min(CHUNK, length), key.shape[2]
    # (chunks, sequences, chunk, groups, heads of a group, size)
    shape = (sequences, length // chunk, chunk, groups, heads // groups, size)
    chunks = jnp.moveaxis(query.reshape(shape), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(start: Array, query: Array) -> tuple[Array, Array]:
        scores = jnp.einsum("bqghs,bkgs->bghqk", query, key) / math.sqrt(size)
        places = start + jnp.arange(chunk)
        seen = places[:, None] >= jnp.arange(length)
        scores = jnp.where(seen, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return start + chunk, jnp.einsum("bghqk,bkgs->bqghs", weights, value)

    _, mixed = lax.scan(one, jnp.zeros((), jnp.int32), chunks)
    return jnp.moveaxis(mixed, 0, 1).reshape(query.shape)


def _rms(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def _shape(axes: tuple[str, ...], sizes: Sizes) -> tuple[int, ...]:
    known = sizes._asdict() | {"size": sizes.width // sizes.heads, "rank": RANK}
    return tuple(known[axis] for axis in axes)


# Where arrays live -------------------------------------------------------------------


def _constrain(mesh: Any, x: Array, *axes: str | None) -> Array:
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def placed(state: Any, sizes: Sizes, mesh: Any) -> Any:
    """The abstract arrays of a state, each where a run would keep it.

    Moments lie as their weights do; a factor or a sketch as the side of the weight that
    it has, and what FSDP would split of the side that it has not, another axis takes if
    it divides. Everything else is small, and on every device.
    """
    homes = _homes(sizes, mesh)

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = keys[-1].rpartition("/")[2] if keys else ""
        home = homes.get(name, {}).get(leaf.shape, PartitionSpec())
        sharding = NamedSharding(mesh, home)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, state)


def _homes(sizes: Sizes, mesh: Any) -> dict[str, dict[tuple[int, ...], PartitionSpec]]:
    """``{leaf: {shape: axes}}``: of the weight itself, and of what has one side of it."""
    homes: dict[str, dict[tuple[int, ...], PartitionSpec]] = {}
    for name, axes in (_LAYER | _AROUND).items():
        cut, stacked = _ROW_AXES.get(name, 1), name in _LAYER
        rank, stack = (("rank",), ("layers",) * stacked)
        homes[name] = {}
        for side in (
            axes,
            (*axes[:cut], *rank),
            (*rank, *axes[:cut]),
            (*rank, *axes[cut:]),
        ):
            shape = _shape((*stack, *side), sizes)
            homes[name][shape] = _spread((*stack, *side), shape, mesh)
    return homes


def _spread(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The mesh axes of an array, with FSDP on an axis of the model that it divides."""
    split = [(_SPLIT[axis],) if _SPLIT[axis] else () for axis in axes]
    if ("fsdp",) not in split:
        size = mesh.shape["fsdp"]
        parts = [size * math.prod(mesh.shape[name] for name in names) for names in split]
        fits = [
            at
            for at, axis in enumerate(axes)
            if axis not in ("layers", "rank") and shape[at] % parts[at] == 0
        ]
        if fits:
            longest = max(fits, key=lambda at: shape[at])
            split[longest] += ("fsdp",)
    return PartitionSpec(*(names or None for names in split))


def gathered_shapes(sizes: Sizes, tensor: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of a layer and around, as a device has them to multiply."""

    def local(axes: tuple[str, ...]) -> tuple[int, ...]:
        parts = [tensor if _SPLIT[axis] == "tp" else 1 for axis in axes]
        return tuple(n // k for n, k in zip(_shape(axes, sizes), parts, strict=True))

    return {name: local(axes) for name, axes in (_LAYER | _AROUND).items()}


# The methods -------------------------------------------------------------------------


def floor(model: Model) -> Method:
    """All weights frozen: the gradient of one vector, added to every embedding.

    Nothing of the way back can be dropped, and hardly anything is kept for it: no
    method that trains through the network holds, computes or sends less.
    """

    def loss(vector: Array, params: Any, batch: Batch) -> Array:
        hidden = model.embed(params, batch.inputs) + vector
        return model.loss_of_activations(hidden, params, batch)

    def init(key: Any) -> tuple[Any, Array]:
        params = model.init(key)
        return params, jnp.zeros_like(params["norm"])

    def step(state: tuple[Any, Array], batch: Batch) -> tuple[tuple[Any, Array], Array]:
        params, vector = state
        value, vector = jax.value_and_grad(loss)(vector, params, batch)
        return (params, vector), value

    return Method("floor", init, step, optimizer=lambda state: ())


def adamw(model: Model) -> Method:
    """Full fine-tuning of bfloat16 weights with float32 moments."""
    tx = optax.adamw(rivals.RATE)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(wide(grads), state, params)
        return updates, state

    rule = optax.GradientTransformation(lambda params: tx.init(wide(params)), update)
    return rivals.trained_by("AdamW", model, rule)


def lora(model: Model) -> Method:
    """Two factors beside each frozen matrix, float32, under Adam; norms in full."""
    tx = optax.adam(rivals.RATE)

    def split(params: Any, stack: int) -> tuple[Any, Any]:
        """What is frozen, and what is trained: pairs, and the norms themselves."""
        frozen = {name: params[name] for name in params if name in _LAYER | _AROUND}
        trained = {}
        for name in params.keys() - {"layers"}:
            cut = stack + _ROW_AXES.get(name, 1)
            shape = params[name].shape
            sides = (*shape[:cut], RANK), (*shape[:stack], RANK, *shape[cut:])
            pair = tuple(jnp.zeros(side, jnp.float32) for side in sides)
            trained[name] = pair if name in frozen else params[name]
        return frozen, trained

    def init(key: Any) -> tuple[Any, Any, Any]:
        params = model.init(key)
        (frozen, trained), (inner, pairs) = split(params, 0), split(params["layers"], 1)
        trained |= {"layers": pairs}
        return frozen | {"layers": inner}, trained, tx.init(trained)

    def paired(frozen: Any, trained: Any) -> Any:
        return {
            name: paired(frozen[name], one)
            if isinstance(one, dict)
            else Pair(frozen[name], *one)
            if name in frozen
            else one
            for name, one in trained.items()
        }

    def step(state: Any, batch: Batch) -> tuple[Any, Array]:
        frozen, trained, opt_state = state

        def loss(trained: Any) -> Array:
            return model.loss(paired(frozen, trained), batch)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, opt_state)
        return (frozen, optax.apply_updates(trained, updates), opt_state), value

    return Method("LoRA", init, step)


def stateless(parts: int) -> dict[str, Any]:
    """The options of a rule without state on one part of the rows, or on all of them."""
    options = {"side": "left", "sketch": "block", "inner": rl.orthogonal()}
    if parts == 1:
        return options | {"rules": [rl.Rule(".*", mode="full")]}
    return options | {"alpha": "dim"}


def _by_parts(form: str, make: Callable[..., Method]) -> dict[str, Any]:
    """A form of ours for each share of the rows that one step moves."""

    def method(parts: int) -> Callable[[Model, int], Method]:
        return lambda model, width: make(
            model, rank=width // max(parts, 2), **stateless(parts)
        )

    names = {1: "whole"} | {parts: f"dim / {parts}" for parts in (4, 8, 16)}
    return {f"{form}, {name}": method(parts) for parts, name in names.items()}


def _beside_fsdp(model: Model, width: int, low_gradients: bool = False) -> Method:
    """Blocks of dim / 8 of the side that FSDP does not split, so that adding is local."""
    sizes = jax.eval_shape(model.init, jax.random.key(0))["layers"]
    columns = {
        name: math.prod(sizes[name].shape[2:])
        for name in ("query", "key", "value", "gate", "up")
    }
    rules = [
        rl.Rule(f"layers/{name}", side="right", rank=count // 8)
        for name, count in columns.items()
    ]
    return rivals.fused(
        model,
        rank=width // 8,
        rules=rules,
        low_gradients=low_gradients,
        **stateless(8),
    )


METHODS: dict[str, Callable[[Model, int], Method]] = {
    "floor": lambda model, width: floor(model),
    "AdamW": lambda model, width: adamw(model),
    "LoRA": lambda model, width: lora(model),
    "ours, left": lambda model, width: rivals.ours(model, rank=RANK, side="left"),
    "ours, smaller": lambda model, width: rivals.ours(model, rank=RANK, side="smaller"),
    "ours, dense form": lambda model, width: rivals.dense_form(
        model, rank=RANK, side="left"
    ),
    "block, dim / 8": lambda model, width: rivals.ours(
        model,
        rank=width // 8,
        side="left",
        sketch="block",
        alpha="dim",
        inner=rl.orthogonal(),
    ),
    "fused, dim / 8": _by_parts("fused", rivals.fused)["fused, dim / 8"],
    "fused, dim / 8 beside FSDP": _beside_fsdp,
    "fused, dim / 8 beside FSDP, 16-bit gradients": functools.partial(
        _beside_fsdp, low_gradients=True
    ),
}
# On one chip, for which the memory is the question.
ONE_CHIP: dict[str, Callable[[Model, int], Method]] = {
    "floor": METHODS["floor"],
    "AdamW": METHODS["AdamW"],
    "LoRA": METHODS["LoRA"],
    "ours, left": METHODS["ours, left"],
    "fused, Adam, left": lambda model, width: rivals.fused(
        model, rank=RANK, side="left", inner=optax.scale_by_adam()
    ),
    **_by_parts("block", rivals.ours),
    **_by_parts("fused", rivals.fused),
    "fused, dim / 4, 16-bit gradients": _by_parts(
        "fused", functools.partial(rivals.fused, low_gradients=True)
    )["fused, dim / 4"],
}
