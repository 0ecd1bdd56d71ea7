"""What server and client ask and answer, and how Flower carries it.

Only NumPy and Flower's records: a client's process imports nothing else.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

Arrays = dict[str, np.ndarray]


class Question(NamedTuple):
    """The server's message to one client.

    Attributes:
      seed: Weights and sketches are functions of it.
      link: The link to train in.
      stamp: What both must agree on.
      since: The link that the factors begin with: the first the client may have missed.
      factors: ``{"link/path": array}``, the merged factors of the links from ``since`` to
        ``link - 1``; a link that was skipped has none.
    """

    seed: int
    link: int
    stamp: str
    since: int
    factors: Arrays


class Answer(NamedTuple):
    """A client's message: its number, its weight and its factors by path."""

    client: int
    link: int
    count: int
    stamp: str
    factors: Arrays


Kind = TypeVar("Kind", Question, Answer)


class NotOursError(ValueError):
    """A message that is not of this app."""


def pack(message: Question | Answer) -> RecordDict:
    """The message as Flower's records."""
    fields = message._asdict()
    arrays = {name: Array(array) for name, array in fields.pop("factors").items()}
    return RecordDict({"factors": ArrayRecord(arrays), "said": ConfigRecord(fields)})


def unpack(kind: type[Kind], content: RecordDict) -> Kind:
    """The message in Flower's records, if they hold one of this kind and nothing else.

    Raises:
      NotOursError: If they do not.
    """
    records = {"factors": ArrayRecord, "said": ConfigRecord}
    if {name: type(record) for name, record in content.items()} != records:
        raise NotOursError(
            f"holds the records {sorted(content)}, expected {sorted(records)}"
        )
    said = dict(content["said"])
    wanted = [name for name in kind._fields if name != "factors"]
    types = {name: str if name == "stamp" else int for name in wanted}
    if {name: type(value) for name, value in said.items()} != types:
        raise NotOursError(f"says {said}, expected {', '.join(wanted)}")
    for name in wanted:
        if types[name] is int and not -(2**31) <= said[name] < 2**31:
            raise NotOursError(f"has {name}={said[name]}, which is no int32")
    factors = {name: _array(name, array) for name, array in content["factors"].items()}
    return kind(**said, factors=factors)


def _array(name: str, packed: Array) -> np.ndarray:
    try:
        array = packed.numpy()
    except Exception as error:  # damaged bytes raise whatever their reader does
        raise NotOursError(f"has an unreadable array {name!r}: {error}") from error
    # Bytes that begin as an archive does are read as one.
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        what = getattr(array, "dtype", type(array).__name__)
        raise NotOursError(f"has {name!r} of dtype {what}, expected floats")
    return array
