"""Safetensors and JSON in a folder, read by name and written."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from raclora_jax._extras import extra

with extra("peft"):
    import safetensors
    from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_KINDS = (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)


class _Place(NamedTuple):
    """Where an array lies."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Tensors(Mapping[str, np.ndarray]):
    """The arrays of a model's or an adapter's folder, each read when it is asked for.

    Args:
      folder: With ``{stem}.safetensors``, or the index of several such files; ``None``
        holds nothing.
      stem: ``"model"`` or ``"adapter_model"``.

    Raises:
      FileNotFoundError: If there is no such file; pickled weights are refused by name.
      ValueError: If a file is cut short, or the index and its files disagree.
    """

    def __init__(self, folder: pathlib.Path | None, stem: str) -> None:
        self._places: dict[str, _Place] = {}
        if folder is None:
            return
        whole, index = (
            folder / f"{stem}.safetensors",
            folder / f"{stem}.safetensors.index.json",
        )
        if whole.exists():
            self._places = _header(whole)
        elif index.exists():
            self._read_shards(index)
        else:
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            why = f"; {pickled[0]} is pickled and never loaded" if pickled else ""
            raise FileNotFoundError(f"{folder} has no {whole.name}{why}")

    def _read_shards(self, index: pathlib.Path) -> None:
        stated = read_json(index).get("weight_map")
        if not isinstance(stated, dict):
            raise ValueError(f"{index} has no weight_map from names to files")
        for name, file in stated.items():
            # An index is somebody else's file: a path in it could lead out of the folder.
            if not (isinstance(file, str) and file and pathlib.Path(file).name == file):
                raise ValueError(
                    f"{index}: the file of {name} is {file!r}, expected the name of one "
                    "beside the index"
                )
        for file in sorted(set(stated.values())):
            for name, place in _header(index.with_name(file)).items():
                if name in self._places:
                    other = self._places[name].file.name
                    raise ValueError(
                        f"{index}: {name} is in {other} and in {file}; take it out of one"
                    )
                self._places[name] = place
        for name, file in stated.items():
            if name not in self._places or self._places[name].file.name != file:
                raise ValueError(f"{index}: {name} is not in {file}; fetch both again")

    def __getitem__(self, name: str) -> np.ndarray:
        file, code, shape, offset = self._places[name]
        if code not in _TYPES:
            raise ValueError(
                f"{file}: {name} is stored as {code}, which is not read here; save it "
                "dequantised, with the library that wrote it"
            )
        count = math.prod(shape)
        return np.fromfile(file, _TYPES[code], count, offset=offset).reshape(shape)

    def where(self, name: str) -> str:
        """The file and the name, for messages."""
        return f"{self._places[name].file}: {name}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one array, which is not read for it."""
        return self._places[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _header(file: pathlib.Path) -> dict[str, _Place]:
    """What a file says that it holds, after its package has found it whole."""
    try:
        if not file.is_file():
            raise ValueError(f"{file} is missing, or no file; fetch it again")
        with safetensors.safe_open(file, "numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole safetensors file ({error}); fetch it again"
        ) from error
    # 8 bytes of size, JSON of that size, arrays: offsets count from the end of the JSON.
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        stated = json.loads(opened.read(size))
    return {
        name: _Place(
            file, one["dtype"], tuple(one["shape"]), 8 + size + one["data_offsets"][0]
        )
        for name, one in stated.items()
        if name != "__metadata__"
    }


def cast(array: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """The numbers in another dtype of their kind.

    Raises:
      ValueError: If they are no such numbers, such as the codes of a quantised model, or
        are beyond the range of the dtype.
    """
    dtype = jnp.dtype(dtype)
    if array.dtype == dtype:
        return array
    same = any(
        jnp.issubdtype(array.dtype, kind) and jnp.issubdtype(dtype, kind)
        for kind in _KINDS
    )
    exact = jnp.issubdtype(dtype, jnp.integer)
    if not same or (not exact and array.dtype.itemsize == 1):
        raise ValueError(
            f"{what} is stored as {array.dtype}, expected numbers for {dtype}: codes of "
            "a quantised model are no weights; save it dequantised, with the library "
            "that wrote it"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        found = array.astype(dtype)
    lost = found != array if exact else np.isfinite(array) & ~np.isfinite(found)
    if lost.any():
        raise ValueError(f"{what} holds numbers beyond the range of {dtype}")
    return found


def read_json(file: pathlib.Path, kind: type = dict) -> Any:
    """A JSON object, or another kind, or one line about what is there instead."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} is no JSON that can be read ({error})") from error
    if not isinstance(found, kind):
        raise ValueError(
            f"{file} holds a {type(found).__name__}, expected a {kind.__name__}"
        )
    return found


def save(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file, read by PyTorch as well; every array is made contiguous first."""
    whole = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    for name, array in whole.items():
        if array.dtype not in map(jnp.dtype, _TYPES.values()):
            raise ValueError(
                f"{name} is {array.dtype}, which safetensors does not hold; cast it first"
            )
    try:
        save_file(whole, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{file} could not be written ({error})") from error


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
