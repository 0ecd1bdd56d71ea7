"""A pretrained encoder with a linear head, and texts with labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.linear_model import LogisticRegression

from benchmarks.pretrained import minilm, run

FIT = 2000  # texts the head is fitted to before tuning


class Classifier:
    """The mean feature of a text through a linear head.

    The head starts at the logistic regression of the features before tuning, alike for
    all methods.

    Args:
      encoder: The encoder.
      train: A row a text, int32: ids, types if there are any, and, last, the label.
      held_out: Likewise.
      typed: Whether rows have types.
    """

    def __init__(
        self,
        encoder: minilm.Encoder,
        train: np.ndarray,
        held_out: np.ndarray,
        *,
        typed: bool = False,
    ):
        self.encoder, self.train, self.held_out = encoder, train, held_out
        self._typed = typed
        self._score = jax.jit(self.loss)
        self.params = {"layers": encoder.layers, "head": self._head()}

    def _head(self) -> dict[str, Array]:
        rows = self.train[:FIT]
        features = jax.jit(self._features)(self.encoder.layers, rows)
        fit = LogisticRegression(max_iter=1000).fit(np.asarray(features), rows[:, -1])
        kernel, bias = fit.coef_.T, fit.intercept_
        if kernel.shape[1] == 1:  # of two classes the second one's alone
            kernel = np.concatenate([-kernel, kernel], 1) / 2
            bias = np.concatenate([-bias, bias]) / 2
        return {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }

    def _features(self, layers: Any, rows: Array) -> Array:
        ids, types = rows[:, :-1], None
        if self._typed:
            ids, types = jnp.split(ids, 2, axis=1)
        return self.encoder.features(layers, ids, types)

    def logits(self, params: Any, rows: Array) -> Array:
        """One a class and text."""
        features = self._features(params["layers"], rows)
        return features @ params["head"]["kernel"] + params["head"]["bias"]

    def loss(self, params: Any, rows: Array) -> Array:
        """Mean cross entropy."""
        logits, labels = self.logits(params, rows), rows[:, -1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def validation_loss(self, params: Any) -> float:
        """On the texts held out."""
        return float(self._score(params, self.held_out))

    def batches(self, seed: int, steps: int, batch: int) -> Iterator[np.ndarray]:
        """Training rows, ``(CHUNK, batch, columns)`` at a time."""
        draw = np.random.default_rng(seed)
        for _ in range(steps // run.CHUNK):
            yield self.train[draw.integers(len(self.train), size=(run.CHUNK, batch))]
