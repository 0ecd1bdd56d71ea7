"""The tasks: where a run starts, what it descends, and the number it ends with.

Data are those of the task; a seed decides the start or the order of the data, and the
draws of the method.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import raclora_jax as rl
from benchmarks.finetune import data, study, training
from benchmarks.pretrained import stories
from benchmarks.pretrained.run import LENGTH
from benchmarks.pretrained.run import Task as Language
from benchmarks.rates.counterexample import Quadratic
from benchmarks.rates.linear_regression import LeastSquares
from benchmarks.shared import models

PyTree = Any


class Task(NamedTuple):
    """One task.

    Attributes:
      name: What tables call it.
      measure: What its number is; smaller is better.
      start: ``start(key) -> params``.
      loss: ``loss(params, *batch)``.
      batches: ``batches(seed, steps)``, arrays with a leading axis of steps.
      tuning: ``tuning(params)``, the number that chooses the learning rate.
      measured: ``measured(params)``, the number that is reported.
      spec: ``spec(rank)``, the views, links and what becomes of other leaves.
      rank: Of every method at equal steps.
      top_rank: The largest considered at equal bytes.
      steps: Of a run.
      together: Whether several runs go in one program side by side; where steps are
        short, that is most of the speed.
      timed: Whether it is run at equal bytes and in equal time too.
    """

    name: str
    measure: str
    start: Callable[[Array], PyTree]
    loss: Callable[..., Array]
    batches: Callable[[int, int], tuple[np.ndarray, ...]]
    tuning: Callable[[PyTree], Array]
    measured: Callable[[PyTree], Array]
    spec: Callable[[int], rl.Spec]
    rank: int
    top_rank: int
    steps: int
    together: bool
    timed: bool


def _convex(
    name: str,
    measure: str,
    start: Callable[[Array], PyTree],
    loss: Callable[[PyTree], Array],
    measured: Callable[[PyTree], Array],
    *,
    rank: int,
) -> Task:
    """A task of exact gradients: what is measured is what is tuned."""
    return Task(
        name,
        measure,
        start,
        loss,
        lambda seed, steps: (),
        measured,
        measured,
        lambda rank: rl.Spec(rank, side="smaller", resample_every=10, rest="frozen"),
        rank=rank,
        top_rank=rank,
        steps=600,
        together=True,
        timed=False,
    )


def counterexample() -> Task:
    """The quadratic of a 3 x 3 matrix on which LoRA and its chain may diverge."""
    problem = Quadratic(0.5)

    def gap(params: PyTree) -> Array:
        return problem.gap(params["w"])

    def start(key: Array) -> PyTree:
        return {"w": jax.random.normal(key, (3, 3))}

    return _convex("counterexample", "f - f*", start, gap, gap, rank=1)


def least_squares() -> Task:
    """Features over a decade of scales, a target of full rank, from zero."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((24, 24)))
    X = rng.standard_normal((200, 24)) * np.geomspace(1, 0.1, 24) @ turn
    target = turn.T @ (rng.standard_normal((24, 12)) / np.geomspace(1, 0.1, 24)[:, None])
    made = LeastSquares.of(X, X @ target + 0.1 * rng.standard_normal((200, 12)))
    problem = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), made)
    first = problem.gap(jnp.zeros((24, 12)))

    def gap(params: PyTree) -> Array:
        return problem.gap(params["w"])

    def start(key: Array) -> PyTree:
        return {"w": 1e-3 * jax.random.normal(key, (24, 12))}

    return _convex(
        "least squares",
        "relative gap",
        start,
        gap,
        lambda params: gap(params) / first,
        rank=2,
    )


def logistic() -> Task:
    """Eight classes, the regulariser ``0.01 sum w^2 / (1 + w^2)``: not convex."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((400, 24)) * np.geomspace(2, 0.2, 24)
    scores = X @ rng.standard_normal((24, 8)) + rng.gumbel(size=(400, 8))
    labels = jnp.asarray(scores.argmax(1))
    features = jnp.asarray(X, jnp.float32)

    def loss(params: PyTree) -> Array:
        w = params["w"]
        fit = models.cross_entropy(features @ w, labels)
        return fit + 0.01 * jnp.sum(w**2 / (1 + w**2))

    def squared_gradient(params: PyTree) -> Array:
        return jnp.sum(jax.grad(loss)(params)["w"] ** 2)

    first = squared_gradient({"w": jnp.zeros((24, 8))})

    def start(key: Array) -> PyTree:
        return {"w": 1e-3 * jax.random.normal(key, (24, 8))}

    return _convex(
        "logistic regression",
        "|grad f|^2, relative",
        start,
        loss,
        lambda params: squared_gradient(params) / first,
        rank=2,
    )


def factorisation() -> Task:
    """A 24 x 20 matrix of rank 8 as the product of two matrices that are trained."""
    rng = np.random.default_rng(2)
    left, _ = np.linalg.qr(rng.standard_normal((24, 8)))
    right, _ = np.linalg.qr(rng.standard_normal((20, 8)))
    target = jnp.asarray(left * np.geomspace(1, 0.1, 8) @ right.T, jnp.float32)

    def error(params: PyTree) -> Array:
        rest = params["left"] @ params["right"] - target
        return jnp.sum(rest**2) / jnp.sum(target**2)

    def start(key: Array) -> PyTree:
        keys = jax.random.split(key)
        return {
            "left": jax.random.normal(keys[0], (24, 8)) / 10,
            "right": jax.random.normal(keys[1], (8, 20)) / 10,
        }

    return _convex("matrix factorisation", "relative error", start, error, error, rank=2)


def mnist(data_dir: pathlib.Path) -> Task:
    """The paper's network, pre-trained on the digits 0-4, on 5-9; biases frozen."""
    before, after = data.mnist(data_dir / "mnist")
    params = study.pretrain(before, 400, 128)
    train = jax.tree.map(jnp.asarray, after.train)

    def loss(params: PyTree, chosen: Array) -> Array:
        return training.loss_fn(params, train.images[chosen], train.labels[chosen])

    return Task(
        "MNIST 5-9",
        "test error, %",
        lambda key: params,
        loss,
        lambda seed, steps: _epochs(seed, len(after.train.labels), 128, steps),
        lambda params: training.loss_fn(params, *after.validation),
        lambda params: 100 * (1 - training.accuracy(params, after.test)),
        lambda rank: rl.Spec(rank, side="smaller", resample_every=10, rest="frozen"),
        rank=1,
        top_rank=4,
        steps=400,
        together=False,
        timed=True,
    )


def conv_net() -> Task:
    """Four convolutions and a head on scikit-learn's digits 5-9, from scratch."""
    _, digits = data.digits()
    model = models.ConvNet(8, 2, 5)

    def pictures(split: data.Split) -> tuple[Array, Array]:
        images = jnp.asarray(split.images).reshape(-1, 8, 8, 1)
        return images, jnp.asarray(split.labels)

    images, labels = pictures(digits.train)

    def cross_entropy(params: PyTree, images: Array, labels: Array) -> Array:
        return models.cross_entropy(model.apply({"params": params}, images), labels)

    def loss(params: PyTree, chosen: Array) -> Array:
        return cross_entropy(params, images[chosen], labels[chosen])

    def start(key: Array) -> PyTree:
        return model.init(key, images[:1])["params"]

    shapes = jax.eval_shape(start, jax.random.key(0))
    validation, test = pictures(digits.validation), pictures(digits.test)
    return Task(
        "conv net",
        "test cross entropy",
        start,
        loss,
        lambda seed, steps: _epochs(seed, len(labels), 32, steps),
        lambda params: cross_entropy(params, *validation),
        lambda params: cross_entropy(params, *test),
        lambda rank: rl.trace_spec(
            cross_entropy,
            shapes,
            images[:2],
            labels[:2],
            rank=rank,
            side="smaller",
            resample_every=10,
        ),
        rank=2,
        top_rank=2,
        steps=150,
        together=False,
        timed=False,
    )


def language(data_dir: pathlib.Path) -> Task:
    """stories260K on tiny Shakespeare: the matrices of its layers, all else frozen."""
    given = Language(data_dir)
    spread = stories.spread_windows(given.text.validation, 128, LENGTH)
    validation = jnp.asarray(spread)

    def batches(seed: int, steps: int) -> tuple[np.ndarray, ...]:
        draw = np.random.default_rng(seed)
        starts = draw.integers(len(given.text.train) - LENGTH, size=(steps, 4))
        return (stories.windows(given.text.train, starts, LENGTH),)

    def score(params: PyTree) -> Array:
        return given.loss(params, validation)

    return Task(
        "language model",
        "validation loss",
        lambda key: given.params,
        given.loss,
        batches,
        score,
        score,
        lambda rank: rl.Spec(rank, side="smaller", resample_every=25, rest="frozen"),
        rank=4,
        top_rank=16,
        steps=200,
        together=False,
        timed=True,
    )


def _epochs(seed: int, count: int, size: int, steps: int) -> tuple[np.ndarray, ...]:
    """Indices ``(steps, size)``: every epoch visits the examples in a new order."""
    return (np.asarray(training.batches(jax.random.key(seed), count, size, steps)),)


NAMES: dict[str, Callable[[pathlib.Path], Task]] = {
    "counterexample": lambda _: counterexample(),
    "least squares": lambda _: least_squares(),
    "logistic regression": lambda _: logistic(),
    "matrix factorisation": lambda _: factorisation(),
    "MNIST 5-9": mnist,
    "conv net": lambda _: conv_net(),
    "language model": language,
}
