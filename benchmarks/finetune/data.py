"""Digit images, split into a pre-training and a fine-tuning task."""

from __future__ import annotations

import gzip
import pathlib
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import sklearn.model_selection


class Split(NamedTuple):
    """Images (n, pixels) in float32 and labels (n,) in int32, counted from 0."""

    images: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """Five digits: what to train on, what to tune on, what to report."""

    train: Split
    validation: Split
    test: Split

    def refit(self) -> Task:
        """The same task once the settings are chosen: train on validation images too."""
        joined = (
            np.concatenate(pair) for pair in zip(self.train, self.validation, strict=True)
        )
        return self._replace(train=Split(*joined))


def digits() -> tuple[Task, Task]:
    """scikit-learn's 8 x 8 digits: the tasks 0-4 and 5-9, split 60 / 20 / 20."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return _digits_task(images, labels, 0), _digits_task(images, labels, 5)


def mnist(folder: pathlib.Path) -> tuple[Task, Task]:
    """MNIST's idx files: the tasks 0-4 and 5-9, with the last 3000 for validation."""
    parts = all_mnist(folder)
    return _mnist_task(*parts, first=0), _mnist_task(*parts, first=5)


def all_mnist(folder: pathlib.Path) -> tuple[Split, Split]:
    """MNIST as its files have it, bytes and all ten digits: training and test part."""
    train, test = (
        Split(
            _idx(folder / f"{name}-images-idx3-ubyte.gz", header=16, width=784),
            _idx(folder / f"{name}-labels-idx1-ubyte.gz", header=8),
        )
        for name in ("train", "t10k")
    )
    return train, test


def _digits_task(images: np.ndarray, labels: np.ndarray, first: int) -> Task:
    images, labels = _five(images, labels, first)
    rest, test = _stratified(images, labels, test_size=0.2)
    train, validation = _stratified(*rest, test_size=0.25)
    return Task(train, validation, test)


def _stratified(
    images: np.ndarray, labels: np.ndarray, test_size: float
) -> tuple[Split, Split]:
    a, b, la, lb = sklearn.model_selection.train_test_split(
        images, labels, test_size=test_size, random_state=0, stratify=labels
    )
    return Split(a, la), Split(b, lb)


def _mnist_task(train: Split, test: Split, first: int) -> Task:
    def scaled(part: Split) -> Split:
        images, labels = _five(part.images, part.labels, first)
        return Split(standardised(images), labels)

    images, labels = scaled(train)
    head, tail = (
        Split(images[:-3000], labels[:-3000]),
        Split(images[-3000:], labels[-3000:]),
    )
    return Task(head, tail, scaled(test))


def standardised(images: np.ndarray) -> np.ndarray:
    """MNIST's bytes with the training part's mean 0 and deviation 1."""
    mean, deviation = 0.1307, 0.3081
    return ((images / 255 - mean) / deviation).astype(np.float32)


def _five(images: np.ndarray, labels: np.ndarray, first: int) -> Split:
    chosen = (labels >= first) & (labels < first + 5)
    return Split(images[chosen], (labels[chosen] - first).astype(np.int32))


def _idx(path: pathlib.Path, header: int, width: int | None = None) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; --data-dir must hold the four gzipped idx files of MNIST"
        )
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
    return values if width is None else values.reshape(-1, width)
