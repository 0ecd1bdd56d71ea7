"""What an argument must be: one wording for every number, word or flag refused.

``<name> must be <expected>, got <value>; <way out>``, with a way out where there is one.
A value of the wrong kind raises ``TypeError``, one of the right kind that is out of range
``ValueError``. ``name`` is the argument's, as the message says it.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Range(NamedTuple):
    """Which numbers are taken.

    Attributes:
      words: How a message says it, behind "must be".
      holds: Whether a number is one of them; never true of NaN.
    """

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("positive and finite", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("at least 0 and finite", lambda x: 0 <= x < math.inf)
PROBABILITY = Range("between 0 and 1", lambda x: 0 <= x <= 1)
SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
DECAY = Range("at least 0 and below 1", lambda x: 0 <= x < 1)


def number(
    name: str,
    value: Any,
    within: Range,
    *,
    expected: str = "a number",
    way_out: str = "",
) -> float:
    """The float that a number is; a traced one has no value yet and is refused.

    Example:
      >>> number("momentum", 0, DECAY)
      0.0
    """
    if not _is_real(value) or isinstance(value, jax.core.Tracer):
        raise TypeError(_said(name, expected, kind(value), way_out))
    found = float(value)
    if not within.holds(found):
        raise ValueError(_said(name, within.words, found, way_out))
    return found


def scalar(
    name: str,
    value: Any,
    within: Range | None = None,
    *,
    expected: str = "a number",
    way_out: str = "",
) -> None:
    """Refuses what is no number, traced or not, and a known one that is out of range."""
    if not _is_real(value):
        raise TypeError(_said(name, expected, kind(value), way_out))
    if within is not None and not isinstance(value, jax.core.Tracer):
        number(name, value, within, way_out=way_out)


def count(
    name: str,
    value: Any,
    *,
    least: int = 1,
    most: int | None = None,
    way_out: str = "",
) -> int:
    """The int that a value is; a traced one has no value yet and is refused.

    Example:
      >>> count("rank", 8)
      8
    """
    found = as_int(value)
    if found is None:
        raise TypeError(_said(name, "an int", kind(value), way_out))
    if found < least:
        raise ValueError(_said(name, f"at least {least}", found, way_out))
    if most is not None and found > most:
        raise ValueError(_said(name, f"at most {most}", found, way_out))
    return found


def flag(name: str, value: object) -> None:
    """Refuses what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(_said(name, "a bool", kind(value)))


def choice(name: str, value: object, known: Collection[str]) -> None:
    """Refuses what is none of the known words."""
    if value not in known:
        words = f"one of {', '.join(map(repr, known))}"
        raise ValueError(_said(name, words, repr(value)))


def as_int(value: Any) -> int | None:
    """The int that a value is, if it is one: no bool, and not traced."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def kind(value: object) -> str:
    """A value and its type, for messages."""
    return f"{value!r} of type {type(value).__name__}"


def _is_real(value: Any) -> bool:
    """Whether a value is one real number or an array of one, traced or not."""
    if not hasattr(value, "dtype"):
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    kinds = jnp.floating, jnp.integer
    is_real = any(jnp.issubdtype(value.dtype, each) for each in kinds)
    return is_real and jnp.shape(value) == ()


def _said(name: str, expected: str, got: object, way_out: str = "") -> str:
    message = f"{name} must be {expected}, got {got}"
    return f"{message}; {way_out}" if way_out else message
