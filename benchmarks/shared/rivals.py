"""Whole training steps of every method the speed studies compare.

All train the same model at the same rank. Adapted methods adapt every kernel and
embedding and train biases and norms in full; the floor freezes everything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import raclora_jax as rl
from benchmarks.shared import models
from benchmarks.shared.models import Batch, Model
from raclora_jax import methods

RANK = 8
RATE = 1e-4
# Names of the leaves that enter a matmul, a convolution or a gather.
_WEIGHTS = ("kernel", "embedding")
_LINEAR = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed)
_NNX_LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Embed)


class Method(NamedTuple):
    """One way to train a model.

    Attributes:
      name: What tables call it.
      init: ``init(key) -> state``.
      step: ``step(state, batch) -> (state, loss)``; the state may be donated.
      optimizer: ``optimizer(state)``, the part of it that is optimizer state.
    """

    name: str
    init: Callable[[Any], Any]
    step: Callable[[Any, Batch], tuple[Any, Array]]
    optimizer: Callable[[Any], Any] = lambda state: state[-1]


def floor(model: Model) -> Method:
    """Loss and gradient of the activations, all weights frozen.

    The gradient is the step's only product, so nothing of the way back can be dropped.
    """

    def init(key: Any) -> tuple[Any, Array]:
        params = model.init(key)
        return params, jnp.zeros_like(model.embed(params, model.batch(key).inputs))

    def step(state: tuple[Any, Array], batch: Batch) -> tuple[tuple[Any, Array], Array]:
        params, _ = state
        activations = model.embed(params, batch.inputs)
        gradient = jax.value_and_grad(model.loss_of_activations)
        loss, grads = gradient(activations, params, batch)
        return (params, grads), loss

    return Method("floor", init, step, optimizer=lambda state: ())


def trained_by(name: str, model: Model, tx: optax.GradientTransformation) -> Method:
    """Dense gradients, any optax transformation, dense updates."""

    def init(key: Any) -> tuple[Any, Any]:
        params = model.init(key)
        return params, tx.init(params)

    def step(state: tuple[Any, Any], batch: Batch) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(model.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return Method(name, init, step)


def adamw(model: Model) -> Method:
    """Full fine-tuning."""
    return trained_by("full AdamW", model, optax.adamw(RATE))


def spec_of(model: Model, **options: Any) -> rl.Spec:
    """The spec of a model, its views read off the model; a link as in all our rows."""
    fields = {"rank": RANK, "resample_every": 25, **options}
    return rl.trace_spec(model.loss, *model.shapes(), **fields)


def ours(
    model: Model,
    name: str = "ours",
    *,
    inner: optax.GradientTransformation | None = None,
    **options: Any,
) -> Method:
    """RAC-LoRA with gradients in factor form; ``options`` are fields of the spec."""
    spec = spec_of(model, **options)
    tx = optax.chain(rl.raclora(RATE, spec, inner=inner, key=0))
    grad_fn = rl.value_and_grad(model.loss, spec)

    def init(key: Any) -> tuple[Any, Any]:
        params = model.init(key)
        return params, tx.init(params)

    def step(state: tuple[Any, Any], batch: Batch) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = state
        loss, grads = grad_fn(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (rl.apply_updates(params, updates), opt_state), loss

    return Method(name, init, step)


def fused(
    model: Model,
    name: str = "fused",
    *,
    inner: Any,
    low_gradients: bool = False,
    **options: Any,
) -> Method:
    """RAC-LoRA that updates the weights inside the backward pass."""
    tx = rl.raclora(RATE, spec_of(model, **options), inner=inner, key=0)
    one = rl.fused_step(model.loss, tx, low_gradients=low_gradients)

    def init(key: Any) -> tuple[Any, Any]:
        params = model.init(key)
        return params, tx.init(params)

    def step(state: tuple[Any, Any], batch: Batch) -> tuple[tuple[Any, Any], Array]:
        params, opt_state, loss = one(*state, batch)
        return (params, opt_state), loss

    return Method(name, init, step)


def dense_form(model: Model, **options: Any) -> Method:
    """RAC-LoRA with plain dense gradients, projected."""
    tx = rl.raclora(RATE, spec_of(model, **options), key=0)
    return trained_by("ours, dense form", model, tx)


def galore(model: Model) -> Method:
    """GaLore of optax, on the leaves with two axes."""
    tx = optax.contrib.galore(RATE, rank=RANK)
    return trained_by("GaLore", model, tx)


def merged_lora(model: Model) -> Method:
    """Two-factor LoRA that adds the pair to the weights before the model runs."""
    pair = methods.lora(RATE, spec_of(model), key=0)

    def step(state: Any, batch: Batch) -> tuple[Any, Array]:
        return pair.step(state, model.loss, batch)

    def init(key: Any) -> Any:
        return pair.init(model.init(key))

    return Method("LoRA, merged", init, step, optimizer=lambda state: state.inner)


def adapter(name: str, model: Model) -> Method:
    """Trains the leaves beside the weights of a model that holds its LoRA pairs."""
    tx = optax.adam(RATE)

    def init(key: Any) -> tuple[Any, Any, Any]:
        leaves = flatten_dict(model.init(key))
        frozen = {path: leaf for path, leaf in leaves.items() if path[-1] in _WEIGHTS}
        trained = {path: leaf for path, leaf in leaves.items() if path not in frozen}
        return frozen, trained, tx.init(trained)

    def step(state: Any, batch: Batch) -> tuple[Any, Array]:
        frozen, trained, opt_state = state

        def loss(trained: Any) -> Array:
            return model.loss(unflatten_dict({**frozen, **trained}), batch)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, opt_state)
        return (frozen, optax.apply_updates(trained, updates), opt_state), value

    return Method(name, init, step)


def lora(model: Model, layout: str = "rank first", rank: int = RANK) -> Method:
    """Two-factor LoRA, ``x W + (x down) up``, the pairs beside the frozen weights."""
    pairs = Pairs(rank, layout == "rank first")
    if isinstance(model.source, nn.Module):
        under = functools.partial(nn.intercept_methods, pairs.beside_linen)
        paired = models.linen(model.name, model.source, model.batch, under)
    else:

        def build(rngs: nnx.Rngs) -> nnx.Module:
            module = model.source(rngs)
            pairs.beside_nnx(module, rngs)
            return module

        paired = models.of_nnx(model.name, build, model.batch)
    return adapter(f"LoRA, {layout}", paired)


def qwix_lora(model: Model) -> Method:
    """LoRA as qwix injects it, on a float base; it does not adapt embeddings."""
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=float(RANK))
    if isinstance(model.source, nn.Module):
        module = qwix.apply_lora_to_model(model.source, provider)
        return adapter("qwix LoRA", models.linen(model.name, module, model.batch))
    inputs = model.batch(jax.random.key(0)).inputs

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return qwix.apply_lora_to_model(model.source(rngs), provider, inputs, rngs=rngs)

    return adapter("qwix LoRA", models.of_nnx(model.name, build, model.batch))


# LoRA pairs --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Adds ``(x down) up`` to the output of every linear layer of a model.

    ``up`` is ``(rank, *columns)``; factors are float32 and used in the dtype of x.

    Args:
      rank: Rank of the pairs.
      rank_first: Whether ``down`` is ``(rank, *rows)`` or ``(*rows, rank)``.
    """

    rank: int
    rank_first: bool

    def shapes(self, layer: Any, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of both factors beside a kernel."""
        cut = len(kernel) - 1 if _is_conv(layer) else _contracted(layer)
        rows, columns = kernel[:cut], kernel[cut:]
        down = (self.rank, *rows) if self.rank_first else (*rows, self.rank)
        return {"down": down, "up": (self.rank, *columns)}

    def delta(self, layer: Any, x: Array, y: Array, down: Array, up: Array) -> Array:
        """What the pair adds to the output y of a layer that read x."""
        down, up = down.astype(y.dtype), up.astype(y.dtype)
        if isinstance(layer, nn.Embed | nnx.Embed):
            axis = 0 if self.rank_first else -1
            hidden = jnp.take(down, x, axis=1 if self.rank_first else 0)
            return jnp.tensordot(hidden, up, (axis, 0))
        if _is_conv(layer):
            return jnp.tensordot(self._convolved(layer, x, down), up, 1)
        count = _contracted(layer)
        last = tuple(range(x.ndim - count, x.ndim))
        against = tuple(range(self.rank_first, self.rank_first + count))
        return jnp.tensordot(jnp.tensordot(x, down, (last, against)), up, 1)

    def _convolved(self, layer: Any, x: Array, down: Array) -> Array:
        strides = np.broadcast_to(1 if layer.strides is None else layer.strides, 2)
        kernel = "OHWI" if self.rank_first else "HWIO"
        return jax.lax.conv_general_dilated(
            x, down, strides, layer.padding, dimension_numbers=("NHWC", kernel, "NHWC")
        )

    def beside_linen(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """The interceptor for ``nn.intercept_methods``."""
        y, layer = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(layer, _LINEAR):
            return y
        weights = layer.variables["params"]
        kernel = next(weights[name].shape for name in _WEIGHTS if name in weights)
        shapes = self.shapes(layer, kernel)
        scope = layer.scope  # nn.Embed is not compact, so its own param() would refuse
        pair = {name: scope.param(name, _normal, shapes[name]) for name in shapes}
        return y + self.delta(layer, args[0], y, **pair)

    def beside_nnx(self, module: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts a layer with a pair in the place of every linear layer inside."""
        for name, child in list(nnx.iter_children(module)):
            if isinstance(child, _NNX_LINEAR):
                setattr(module, name, Paired(child, self, rngs))
            elif isinstance(child, nnx.Module | nnx.List):
                self.beside_nnx(child, rngs)


class Paired(nnx.Module):
    """An nnx layer and its pair."""

    def __init__(self, base: nnx.Module, pairs: Pairs, rngs: nnx.Rngs):
        weight = base.embedding if isinstance(base, nnx.Embed) else base.kernel
        shapes = pairs.shapes(base, weight.shape)
        self.base, self.pairs = base, pairs
        self.down = nnx.Param(_normal(rngs.params(), shapes["down"]))
        self.up = nnx.Param(_normal(rngs.params(), shapes["up"]))

    def __call__(self, x: Array, **options: Any) -> Array:
        y = self.base(x, **options)
        return y + self.pairs.delta(self.base, x, y, self.down[...], self.up[...])


def _is_conv(layer: Any) -> bool:
    return isinstance(layer, nn.Conv)


def _contracted(layer: Any) -> int:
    """How many axes of its kernel a layer contracts."""
    return np.size(getattr(layer, "axis", -1))


def _normal(key: Any, shape: tuple[int, ...]) -> Array:
    """Both factors start small and random: what they are does not matter to speed."""
    return jax.random.normal(key, shape) / 100
