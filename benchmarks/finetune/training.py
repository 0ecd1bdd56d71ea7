"""One network, one jitted loop, for every method alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks.finetune.data import Split, Task
from raclora_jax.methods import Method

# A method, given its learning-rate schedule and the key of the run.
Build = Callable[[optax.Schedule, Array], Method]


class MLP(nn.Module):
    """ReLU network of the paper's MNIST experiment: two hidden layers of 64."""

    hidden: int = 64
    classes: int = 5

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.classes)(x)


class Result(NamedTuple):
    """What one run gives back.

    Attributes:
      params: The final weights.
      validation: Accuracy after each block of steps.
      test: The same on the test images.
    """

    params: Any
    validation: Array
    test: Array


# A whole run: params, learning rate, key.
Runner = Callable[[Any, Array, Array], Result]


def loss_fn(params: Any, images: Array, labels: Array) -> Array:
    """Mean cross-entropy."""
    logits = MLP().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(params: Any, split: Split) -> Array:
    """Share of images put into the right class."""
    logits = MLP().apply({"params": params}, split.images)
    return jnp.mean(jnp.argmax(logits, -1) == split.labels)


def batches(key: Array, count: int, size: int, steps: int) -> Array:
    """Indices (steps, size): every epoch visits the images in a new order."""
    per_epoch = count // size
    epochs = -(-steps // per_epoch)

    def epoch(key: Array) -> Array:
        return jax.random.permutation(key, count)[: per_epoch * size].reshape(-1, size)

    orders = jax.vmap(epoch)(jax.random.split(key, epochs))
    return orders.reshape(-1, size)[:steps]


def runner(build: Build, task: Task, *, steps: int, batch: int, blocks: int) -> Runner:
    """``run(params, learning_rate, key)``, jitted: cosine decay, accuracy per block."""

    @jax.jit
    def run(params: Any, learning_rate: Array, key: Array) -> Result:
        batch_key, method_key = jax.random.split(key)
        method = build(optax.cosine_decay_schedule(learning_rate, steps), method_key)
        order = batches(batch_key, len(task.train.labels), batch, steps)
        order = order[: steps // blocks * blocks].reshape(blocks, -1, batch)
        images, labels = jnp.asarray(task.train.images), jnp.asarray(task.train.labels)

        def step(state: Any, chosen: Array) -> tuple[Any, None]:
            state, _ = method.step(state, loss_fn, images[chosen], labels[chosen])
            return state, None

        def block(state: Any, chosen: Array) -> tuple[Any, tuple[Array, Array]]:
            state, _ = jax.lax.scan(step, state, chosen)
            now = method.params(state)
            return state, (accuracy(now, task.validation), accuracy(now, task.test))

        state, (validation, test) = jax.lax.scan(block, method.init(params), order)
        return Result(method.params(state), validation, test)

    return run
