"""Adapters that PEFT wrote, read."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree
from raclora_jax.peft._config import Config
from raclora_jax.peft._files import Tensors, cast
from raclora_jax.peft._format import FILE, PREFIX, keys, modules, wrapper
from raclora_jax.peft._pairs import Adapter, Pair
from raclora_jax.peft._targets import (
    Target,
    View,
    from_torch,
    to_torch,
    torch_shapes,
    views,
    window_first,
)
from raclora_jax.peft._ties import check_one, check_told

_PLAIN_EXPERTS = (0, 19, 1)  # since this version of PEFT experts lie as written here


def load_adapter(
    directory: str | os.PathLike[str],
    params: PyTree,
    spec: Spec | int,
    names: Mapping[str, Target],
) -> Adapter:
    """Reads an adapter that PEFT wrote, its scaling multiplied in.

    ``merged`` adds it to the weights, and a chain goes on from there.

    Args:
      directory: The folder with ``adapter_config.json``.
      params: The weights that it changes.
      spec: Says the views of the leaves.
      names: ``{path: Target}``; see ``targets``.

    Returns:
      The ``Adapter``. Of a stacked leaf, layers without an adapter have a pair of zeros,
      and those of lower rank are filled up with them.

    Raises:
      FileNotFoundError: If the files are not there; pickled ones are never loaded.
      ValueError: If the adapter is no LoRA, a key of it matches no leaf, a factor is
        missing, rank and shape disagree, or a tied leaf cannot hold what it does.

    Example:
      See ``save_adapter``.
    """
    folder = pathlib.Path(directory)
    config = Config(folder)
    stored = Tensors(folder, FILE)
    tensors = {key: _finite(stored[key], stored.where(key)) for key in stored}
    leaves, _ = paths.flatten(params)
    found = views(params, spec, names)
    reader = _Reader(tensors, config, names.values())
    adapter = Adapter(
        {
            path: pair
            for path, target in names.items()
            if (pair := reader.pair(path, found[path], target)) is not None
        },
        {
            path: change
            for path, target in names.items()
            if (change := reader.change(path, leaves[path], found[path], target))
            is not None
        },
    )
    check_told((*adapter.pairs, *adapter.dense), leaves, names)
    for path, target in names.items():
        if target.tied:
            follows = config["ensure_weight_tying"]
            reader.used |= check_one(path, target, tensors, str(config.file), follows)
        reader.base(path, leaves[path], found[path], target)
        reader.check_all_there(path, found[path], target)
    rest = sorted(set(tensors) - reader.used)
    if rest:
        raise ValueError(
            f"{folder}: {rest[0]} matches no leaf{_and_more(rest)}; give the leaf that "
            "it changes this name, without the prefix "
            f"{PREFIX!r}. The names are {', '.join(t.name for t in names.values())}"
        )
    return adapter


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    """In float32; a number that is none makes an adapter of nothing else."""
    found = cast(array, np.float32, what)
    if not np.isfinite(found).all():
        raise ValueError(f"{what} holds numbers that are not finite; fetch it again")
    return found


def _and_more(rest: list[str]) -> str:
    return f", nor do {len(rest) - 1} others" if len(rest) > 1 else ""


class _Reader:
    """The arrays of an adapter, and which of them were asked for."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        config: Config,
        names: Iterable[Target],
    ) -> None:
        self._tensors, self._config = tensors, config
        self._fused = [
            target
            for target in names
            if target.kind == "experts" and config.adapts_parameter(target.name)
        ]
        self.used: set[str] = set()

    def pair(self, path: str, view: View, target: Target) -> Pair | None:
        """Of a leaf, if the file has any factor of it."""
        if target.kind == "plain":
            return None
        if target.kind == "experts":
            return self._experts(path, view, target)
        found = [
            self._module(path, module, view, target) for module in modules(view, target)
        ]
        rank = max((one[0].shape[0] for one in found if one is not None), default=0)
        if not rank:
            return None
        sides = []
        for number, axes in enumerate((view.rows, view.cols)):
            sizes = view.sizes(axes)
            # One array for the stack: modules of less rank, or without a pair, get zeros.
            side = np.zeros((len(found), rank, math.prod(sizes)), np.float32)
            for index, one in enumerate(found):
                if one is not None:
                    side[index, : len(one[number])] = one[number]
            sides.append(side.reshape(*view.sizes(view.batch), rank, *sizes))
        return Pair(jnp.asarray(sides[0]), jnp.asarray(sides[1]), len(view.batch))

    def base(self, path: str, leaf: Any, view: View, target: Target) -> None:
        """The weights beside a pair, which PEFT saves of embeddings and heads."""
        names = list(torch_shapes(view, target))
        for name in (*names, *([target.tied] if target.tied else ())):
            key = _beside(name)
            if key not in self._tensors or key in self.used:
                continue
            self.used.add(key)
            one = names[0] if name == target.tied else name
            own = to_torch(np.asarray(jax.device_get(leaf)), view, target, one)
            saved = self._tensors[key]
            near = 2.0**-7 * np.abs(saved)  # either may have been rounded to bfloat16
            if own.shape != saved.shape or (np.abs(own - saved) > near).any():
                raise ValueError(
                    f"leaf {paths.show(path)}: {key} is another matrix: the adapter was "
                    "trained beside other weights; load those"
                )

    def change(self, path: str, leaf: Any, view: View, target: Target) -> Array | None:
        """Of a leaf that is saved whole, or of a bias beside an adapted matrix."""
        expected = torch_shapes(view, target)
        own = np.asarray(jax.device_get(leaf))
        found = {}
        for name, shape in expected.items():
            change = self._whole(path, name, own, view, target)
            beside = self._bias(path, name, shape)
            if change is not None or beside is not None:
                zero = np.zeros(shape, np.float32)
                found[name] = (zero if change is None else change) + (
                    zero if beside is None else beside
                )
        if not found:
            return None
        zeros = {name: np.zeros(shape, np.float32) for name, shape in expected.items()}
        return jnp.asarray(from_torch(zeros | found, path, view, target))

    def _whole(
        self, path: str, name: str, leaf: np.ndarray, view: View, target: Target
    ) -> np.ndarray | None:
        """What a parameter is off the leaf where the file has it whole."""
        key = PREFIX + name
        trained = self._config["bias"] != "none" and name.endswith(".bias")
        if key not in self._tensors and trained:
            key = _beside(name)
        if key not in self._tensors:
            return None
        self.used.add(key)
        saved, own = self._tensors[key], to_torch(leaf, view, target, name)
        if saved.shape != own.shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected {key} of shape {own.shape}, got "
                f"{saved.shape}"
            )
        return saved - own.astype(np.float32)

    def _bias(self, path: str, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """What the bias of ``lora_B`` adds."""
        module, _, kind = name.rpartition(".")
        key = f"{PREFIX}{module}.lora_B.bias"
        if kind != "bias" or key not in self._tensors:
            return None
        self.used.add(key)
        beside, saved = keys(module, "linear")[0], self._tensors[key]
        if beside not in self._tensors or not self._tensors[beside].ndim:
            raise ValueError(f"leaf {paths.show(path)}: {key} is there without {beside}")
        if saved.shape != shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected {key} of shape {shape}, got "
                f"{saved.shape}"
            )
        return self._scaled(saved, module, len(self._tensors[beside]))

    def check_all_there(self, path: str, view: View, target: Target) -> None:
        """Refuses a file without what its config names."""
        config = self._config
        if target.kind == "experts":
            module = wrapper(target, self._fused) if target in self._fused else ""
            if module and not self.used.issuperset(keys(module, "experts")):
                raise self._lacking(path, "target_parameters", target.name)
            return
        for name in torch_shapes(view, target):
            module, _, kind = name.rpartition(".")
            first, _ = keys(module, target.kind)
            bias = config["bias"]
            if config.saves(module) and PREFIX + name not in self.used:
                raise self._lacking(path, "modules_to_save", name)
            adapted = config.adapts(module)
            if target.kind != "plain" and adapted and first not in self.used:
                raise self._lacking(path, "target_modules", module)
            if (
                kind == "bias"
                and (bias == "all" or (bias == "lora_only" and adapted))
                and not self.used & {PREFIX + name, _beside(name)}
            ):
                raise self._lacking(path, "bias", name)

    def _lacking(self, path: str, entry: str, name: str) -> ValueError:
        return ValueError(
            f"leaf {paths.show(path)}: {self._config.file} names {name} by {entry}, and "
            "the file has nothing of it; fetch it again, or take it out of the config"
        )

    def _module(
        self, path: str, module: str, view: View, target: Target
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """``(rank, in)`` and ``(rank, out)``, scaled; ``None`` if it has no adapter."""
        read = self._both(path, module, target.kind)
        if read is None:
            return None
        # As PyTorch has a linear layer: down (rank, in), up (out, rank).
        down, up = read
        rank = len(down)
        if target.kind == "conv" and down.ndim > 2 and up.ndim == down.ndim:
            down, up = window_first(down), up.reshape(len(up), -1)
        expected = tuple(math.prod(view.sizes(axes)) for axes in (view.rows, view.cols))
        if down.shape[1:] != expected[:1] or up.shape != (expected[1], rank):
            raise ValueError(
                f"leaf {paths.show(path)}: the factors of {module} are {down.shape} and "
                f"{up.shape}, expected {(rank, expected[0])} and {(expected[1], rank)}"
            )
        return down, self._scaled(up.T, module, rank)

    def _both(
        self, path: str, module: str, kind: str
    ) -> tuple[np.ndarray, np.ndarray] | None:
        both = keys(module, kind)
        here = [key for key in both if key in self._tensors]
        if not here:
            return None
        if len(here) == 1:
            missing = both[0] if here[0] == both[1] else both[1]
            raise ValueError(f"leaf {paths.show(path)}: the file has no {missing}")
        self.used |= set(both)
        first, second = (self._tensors[key] for key in both)
        for key, factor in zip(both, (first, second), strict=True):
            if factor.ndim < 2 or not factor.size:
                raise ValueError(
                    f"leaf {paths.show(path)}: {key} has the shape {factor.shape}, "
                    "expected a matrix"
                )
        return first, second

    def _experts(self, path: str, view: View, target: Target) -> Pair | None:
        if target not in self._fused:
            return None
        read = self._both(path, wrapper(target, self._fused), "experts")
        if read is None:
            return None
        (experts,) = view.sizes(view.batch)
        rows, cols = view.sizes(view.rows), view.sizes(view.cols)
        if math.prod(rows) == math.prod(cols) and self._config.version < _PLAIN_EXPERTS:
            raise ValueError(
                f"leaf {paths.show(path)}: square experts, and the config has "
                f"peft_version {self._config['peft_version']!r}: before 0.19.1 they "
                "were written transposed; save the adapter again with a newer PEFT"
            )
        rank, left = divmod(len(read[0]), experts)
        expected = (len(read[0]), math.prod(rows)), (math.prod(cols), experts * rank)
        if left or (read[0].shape, read[1].shape) != expected:
            raise ValueError(
                f"leaf {paths.show(path)}: the factors of {target.name} are "
                f"{read[0].shape} and {read[1].shape}, expected {expected[0]} and "
                f"{expected[1]} for {experts} experts"
            )
        # read[0] (experts x rank, in), read[1] (out, rank x experts): the experts are the
        # slow part of one axis and the fast part of the other.
        down = read[0].reshape(experts, rank, *rows)
        up = read[1].reshape(-1, rank, experts).transpose(2, 1, 0)
        up = self._scaled(up.reshape(experts, rank, *cols), target.name, rank)
        return Pair(jnp.asarray(down), jnp.asarray(up), 1)

    def _scaled(self, factor: np.ndarray, module: str, rank: int) -> np.ndarray:
        """A factor by its scaling, in range."""
        with np.errstate(over="ignore"):
            found = np.float32(self._config.scaling(module, rank)) * factor
        if not np.isfinite(found).all():
            raise ValueError(
                f"{self._config.file}: the factors of {module} by its lora_alpha are "
                "beyond the range of float32"
            )
        return found


def _beside(name: str) -> str:
    """Where PEFT keeps a parameter of a module that it adapts."""
    module, _, kind = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{kind}"
