"""Where a copy of the weights stands in the messages of a run."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from raclora_jax._core.digest import digests
from raclora_jax._core.keys import key_data
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.follow._adapted import weights_of


class Position(NamedTuple):
    """Where weights stand in the messages of a run; text and a number, as JSON has them.

    Save it beside the weights, and make it again with ``Position(*saved)``.

    Attributes:
      run: 32 hex digits: a digest of the weights that the run began with, and its key.
      step: How many messages the weights have taken in.
      last: The checksum of the last of them; empty before the first.

    Example:
      >>> import json, jax.numpy as jnp
      >>> position = start({"kernel": jnp.ones((6, 4))}, key=0)
      >>> Position(*json.loads(json.dumps(position))) == position
      True
    """

    run: str
    step: int
    last: str


def start(params: PyTree, *, key: KeyLike) -> Position:
    """The position before the first message, on the trainer and on every follower.

    Args:
      params: The weights that the run begins with, on any mesh, or what ``begin``
        returned.
      key: The key that ``raclora`` or ``begin`` is given: typed, raw key data, or int
        seed.

    Returns:
      The position, the same wherever the weights have the same bits.

    Raises:
      TypeError: If the key is none.
      ValueError: If it is not a single threefry key.

    Example:
      >>> import jax.numpy as jnp
      >>> start({"kernel": jnp.ones((6, 4))}, key=0).step
      0
    """
    leaves = weights_of(params)
    found = digests(leaves)
    said = [
        f"{path}\t{leaves[path].dtype}\t{leaves[path].shape}\t{found[path]}\n"
        for path in sorted(leaves)
    ]
    base = hashlib.sha256("".join(said).encode()).hexdigest()[:16]
    return Position(base + words_of(key), 0, "")


def words_of(key: KeyLike) -> str:
    """The two words of a key as 16 hex digits, which end the name of its run."""
    return "".join(f"{int(word):08x}" for word in np.asarray(key_data(key)))


def key_of(run: str) -> np.ndarray:
    """The key data that the name of a run ends with, uint32 of shape (2,)."""
    return np.array([int(run[16:24], 16), int(run[24:32], 16)], np.uint32)
