"""What travels between server and clients, and what everyone knows at a round."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from raclora_jax._core.types import PyTree
from raclora_jax._forms.adapter import AdapterChain

Arrays = dict[str, Any]

LARGEST_COUNT = 2**31 - 1  # the largest int32, which clients count in


class Trained(NamedTuple):
    """What a client trains, by canonical path.

    Attributes:
      factors: ``(batch..., rank, *axes of the other side)`` for an adapted leaf, a
        difference of the leaf's shape for a dense one; frozen leaves are absent.
      sketches: The other factor, where a strategy trains both; else empty.
    """

    factors: Arrays
    sketches: Arrays


class State(NamedTuple):
    """Where a run stands: the same on the server and on every client.

    Attributes:
      base_params: The weights of the running link.
      factors: ``{path: array}``, where the clients start; zeros at the start of a link.
      chain: Link, public key and sketches; both factors of a pair live here and in
        ``factors``.
      round: int32 scalar, exchanges done. In Fed-RAC-LoRA a round is a link.
    """

    base_params: PyTree
    factors: Arrays
    chain: AdapterChain
    round: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Message:
    """What a client sends up.

    Args:
      trained: What it trained, as it stands after the local steps.
      client: The client's number.
      round: The round it took part in.
      count: How many examples it holds: its weight in the mean, at most ``2**31 - 1``.
      stamp: Static; what ``stamp_of`` says of the client's strategy and weights.
    """

    trained: Trained
    client: Any
    round: Any
    count: Any
    # Text is no array: as part of the treedef it goes through jit and vmap, and messages
    # of two runs do not stack.
    stamp: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What the server sends down, and all that a client needs to follow it.

    Args:
      trained: Where ``factors`` (and ``sketches``) stand after the round; ``None`` if
        the round was skipped.
      residual: ``{path: what is added to the weights beside it}``, by FedEx-LoRA only: a
        dense array, or a pair of stacked factors where that is smaller.
      round: The round it ends.
      stamp: Static; as in ``Message``.
    """

    trained: Trained | None
    residual: Arrays
    round: Any
    stamp: str = dataclasses.field(metadata={"static": True})


class Drop(NamedTuple):
    """One message that was not used.

    Attributes:
      client: The number it claims, ``None`` if it says none.
      reason: One of ``"nothing"``, ``"stamp"``, ``"round"``, ``"twice"``, ``"shape"``,
        ``"not finite"``, ``"weight"``, ``"no weight"``, ``"few"``.
      line: The same for people, in one line.
    """

    client: int | None
    reason: str
    line: str


class RoundLog(NamedTuple):
    """What happened to the messages of a round.

    Attributes:
      round: The round.
      accepted: Numbers of the clients in the mean, in the order they were summed.
      dropped: The messages that were not used, and why.
      bytes_up: Bytes of the arrays in the accepted messages.
    """

    round: int
    accepted: tuple[int, ...]
    dropped: tuple[Drop, ...]
    bytes_up: int

    @property
    def counts(self) -> dict[str, int]:
        """How many messages were dropped for each reason."""
        return dict(collections.Counter(drop.reason for drop in self.dropped))

    def __str__(self) -> str:
        lines = [
            f"round {self.round}: {len(self.accepted)} in the mean, "
            f"{len(self.dropped)} dropped, {self.bytes_up:,} bytes up",
            *(drop.line for drop in self.dropped),
        ]
        return "\n".join(lines)


def nbytes(tree: PyTree) -> int:
    """Bytes of the arrays in a message, a step or any tree.

    Args:
      tree: Arrays or abstract arrays; what is static, such as a stamp, counts nothing.

    Returns:
      Bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> nbytes({"kernel": jnp.zeros((2, 6)), "bias": jnp.zeros(4)})
      64
    """

    def of(leaf: Any) -> int:
        # A dtype of its own, where it has one: JAX need not know it.
        dtype = getattr(leaf, "dtype", None) or jax.numpy.result_type(leaf)
        return int(np.size(leaf)) * int(dtype.itemsize)

    return sum(map(of, jax.tree.leaves(tree)))
