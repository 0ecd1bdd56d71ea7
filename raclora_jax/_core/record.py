"""What a run writes down or sends: a line with a checksum, and a safetensors file.

Whoever imports it says by ``extra`` which command installs safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save

T = TypeVar("T")
Head = dict[str, Any]
Arrays = dict[str, np.ndarray]

_HEADER = "raclora_jax"
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U32": np.uint32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def to_bytes(head: Head, arrays: Arrays) -> bytes:
    """The SHA-256 of what follows as a line, and a safetensors file.

    Args:
      head: What JSON has; ``"format"`` says which kind of record it is.
      arrays: ``{name: array}``.

    Returns:
      The record, the same bytes for the same contents.
    """
    tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # One entry: several would be written in an order of their own each time.
    body = save(tensors, metadata={_HEADER: json.dumps(head)})
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def from_bytes(raw: bytes, form: str, make: Callable[[Head, Arrays], T]) -> T:
    """Reads what ``to_bytes`` wrote.

    Args:
      raw: The record.
      form: The format that is expected; its second word is what errors call it.
      make: ``make(head, arrays)``, what it is to become.

    Returns:
      What ``make`` gave.

    Raises:
      TypeError: If it is not bytes.
      ValueError: If it is anything else, or of another format.
    """
    noun = form.split()[1]
    if not isinstance(raw, bytes):
        raise TypeError(
            f"a {noun} must be bytes, got {type(raw).__name__}; hand over those written"
        )
    digest, _, body = raw.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(
            f"this is no whole {noun}: expected bytes with the SHA-256 of their first "
            f"line, got {len(raw)} bytes that are cut short or not those written; ask "
            "for it again"
        )
    try:
        size = int.from_bytes(body[:8], "little")
        head = json.loads(json.loads(body[8 : 8 + size])["__metadata__"][_HEADER])
        found = head["format"]
        if found == form:
            return make(head, _arrays(body))
    except Exception as error:  # what another program wrote shows as anything
        raise ValueError(
            f"this is no {noun}: expected {form!r}, got bytes that cannot be read as one "
            f"({type(error).__name__}: {error}); hand over those written"
        ) from error
    raise ValueError(
        f"this {noun} has another format: expected {form!r}, got {found!r}; take the "
        "same version of raclora_jax on both sides"
    )


def _arrays(body: bytes) -> Arrays:
    return {
        name: np.frombuffer(one["data"], _DTYPES[one["dtype"]]).reshape(one["shape"])
        for name, one in safetensors.deserialize(body)
    }


def checksum(raw: bytes) -> str:
    """The first line of a record."""
    return raw.partition(b"\n")[0].decode()
