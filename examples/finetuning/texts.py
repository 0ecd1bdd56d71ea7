"""Texts for a decoder: plain, or prompts with their completions, packed into rows."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import NamedTuple, Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without marks at its ends."""


class Rows(NamedTuple):
    """Packed rows ``(count, length + 1)``.

    Attributes:
      ids: Tokens.
      text: Which text of the row a token is of, from 1; 0 behind the last.
      judged: Whether a token is to be foretold.
    """

    ids: np.ndarray
    text: np.ndarray
    judged: np.ndarray


def read(file: pathlib.Path) -> list[tuple[str, str]]:
    """``(prompt, completion)`` of every line of JSONL; a plain text is one completion.

    Raises:
      ValueError: If the file is missing, empty, no UTF-8, or a line lacks a field.
    """
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as opened:
            whole = opened.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is no whole text in UTF-8 ({error})") from error
    if not whole.strip():
        raise ValueError(f"{file} is empty")
    if ".jsonl" not in file.name:
        return [("", whole)]
    pairs = []
    for number, line in enumerate(whole.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((str(row["prompt"]), str(row["completion"])))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no field {error}") from error
    return pairs


def pack(
    pairs: list[tuple[str, str]],
    tokenizer: Tokenizer,
    length: int,
    begin: list[int],
    end: list[int],
) -> tuple[Rows, int]:
    """Fills rows with texts one behind another, and says how many were cut.

    A plain text runs on from row to row. Of prompt and completion each pair stands in
    one row whole, or is cut at its end.
    """
    size = length + 1
    if len(pairs) == 1 and not pairs[0][0]:
        ids = np.array(tokenizer.encode(pairs[0][1]), np.int32)
        count = (len(ids) - 1) // length
        if count < 1:
            raise ValueError(
                f"the text has {len(ids)} tokens, fewer than one row of {size}"
            )
        at = np.arange(count)[:, None] * length + np.arange(size)
        every = np.ones((count, size), np.int32)
        return Rows(ids[at], every, every.astype(bool)), 0
    rows: list[list[tuple[list[int], int]]] = [[]]
    held = cut = 0
    for prompt, completion in pairs:
        before = [*begin, *tokenizer.encode(prompt)]
        ids = [*before, *tokenizer.encode(completion), *end]
        cut += len(ids) > size
        ids = ids[:size]
        if held + len(ids) > size:
            rows.append([])
            held = 0
        rows[-1].append((ids, len(before)))
        held += len(ids)
    packed = Rows(
        *(np.zeros((len(rows), size), kind) for kind in (np.int32, np.int32, bool))
    )
    for row, texts in enumerate(rows):
        at = 0
        for number, (ids, before) in enumerate(texts, 1):
            packed.ids[row, at : at + len(ids)] = ids
            packed.text[row, at : at + len(ids)] = number
            packed.judged[row, at + before : at + len(ids)] = True
            at += len(ids)
    return packed, cut


def inputs(rows: Rows) -> tuple[np.ndarray, ...]:
    """Ids, places, who sees whom, targets, and which of these count.

    A token sees those before it of its own text, and places begin anew with each text.
    """
    ids, text = rows.ids[:, :-1], rows.text[:, :-1]
    first = np.concatenate(
        [np.ones((len(text), 1), bool), text[:, 1:] != text[:, :-1]], axis=1
    )
    index = np.arange(text.shape[1])
    places = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
    same = text[:, :, None] == text[:, None, :]
    seen = same & (index[:, None] >= index[None, :])
    counts = rows.judged[:, 1:] & (rows.text[:, 1:] == text)
    return ids, places.astype(np.int32), seen, rows.ids[:, 1:], counts
