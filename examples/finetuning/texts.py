"""Texts for a decoder: plain, or prompts with their completions, packed into rows."""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib
from typing import NamedTuple, Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without marks at its ends."""


class Left(NamedTuple):
    """What of the texts is not in the rows.

    Attributes:
      cut: How many pairs lack the end of their completion.
      out: How many are left out, since their prompt fills a row.
    """

    cut: int
    out: int


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
        with opener(file, "rt", encoding="utf-8-sig") as opened:
            whole = opened.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no whole text in UTF-8 ({error})") from error
    if not whole.strip():
        raise ValueError(f"{file} is empty")
    if ".jsonl" not in file.name:
        return [("", whole)]
    pairs = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = row["prompt"], row["completion"]
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no field {error}") from error
        for text in pair:
            if not isinstance(text, str):
                raise ValueError(f"{file}, line {number}: {text!r} is no text")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{file} holds no row")
    return pairs


def pack(
    pairs: list[tuple[str, str]],
    tokenizer: Tokenizer,
    length: int,
    begin: list[int],
    end: list[int],
) -> tuple[Rows, Left]:
    """Fills rows with texts one behind another, and says what did not fit.

    A plain text runs on from row to row. Of prompt and completion each pair stands in
    one row whole, or is cut at its end.

    Raises:
      ValueError: If not one row is filled, or a completion has no mark for its end.
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
        return Rows(ids[at], every, every.astype(bool)), Left(0, 0)
    if not end:
        raise ValueError(
            "the tokenizer names no token that ends a completion: state eos_token in "
            "tokenizer_config.json"
        )
    rows: list[list[tuple[list[int], int]]] = []
    held, cut, out = size, 0, 0
    for prompt, completion in pairs:
        before, behind = _apart(tokenizer, prompt, completion)
        before = [*begin, *before]
        if len(before) >= size:
            out += 1
            continue
        ids = [*before, *behind, *end]
        cut += len(ids) > size
        ids = ids[:size]
        if held + len(ids) > size:
            rows.append([])
            held = 0
        rows[-1].append((ids, len(before)))
        held += len(ids)
    if not rows:
        raise ValueError(
            f"every prompt fills its row, with no place for a completion in {size} "
            "tokens: raise --length"
        )
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
    return packed, Left(cut, out)


def _apart(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of what a model is to say behind them.

    These are what the whole text has behind the prompt's ids; or, where pieces reach
    over the seam, the completion's own.
    """
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer.encode(completion)


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
