"""Which layer a leaf is of, and layers as vectors, for methods that train a few."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jax import Array

from raclora_jax._core.types import Leaves

# A path to the name of its layer, ``None`` for what is of no layer.
Layer = Callable[[str], str | None]


def layer_of(path: str) -> str | None:
    """The path through its first part that ends in a number, ``None`` if none does.

    Example:
      >>> layer_of("layers/3/attention/wq"), layer_of("embedding")
      ('layers/3', None)
    """
    found = re.match(r"(?:[^/]*/)*?[^/]*\d(?=/|$)", path)
    return None if found is None else found[0]


def in_layers(
    known: Iterable[str], layer: Layer
) -> tuple[dict[str, list[str]], list[str]]:
    """The paths of each layer, by number and not by letter, and those of none."""
    layers: dict[str, list[str]] = {}
    rest = []
    for path in sorted(known):
        name = layer(path)
        if name is None:
            rest.append(path)
        else:
            layers.setdefault(name, []).append(path)
    return {name: layers[name] for name in sorted(layers, key=_by_number)}, rest


def _by_number(name: str) -> list[tuple[str, int]]:
    return [(word, int(digits or 0)) for word, digits in re.findall(r"(\D*)(\d*)", name)]


def size_of(leaves: Leaves, chosen: list[str]) -> int:
    """Numbers in some leaves."""
    return sum(leaves[path].size for path in chosen)


def wide_dtype(leaves: Leaves) -> jnp.dtype:
    """The dtype of vectors of them, at least float32."""
    return jnp.result_type(jnp.float32, *leaves.values())


def as_vector(leaves: Leaves, chosen: list[str], length: int) -> Array:
    """Some leaves end to end, zeros behind them up to a length."""
    wide = wide_dtype(leaves)
    parts = [leaves[path].astype(wide).ravel() for path in chosen]
    return jnp.concatenate([*parts, jnp.zeros(length - size_of(leaves, chosen), wide)])


def as_leaves(vector: Array, leaves: Leaves, chosen: list[str]) -> dict[str, Array]:
    """The leaves that a vector is."""
    found, place = {}, 0
    for path in chosen:
        leaf = leaves[path]
        found[path] = vector[place : place + leaf.size].reshape(leaf.shape)
        place += leaf.size
    return found
