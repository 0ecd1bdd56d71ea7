"""Tokenizers: one of the hub's ``tokenizer.json``, or that of llama2.c."""

from __future__ import annotations

import itertools
import pathlib
import re
import struct

from finetuning.texts import Tokenizer

_BEGIN, _END = 1, 2  # in llama2.c


def tokenizer_of(file: pathlib.Path) -> tuple[Tokenizer, list[int], list[int]]:
    """A tokenizer, and the ids to put before and behind a text.

    Raises:
      ValueError: If the file is not there or is none of the two.
    """
    if not file.exists():
        raise ValueError(f"{file} does not exist: name the --tokenizer")
    if file.suffix == ".bin":
        return _Merges(file), [_BEGIN], [_END]
    import tokenizers

    held = tokenizers.Tokenizer.from_file(str(file))
    ends = [held.token_to_id(name) for name in ("</s>", "<|im_end|>", "<|end_of_text|>")]
    begin = [held.token_to_id(name) for name in ("<s>", "<|begin_of_text|>")]

    class Hub:
        def encode(self, text: str) -> list[int]:
            return held.encode(text, add_special_tokens=False).ids

    first = [one for one in begin if one is not None][:1]
    return Hub(), first, [one for one in ends if one is not None][:1]


class _Merges:
    """llama2.c's: pieces with scores, merged pair by pair, the best score first."""

    def __init__(self, file: pathlib.Path) -> None:
        data, at = file.read_bytes(), 4
        self._pieces: dict[bytes, int] = {}
        self._scores: list[float] = []
        while at < len(data):
            score, size = struct.unpack_from("fi", data, at)
            self._pieces.setdefault(data[at + 8 : at + 8 + size], len(self._scores))
            self._scores.append(score)
            at += 8 + size
        self._memory: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Word by word, each with the space before it: no piece has one further in."""
        found = []
        for word in re.findall(" ?[^ ]+| ", f" {text}"):
            if word not in self._memory:
                self._memory[word] = self._word(word)
            found += self._memory[word]
        return found

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        pieces: list[bytes] = []
        for letter in word:
            raw = letter.encode()
            known = raw in self._pieces
            pieces += [raw] if known else [bytes([byte]) for byte in raw]
            ids += [self._pieces[raw]] if known else [byte + 3 for byte in raw]
        while True:
            joined = [a + b for a, b in itertools.pairwise(pieces)]
            candidates = [
                (self._scores[self._pieces[piece]], -place)
                for place, piece in enumerate(joined)
                if piece in self._pieces
            ]
            if not candidates:
                return ids
            place = -max(candidates)[1]
            piece = joined[place]
            pieces[place : place + 2] = [piece]
            ids[place : place + 2] = [self._pieces[piece]]
