"""Whole models: weights read from a folder of the hub's layout, and written as one."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from raclora_jax._core import paths
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree
from raclora_jax.peft._files import Tensors, cast, read_json, save_sharded
from raclora_jax.peft._folder import copy_folder, new_folder
from raclora_jax.peft._targets import Target, from_torch, to_torch, torch_shapes, views

# What libraries of quantised models keep beside the codes of a module's weight.
_SCALES = (
    "SCB",
    "weight.absmax",
    "weight.quant_map",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx"}


def parameters(directory: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a folder's parameters; none of them is read.

    Args:
      directory: The folder, with ``model.safetensors`` or its shards.

    Returns:
      ``{name: shape}``.

    Raises:
      FileNotFoundError: If there are no such files; pickled ones are never loaded.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> W, names = {"kernel": jnp.ones((3, 2))}, {"kernel": Target("head.weight")}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     parameters(save_model(f"{folder}/model", W, 1, names))
      {'head.weight': (2, 3)}
    """
    tensors = Tensors(pathlib.Path(directory), "model")
    return {name: tensors.shape(name) for name in tensors}


def load_model(
    directory: str | os.PathLike[str],
    like: PyTree,
    spec: Spec | int,
    names: Mapping[str, Target],
) -> PyTree:
    """The weights of a folder with ``model.safetensors``, or its shards, as a tree.

    Parameters of the folder that no leaf is named after are left out.

    Args:
      directory: The folder.
      like: The weights, or their shapes and dtypes: the tree to fill.
      spec: Says the views of the leaves.
      names: ``{path: Target}`` of every leaf; see ``targets``.

    Returns:
      The tree of ``like``, in its dtypes.

    Raises:
      FileNotFoundError: If there are no such files; pickled ones are never loaded.
      ValueError: If a leaf has no name, or a parameter is missing or of another shape.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> W = {"kernel": jnp.arange(6.0).reshape(3, 2)}
      >>> names = {"kernel": Target("head.weight")}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = save_model(f"{folder}/model", W, 1, names)
      ...     again = load_model(saved, W, 1, names)
      >>> bool((again["kernel"] == W["kernel"]).all())
      True
    """
    leaves, treedef = paths.flatten(like)
    found = views(like, spec, names)
    read = Tensors(pathlib.Path(directory), "model")
    dtypes = {p: jax.dtypes.canonicalize_dtype(leaf.dtype) for p, leaf in leaves.items()}

    def one(path: str) -> jax.Array:
        if path not in names:
            raise ValueError(
                f"leaf {paths.show(path)} has no name in the folder; add it to names"
            )
        leaf = from_torch(read, path, found[path], names[path])
        for name in torch_shapes(found[path], names[path]):
            check_plain(read, name)
        tied = names[path].tied
        if tied and tied in read and not np.array_equal(read[tied], leaf):
            raise ValueError(
                f"leaf {paths.show(path)} is {names[path].name} and the tied {tied}, and "
                f"{read.where(tied)} is another matrix: untie them, so that the head has "
                "a leaf of its own, or drop the parameter"
            )
        return jnp.asarray(cast(leaf, dtypes[path], f"{directory}: leaf {path}"))

    return paths.unflatten(treedef, {path: one(path) for path in leaves})


def save_model(
    directory: str | os.PathLike[str],
    params: PyTree,
    spec: Spec | int,
    names: Mapping[str, Target],
    *,
    like: str | os.PathLike[str] | None = None,
    most_bytes: int = 5 * 10**9,
) -> pathlib.Path:
    """Writes merged weights as a folder that ``from_pretrained`` loads.

    What ``like`` holds beside weights (config, tokenizer, folders of further modules) is
    copied, but for hidden folders, and parameters of it that no leaf is named after are
    taken over, so that none is missing. A copy of a named one goes with it, such as a
    head that is tied to the embedding, unless the config has ``tie_word_embeddings``
    false. Weights in folders that ``modules.json`` does not name are copied with a
    warning: another form of the same model holds what was before. All is written
    beside, read back and compared, and only then gets its name.

    Args:
      directory: The folder to make.
      params: The weights.
      spec: Says the views of the leaves.
      names: ``{path: Target}`` of every leaf; see ``targets``.
      like: The folder the model came from.
      most_bytes: Of one file.

    Returns:
      The folder.

    Raises:
      FileExistsError: If the folder exists.
      ValueError: If a leaf has no name, two leaves have one, or ``like`` has another
        shape for a parameter.

    Example:
      See ``load_model``.
    """
    tensors = _Written(params, spec, names, like)
    with new_folder(pathlib.Path(directory)) as folder:
        if like is not None:
            copy_folder(pathlib.Path(like), folder)
            for file in list(folder.iterdir()):
                if file.is_file() and _is_weights(file):
                    file.unlink()
            _warn_of_other_weights(folder)
        save_sharded(folder, tensors, most_bytes)
        _compare(tensors, Tensors(folder, "model"))
    return pathlib.Path(directory)


def _is_weights(file: pathlib.Path) -> bool:
    return bool(_WEIGHTS & set(file.suffixes))


def _warn_of_other_weights(folder: pathlib.Path) -> None:
    file = folder / "modules.json"
    modules = read_json(file, list) if file.exists() else []
    own = {str(one.get("path")) for one in modules if isinstance(one, dict)}
    others = (path.relative_to(folder) for path in folder.rglob("*") if _is_weights(path))
    spare = sorted(str(path) for path in others if path.parts[0] not in own)
    if spare:
        warnings.warn(
            f"{', '.join(spare[:3])}{' and more' * (len(spare) > 3)} went along as it "
            "is: if it is another form of this model, it holds the weights of before",
            stacklevel=4,
        )


def _compare(written: _Written, read: Mapping[str, np.ndarray]) -> None:
    for name in written:
        one, other = written[name], read[name]
        if one.dtype != other.dtype or one.tobytes() != other.tobytes():
            raise ValueError(
                f"{name} came back from its file as something else; nothing was kept"
            )
        if not written.is_taken_over(name) and (one != one).any():
            raise ValueError(f"{name} holds NaN; nothing was kept")


def check_plain(read: Tensors, name: str) -> None:
    """Refuses a parameter with scales beside it.

    Raises:
      ValueError: If it is a code, or part of one.
    """
    module = name.rpartition(".")[0]
    scales = [f"{module}.{end}" for end in _SCALES if f"{module}.{end}" in read]
    if scales and name.endswith(".weight"):
        raise ValueError(
            f"{read.where(name)} has {scales[0]} beside it: codes of a quantised "
            "model are no weights; save it dequantised, with the library that wrote it"
        )


class _Written(Mapping[str, np.ndarray]):
    """The parameters to write, each made when it is asked for."""

    def __init__(
        self,
        params: PyTree,
        spec: Spec | int,
        names: Mapping[str, Target],
        like: str | os.PathLike[str] | None,
    ) -> None:
        self._leaves, _ = paths.flatten(params)
        self._views, self._names = views(params, spec, names), names
        self._base = Tensors(None if like is None else pathlib.Path(like), "model")
        self._owner: dict[str, str] = {}
        for path, leaf in self._leaves.items():
            if path not in names:
                raise ValueError(
                    f"leaf {paths.show(path)} has no name in the folder; add it to names"
                )
            view = self._views[path]
            for name, shape in torch_shapes(view, names[path]).items():
                if name in self._owner:
                    raise ValueError(
                        f"leaves {paths.show(self._owner[name])} and {paths.show(path)} "
                        f"are both named {name}; a tied weight is one leaf"
                    )
                if name in self._base and self._base.shape(name) != shape:
                    raise ValueError(
                        f"leaf {paths.show(path)} of shape {leaf.shape} gives {name} the "
                        f"shape {shape}, and the folder has {self._base.shape(name)}"
                    )
                self._owner[name] = path
                if name in self._base:
                    check_plain(self._base, name)
        self._copies = {} if like is None else self._copied(pathlib.Path(like))
        for target in names.values():
            if target.tied and target.tied in self._base:
                self._copies[target.tied] = target.name

    def _copied(self, like: pathlib.Path) -> dict[str, str]:
        """Parameters without a leaf that are copies, and of which one each is."""
        config = like / "config.json"
        if config.exists() and not read_json(config).get("tie_word_embeddings", True):
            return {}
        owned = [name for name in self._owner if name in self._base]
        copies: dict[str, str] = {}
        for name in self._base:
            shape = self._base.shape(name)
            same = [other for other in owned if self._base.shape(other) == shape]
            if name in self._owner or len(shape) < 2 or not same:
                continue
            array = self._base[name]
            if (array == array.flat[0]).all():  # zeros are nobody's copy
                continue
            for other in same:
                if np.array_equal(array, self._base[other]):
                    copies[name] = other
        return copies

    def is_taken_over(self, name: str) -> bool:
        """Whether it is the base's own."""
        return self._copies.get(name, name) not in self._owner

    def __getitem__(self, name: str) -> np.ndarray:
        name = self._copies.get(name, name)
        if name not in self._owner:
            return self._base[name]
        path = self._owner[name]
        leaf = np.asarray(jax.device_get(self._leaves[path]))
        return to_torch(leaf, self._views[path], self._names[path], name)

    def __iter__(self) -> Iterator[str]:
        yield from self._owner
        yield from (name for name in self._base if name not in self._owner)

    def __len__(self) -> int:
        return len(set(self._owner) | set(self._base))
