"""Folders: what one of the hub says of itself, and how ours come to be whole."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import tokenizers

PROGRAMS = {
    **dict.fromkeys(("bert", "roberta"), "finetune_glue.py"),
    **dict.fromkeys(("llama", "qwen3", "qwen3_moe", "gemma3_text"), "finetune_llm.py"),
}


def check_program(folder: pathlib.Path, program: str) -> None:
    """Refuses a model that another program of the examples fine-tunes.

    Raises:
      ValueError: If there is one, by its name.
    """
    kind = stated(folder).get("model_type")
    other = PROGRAMS.get(kind) if isinstance(kind, str) else None
    if other not in (None, program):
        raise ValueError(
            f"{folder / 'config.json'}: model_type {kind} is fine-tuned by "
            f"examples/{other}, not by {program}"
        )


def stated(folder: pathlib.Path, name: str = "config.json") -> dict[str, Any]:
    """What a JSON file of a folder states; nothing if only another file is missing.

    Raises:
      ValueError: If there is no config, or the file is no JSON object.
    """
    file = folder / name
    if not file.exists():
        if name != "config.json":
            return {}
        raise ValueError(f"{folder} has no config.json: it is no model's folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object")
    return found


def tokenizer(file: pathlib.Path) -> tokenizers.Tokenizer:
    """What a ``tokenizer.json`` describes.

    Raises:
      ValueError: If it is missing or describes none.
    """
    if not file.exists():
        raise ValueError(f"{file} does not exist: the folder has no tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises no narrower one
        raise ValueError(f"{file} describes no tokenizer ({error})") from error


@contextlib.contextmanager
def whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place to fill; it takes the folder's name when all went well, and not before."""
    partial, old = (
        folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "old")
    )
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
