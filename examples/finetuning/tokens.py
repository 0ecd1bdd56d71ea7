"""Tokenizers: one of the hub's ``tokenizer.json``, or that of llama2.c."""

from __future__ import annotations

import itertools
import pathlib
import re
import struct

from finetuning import folders
from finetuning.texts import Tokenizer

_BEGIN, _END = 1, 2  # in llama2.c


def tokenizer_of(file: pathlib.Path) -> tuple[Tokenizer, list[int], list[int]]:
    """A tokenizer, and the ids to put before and behind a text.

    Before it stands what the hub's tokenizer puts there itself or its config names,
    behind it the token that ends a text for the model.

    Raises:
      ValueError: If the file is not there or is none of the two.
    """
    if file.suffix == ".bin":
        return Merges(file), [_BEGIN], [_END]
    hub = _Hub(file)
    return hub, hub.begin(), hub.end()


class _Hub:
    """One of the hub, with what the files beside it say of its marks."""

    def __init__(self, file: pathlib.Path) -> None:
        self._file, self._held = file, folders.tokenizer(file)

    def encode(self, text: str) -> list[int]:
        """Without marks."""
        return self._held.encode(text, add_special_tokens=False).ids

    def begin(self) -> list[int]:
        """Before a text, if anything."""
        others = {*self.end(), *self.encode("")}
        own = [one for one in self._held.encode("").ids if one not in others]
        return own or self._named("bos_token")

    def end(self) -> list[int]:
        """Behind a text: by name, else by the number that the model's config has."""
        named = self._named("eos_token")
        for name in ("generation_config.json", "config.json"):
            if not named and (self._file.parent / name).exists():
                number = folders.stated(self._file.parent, name).get("eos_token_id")
                number = number[0] if isinstance(number, list) and number else number
                named = [] if number is None else [self._known(number, name)]
        return named

    def _known(self, number: object, name: str) -> int:
        known = isinstance(number, int) and 0 <= number < 2**31  # as the package has it
        if known and self._held.id_to_token(number) is not None:
            return number
        raise ValueError(
            f"{self._file.parent / name}: eos_token_id {number!r} is no token of "
            f"{self._file.name}: state one, or eos_token in tokenizer_config.json"
        )

    def _named(self, mark: str) -> list[int]:
        name = folders.stated(self._file.parent, "tokenizer_config.json").get(mark)
        name = name.get("content") if isinstance(name, dict) else name
        if name is None:
            return []
        number = self._held.token_to_id(name) if isinstance(name, str) else None
        if number is None:
            raise ValueError(
                f"{self._file} has no token {name!r}, which tokenizer_config.json names "
                f"as {mark}"
            )
        return [number]


class Merges:
    """llama2.c's: pieces with scores, merged pair by pair, the best score first.

    Attributes:
      pieces: In the order of their ids.
    """

    def __init__(self, file: pathlib.Path) -> None:
        if not file.exists():
            raise ValueError(f"{file} does not exist: name the --tokenizer")
        data, at = file.read_bytes(), 4
        self.pieces: list[bytes] = []
        self._ids: dict[bytes, int] = {}
        self._scores: list[float] = []
        while at < len(data):
            entry = _entry(data, at)
            if entry is None:
                raise ValueError(
                    f"{file} is cut short, or no tokenizer of llama2.c: it ends before "
                    f"{len(self.pieces) + 1} pieces are whole, bytes are left behind"
                )
            score, piece = entry
            if b" " in piece.strip(b" ") or piece.lstrip(b" ") != piece.strip(b" "):
                raise ValueError(f"{file}: the piece {piece!r} goes on behind a space")
            self._ids.setdefault(piece, len(self.pieces))
            self.pieces.append(piece)
            self._scores.append(score)
            at += 8 + len(piece)
        self._memory: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Word by word, each with the spaces before it: no piece has one further in."""
        found = []
        for word in re.findall(" *[^ ]+| +", f" {text}" if text else ""):
            if word not in self._memory:
                self._memory[word] = self._word(word)
            found += self._memory[word]
        return found

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        pieces: list[bytes] = []
        for letter in word:
            raw = letter.encode()
            known = raw in self._ids
            pieces += [raw] if known else [bytes([byte]) for byte in raw]
            ids += [self._ids[raw]] if known else [byte + 3 for byte in raw]
        while True:
            joined = [a + b for a, b in itertools.pairwise(pieces)]
            candidates = [
                (self._scores[self._ids[piece]], -place)
                for place, piece in enumerate(joined)
                if piece in self._ids
            ]
            if not candidates:
                return ids
            place = -max(candidates)[1]
            piece = joined[place]
            pieces[place : place + 2] = [piece]
            ids[place : place + 2] = [self._ids[piece]]


def _entry(data: bytes, at: int) -> tuple[float, bytes] | None:
    """Score and letters of the piece that starts there, if it is whole."""
    if at + 8 > len(data):
        return None
    score, size = struct.unpack_from("<fi", data, at)
    start = at + 8
    return (score, data[start : start + size]) if 0 <= size <= len(data) - start else None
