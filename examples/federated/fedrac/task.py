"""What is trained: a small network on digits, split among the clients by label."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import raclora_jax as rl
from raclora_jax import federated as fed

STRATEGY = fed.raclora(rl.Spec(rank=8))
HIDDEN = 32


class Data(NamedTuple):
    """Images ``(n, pixels)`` in [0, 1], float32, and labels ``(n,)``, int32."""

    images: np.ndarray
    labels: np.ndarray


def load(data_dir: str) -> tuple[Data, Data]:
    """(train, test): MNIST from its four idx files, or scikit-learn's digits."""
    if data_dir:
        folder = pathlib.Path(data_dir)
        return _mnist(folder, "train"), _mnist(folder, "t10k")
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    return Data(images[:1440], labels[:1440]), Data(images[1440:], labels[1440:])


def _mnist(folder: pathlib.Path, name: str) -> Data:
    def read(kind: str, header: int) -> np.ndarray:
        path = folder / f"{name}-{kind}-ubyte.gz"
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)

    images = read("images-idx3", 16).reshape(-1, 784) / np.float32(255)
    return Data(images.astype(np.float32), read("labels-idx1", 8).astype(np.int32))


def part(data: Data, client: int, clients: int) -> Data:
    """What one client holds: no two clients share a digit."""
    own = data.labels % clients == client
    return Data(data.images[own], data.labels[own])


def start(seed: int, pixels: int) -> dict[str, dict[str, np.ndarray]]:
    """The weights before link 0: everyone makes them from the seed."""
    rng = np.random.default_rng(seed)

    def dense(rows: int, cols: int) -> dict[str, np.ndarray]:
        kernel = rng.normal(size=(rows, cols)) * np.sqrt(2 / rows)
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(cols, np.float32)}

    return {"hidden": dense(pixels, HIDDEN), "head": dense(HIDDEN, 10)}


def predict(params, images):
    hidden = images @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return jax.nn.relu(hidden) @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, images, labels):
    logits = predict(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


LOCAL = fed.Local(loss_fn, 0.5, batch_size=32, steps=20)


@jax.jit
def train(state: fed.State, data: Data, client: jax.Array) -> fed.Message:
    """What a client does in a link. Its key is its own: it never travels."""
    own = tuple(data)
    return fed.client_update(
        STRATEGY, state, own, LOCAL, client=client, key=1000 + client
    )


@jax.jit
def accuracy(state: fed.State, data: Data) -> jax.Array:
    logits = predict(fed.params_of(STRATEGY, state), data.images)
    return jnp.mean(logits.argmax(-1) == data.labels)


def digest(state: fed.State) -> str:
    """The global weights as 16 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(fed.params_of(STRATEGY, state)):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()
