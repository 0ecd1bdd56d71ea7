"""Labelled texts of a table, TSV or JSONL, gzipped or not; columns by name or number."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

from finetuning import folders


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a table has its texts, one or a pair, and its label.

    A column is a name of the header, or the number of one in a table without a header.
    """

    texts: tuple[str, ...]
    label: str

    def __post_init__(self) -> None:
        if len(self.texts) > 2:
            raise ValueError(
                f"{', '.join(self.texts)} are {len(self.texts)} columns of texts: a "
                "model reads one text or a pair"
            )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts and labels as the table has them."""

    texts: list[tuple[str, ...]]
    labels: list[str]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Ids and segment ids ``(count, length)``, padded, and targets ``(count,)``."""

    ids: np.ndarray
    types: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray | slice) -> tuple[np.ndarray, ...]:
        """Some rows."""
        return self.ids[chosen], self.types[chosen], self.targets[chosen]


def read(file: pathlib.Path, columns: Columns) -> Rows:
    """The rows of a table.

    Raises:
      ValueError: If a column is missing, a row is short, or there is no row.
    """
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    parsed = _jsonl if ".jsonl" in file.name else _tsv
    texts, labels = [], []
    for row in parsed(file, columns):
        *own, label = row
        texts.append(tuple(own))
        labels.append(label)
    if not texts:
        raise ValueError(f"{file} holds no row")
    return Rows(texts, labels)


def _lines(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip("\r\n")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is no whole text in UTF-8 ({error})") from error


def _tsv(file: pathlib.Path, columns: Columns) -> Iterator[list[str]]:
    wanted = (*columns.texts, columns.label)
    lines = _lines(file)
    if all(name.isdecimal() for name in wanted):
        places = [int(name) for name in wanted]
    else:
        header = next(lines, (1, ""))[1].split("\t")
        for name in wanted:
            if name not in header:
                raise ValueError(
                    f"{file} has no column {name!r}; it has {', '.join(header)}"
                )
        places = [header.index(name) for name in wanted]
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) <= max(places):
            raise ValueError(f"{file}, line {number}: {len(cells)} columns only")
        yield [cells[place] for place in places]


def _jsonl(file: pathlib.Path, columns: Columns) -> Iterator[list[str]]:
    for number, line in _lines(file):
        if not line:
            continue
        try:
            row = json.loads(line)
            cells = [row[name] for name in (*columns.texts, columns.label)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no field {error}") from error
        *texts, label = cells
        for name, cell in zip(columns.texts, texts, strict=True):
            if not isinstance(cell, str):
                raise ValueError(f"{file}, line {number}: {name} {cell!r} is no text")
        if not isinstance(label, str | int | float):
            raise ValueError(
                f"{file}, line {number}: the label {label!r} is no text and no number"
            )
        yield [*texts, str(label)]


def labels_of(rows: Rows) -> list[str]:
    """The labels of a classification, in order."""
    found = sorted(set(rows.labels))
    if len(found) > 100:
        raise ValueError(
            f"the label column has {len(found)} values: name another column, or say "
            "--regression"
        )
    return found


def targets(file: pathlib.Path, rows: Rows, labels: list[str] | None) -> np.ndarray:
    """Indices of labels, or numbers where there is no list of labels."""
    if labels is None:
        try:
            found = np.array([float(label) for label in rows.labels], np.float32)
        except ValueError as error:
            raise ValueError(f"{file}: a label is no number ({error})") from error
        if not np.isfinite(found).all():
            raise ValueError(f"{file}: a label is not finite")
        return found
    index = {label: number for number, label in enumerate(labels)}
    for label in rows.labels:
        if label not in index:
            raise ValueError(
                f"{file}: the label {label!r} is outside the set {', '.join(labels)}"
            )
    return np.array([index[label] for label in rows.labels], np.int32)


def encode(
    rows: Rows, wanted: np.ndarray, tokenizer: pathlib.Path, length: int, padding: int
) -> tuple[Encoded, int]:
    """Token ids cut to a length, and how many rows were longer.

    The arrays are as long as the longest row that is left, in eights.
    """
    encoder = folders.tokenizer(tokenizer)
    encoder.no_padding()
    encoder.no_truncation()
    texts = [row if len(row) == 2 else row[0] for row in rows.texts]
    sizes = [len(one.ids) for one in encoder.encode_batch(texts)]
    encoder.enable_truncation(length)
    longest = min(length, -8 * (-max(sizes) // 8))
    encoder.enable_padding(length=longest, pad_id=padding)
    found = encoder.encode_batch(texts)
    ids = np.array([one.ids for one in found], np.int32)
    types = np.array([one.type_ids for one in found], np.int32)
    return Encoded(ids, types, wanted), sum(size > length for size in sizes)
