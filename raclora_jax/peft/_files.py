"""Safetensors in a folder: read by name, written beside and renamed."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"


class Tensors(Mapping[str, np.ndarray]):
    """The arrays of a model's or an adapter's folder, each read when it is asked for.

    Args:
      folder: With ``{stem}.safetensors``, or the index of several such files; ``None``
        holds nothing.
      stem: ``"model"`` or ``"adapter_model"``.

    Raises:
      FileNotFoundError: If there is no such file; pickled weights are refused by name.
      ValueError: If a file is cut short or the index names one that is missing.
    """

    def __init__(self, folder: pathlib.Path | None, stem: str) -> None:
        self._where: dict[str, pathlib.Path] = {}
        if folder is None:
            return
        whole, index = (
            folder / f"{stem}.safetensors",
            folder / f"{stem}.safetensors.index.json",
        )
        if whole.exists():
            self._add(whole)
        elif index.exists():
            for name in sorted(set(read_json(index)["weight_map"].values())):
                if not (folder / name).exists():
                    raise ValueError(f"{index} names {name}, which is missing")
                self._add(folder / name)
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            why = f"; {pickled[0]} is pickled and never loaded" if pickled else ""
            raise FileNotFoundError(f"{folder} has no {whole.name}{why}")

    def _add(self, file: pathlib.Path) -> None:
        try:
            with safe_open(file, "numpy") as opened:
                self._where |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is no whole safetensors file ({error}); fetch it again"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        with safe_open(self._where[name], "numpy") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one array, which is not read for it."""
        with safe_open(self._where[name], "numpy") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object, or one line about what is there instead."""
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected an object")
    return found


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill that gets its name when all went well, and else is gone.

    Raises:
      FileExistsError: If the name is taken: nothing is written over.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is left as it is; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file, read by PyTorch as well; every array is made contiguous first."""
    whole = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def save_sharded(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], most_bytes: int
) -> None:
    """``model.safetensors``, or several with their index where one would be too large."""
    shards: list[list[str]] = [[]]
    held = total = 0
    for name in tensors:
        size = tensors[name].nbytes
        if shards[-1] and held + size > most_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held, total = held + size, total + size
    if len(shards) == 1:
        save(folder / "model.safetensors", dict(tensors))
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save(folder / file, {name: tensors[name] for name in names})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
