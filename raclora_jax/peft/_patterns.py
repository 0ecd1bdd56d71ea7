"""Regular expressions out of somebody else's file, matched in bounded time.

Python's own engine goes back and forth, and a few characters keep it busy for years. Here
the places that a match has reached are the bits of one number, and every part of an
expression moves all of them at once.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

Places = int
Part = Callable[["_Text", Places], Places]

_MOST_STEPS = 20_000  # of one match; expressions in use take some hundreds
# A level is four calls of Python deep in reading, which allows some 1,000 in all.
_MOST_DEEP = 50


class _Text:
    """A text, and how much was done on it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0
        self._fitting: dict[str, Places] = {}

    def moved(self, places: Places, expression: str) -> Places:
        """The places behind those where one letter fits."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise ValueError("a match takes too long")
        if expression not in self._fitting:
            one = re.compile(expression)
            self._fitting[expression] = sum(
                1 << place
                for place, letter in enumerate(self.text)
                if one.fullmatch(letter)
            )
        return (places & self._fitting[expression]) << 1

    @functools.cached_property
    def edges(self) -> Places:
        """Places between a letter of a word and none."""
        word = [bool(re.match(r"\w", letter)) for letter in self.text]
        return sum(
            (a != b) << place
            for place, (a, b) in enumerate(
                zip([False, *word], [*word, False], strict=True)
            )
        )


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> Callable[[str], bool]:
    """Whether a text is matched as a whole, as by ``re.fullmatch``.

    Letters, ``.``, classes, groups, alternatives, repetitions, ``^``, ``$``, ``\\b`` and
    looking ahead are read.

    Raises:
      ValueError: If the expression is none, or has something else in it. The function
        raises it if a match takes too long.

    Example:
      >>> compiled(r"(.*\\.)?(q|v)_proj")("layers.0.q_proj")
      True
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern[:80]!r} is no regular expression ({error})"
        ) from error
    reader = _Reader(pattern)
    whole = reader.either(0)

    def matches(text: str) -> bool:
        return bool(whole(_Text(text), 1) >> len(text) & 1)

    return matches


class _Reader:
    """An expression, read from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._place = pattern, 0

    def _next(self, *tokens: str) -> str:
        """The token that stands here, taken."""
        for token in tokens:
            if self._pattern.startswith(token, self._place):
                self._place += len(token)
                return token
        return ""

    def _unread(self, what: str) -> ValueError:
        return ValueError(f"{self._pattern[:80]!r} has {what}, which is not read here")

    def either(self, depth: int) -> Part:
        """Alternatives, up to the end or a closing bracket."""
        if depth > _MOST_DEEP:
            raise self._unread("groups this deep")
        found = [self._series(depth)]
        while self._next("|"):
            found.append(self._series(depth))
        if len(found) == 1:
            return found[0]
        return lambda text, places: functools.reduce(
            lambda seen, part: seen | part(text, places), found, 0
        )

    def _series(self, depth: int) -> Part:
        parts: list[Part] = []
        while self._place < len(self._pattern) and self._pattern[self._place] not in "|)":
            parts.append(self._repeated(self._one(depth)))
        return lambda text, places: functools.reduce(
            lambda reached, part: part(text, reached) if reached else 0, parts, places
        )

    def _repeated(self, part: Part) -> Part:
        counted = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self._pattern, self._place)
        if kind := self._next("*", "+", "?"):
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[kind]
        elif counted and counted[0] not in ("{}", "{,}"):
            self._place = counted.end()
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        else:
            return part
        if self._next("+"):
            raise self._unread("a possessive repetition")
        self._next("?")  # how much a lazy one takes is no matter for a whole match

        def many(text: _Text, places: Places) -> Places:
            # Places only move on, so that both loops end within the text's length.
            for _ in range(least):
                places, before = part(text, places), places
                if places == before:
                    break
            reached = fresh = places
            rounds = 0
            while fresh and rounds != (None if most is None else most - least):
                fresh = part(text, fresh) & ~reached
                reached |= fresh
                rounds += 1
            return reached

        return many

    def _one(self, depth: int) -> Part:
        if self._next("("):
            return self._group(depth)
        if self._next("^", r"\A"):
            return lambda text, places: places & 1
        if self._next("$", r"\Z"):
            return lambda text, places: places & (1 << len(text.text))
        if self._next(r"\b"):
            return lambda text, places: places & text.edges
        if self._next(r"\B"):
            return lambda text, places: places & ~text.edges
        letter = re.compile(
            r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDwWsS]|\\[^a-zA-Z0-9]|[^\\]", re.DOTALL
        ).match(self._pattern, self._place)
        if not letter:
            raise self._unread(repr(self._pattern[self._place : self._place + 2]))
        self._place = letter.end()
        return lambda text, places: text.moved(places, letter[0])

    def _group(self, depth: int) -> Part:
        kind = self._next("?:", "?=", "?!")
        if not kind and self._next("?"):
            raise self._unread(f"'(?{self._pattern[self._place : self._place + 1]}'")
        inner = self.either(depth + 1)
        if not self._next(")"):
            raise self._unread("an open group")
        if kind not in ("?=", "?!"):
            return inner

        def ahead(text: _Text, places: Places) -> Places:
            kept = (
                1 << place
                for place in range(places.bit_length())
                if places >> place & 1 and bool(inner(text, 1 << place)) == (kind == "?=")
            )
            return sum(kept)

        return ahead
