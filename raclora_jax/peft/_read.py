"""Adapters that PEFT wrote, read."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree
from raclora_jax.peft._files import Tensors, read_json
from raclora_jax.peft._format import CONFIG, FILE, PREFIX, keys, modules, wrapper
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

# What an adapter may ask for that changes what its factors mean.
_FOREIGN = (
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Starts of a pair that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# take the start of theirs out of it.
_STARTS = (None, True, False, "eva", "gaussian", "mica", "orthogonal")
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
        missing, or rank and shape disagree.

    Example:
      See ``save_adapter``.
    """
    folder = pathlib.Path(directory)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is no adapter's folder")
    config = read_json(folder / CONFIG)
    _check_config(folder, config)
    tensors = dict(Tensors(folder, FILE))
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
    for path in adapter.pairs:
        reader.base(path, leaves[path], found[path], names[path])
    rest = sorted(set(tensors) - reader.used)
    if rest:
        raise ValueError(
            f"{folder}: {rest[0]} matches no leaf{_and_more(rest)}; give the leaf that "
            "it changes this name, without the prefix "
            f"{PREFIX!r}. The names are {', '.join(t.name for t in names.values())}"
        )
    return adapter


def _and_more(rest: list[str]) -> str:
    return f", nor do {len(rest) - 1} others" if len(rest) > 1 else ""


def _check_config(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder}: peft_type is {config.get('peft_type')!r}, expected 'LORA'"
        )
    for name in _FOREIGN:
        if config.get(name):
            raise ValueError(
                f"{folder}: {name} changes what the factors mean and is not read; merge "
                "the adapter with the library that made it"
            )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights is {start!r}, so that its factors belong to a "
            "changed base; save it with path_initial_model_for_weight_conversion, or "
            "merge it with the library that made it"
        )


class _Reader:
    """The arrays of an adapter, and which of them were asked for."""

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        names: Iterable[Target],
    ) -> None:
        self._tensors, self._config = tensors, config
        self._fused = [
            target
            for target in names
            if target.kind == "experts"
            and any(
                f".{target.name}".endswith(f".{key}")
                for key in config.get("target_parameters") or ()
            )
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
            side = np.zeros((len(found), rank, math.prod(sizes)), np.float32)
            for index, one in enumerate(found):
                if one is not None:
                    side[index, : len(one[number])] = one[number]
            sides.append(side.reshape(*view.sizes(view.batch), rank, *sizes))
        return Pair(jnp.asarray(sides[0]), jnp.asarray(sides[1]), len(view.batch))

    def base(self, path: str, leaf: Any, view: View, target: Target) -> None:
        """The weights beside a pair, which PEFT saves of embeddings and heads."""
        for name in torch_shapes(view, target):
            module, _, kind = name.rpartition(".")
            key = f"{PREFIX}{module}.base_layer.{kind}"
            if key not in self._tensors:
                continue
            self.used.add(key)
            own = to_torch(np.asarray(jax.device_get(leaf)), view, target, name)
            saved = np.asarray(self._tensors[key], np.float32)
            near = 2.0**-7 * np.abs(saved)  # either may have been rounded to bfloat16
            if own.shape != saved.shape or (np.abs(own - saved) > near).any():
                raise ValueError(
                    f"leaf {paths.show(path)}: {key} is another matrix: the adapter was "
                    "trained beside other weights; load those"
                )

    def change(self, path: str, leaf: Any, view: View, target: Target) -> Array | None:
        """Of a leaf that is saved whole, or of a bias beside an adapted matrix."""
        expected = torch_shapes(view, target)
        whole = {name: self._tensors.get(PREFIX + name) for name in expected}
        if any(array is not None for array in whole.values()):
            here = {name: array for name, array in whole.items() if array is not None}
            self.used |= {PREFIX + name for name in here}
            read = from_torch(here, path, view, target).astype(np.float32)
            return jnp.asarray(read - np.asarray(jax.device_get(leaf), np.float32))
        biases = {}
        for name, shape in expected.items():
            module, _, kind = name.rpartition(".")
            key = f"{PREFIX}{module}.lora_B.bias"
            if kind == "bias" and key in self._tensors:
                self.used.add(key)
                rank = self._tensors[keys(module, "linear")[0]].shape[0]
                biases[name] = self._tensors[key] * self._scaling(module, rank)
            else:
                biases[name] = np.zeros(shape, np.float32)
        if not any(array.any() for array in biases.values()):
            return None
        return jnp.asarray(from_torch(biases, path, view, target))

    def _module(
        self, path: str, module: str, view: View, target: Target
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """``(rank, in)`` and ``(rank, out)``, scaled; ``None`` if it has no adapter."""
        read = self._both(path, module, target.kind)
        if read is None:
            return None
        down, up = read
        rank = len(down)
        if target.kind == "conv":
            down, up = window_first(down), up.reshape(*up.shape[:2])
        expected = tuple(math.prod(view.sizes(axes)) for axes in (view.rows, view.cols))
        if down.shape[1:] != expected[:1] or up.shape != (expected[1], rank):
            raise ValueError(
                f"leaf {paths.show(path)}: the factors of {module} are {down.shape} and "
                f"{up.shape}, expected {(rank, expected[0])} and {(expected[1], rank)}"
            )
        return down, self._scaling(module, rank) * up.T

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
        first, second = (np.asarray(self._tensors[key], np.float32) for key in both)
        return first, second

    def _experts(self, path: str, view: View, target: Target) -> Pair | None:
        if target not in self._fused:
            return None
        read = self._both(path, wrapper(target, self._fused), "experts")
        if read is None:
            return None
        (experts,) = view.sizes(view.batch)
        rows, cols = view.sizes(view.rows), view.sizes(view.cols)
        if math.prod(rows) == math.prod(cols) and self._version() < _PLAIN_EXPERTS:
            raise ValueError(
                f"leaf {paths.show(path)}: square experts, and the config has "
                f"peft_version {self._config.get('peft_version')!r}: before 0.19.1 they "
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
        down = read[0].reshape(experts, rank, *rows)
        up = read[1].reshape(-1, rank, experts).transpose(2, 1, 0)
        up = self._scaling(target.name, rank) * up.reshape(experts, rank, *cols)
        return Pair(jnp.asarray(down), jnp.asarray(up), 1)

    def _scaling(self, module: str, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``, and what the patterns say."""
        stated = self._pattern("rank_pattern", module, self._config.get("r", rank))
        if stated != rank:
            raise ValueError(
                f"{module}: its factors have rank {rank}, and the config says {stated}"
            )
        alpha = self._pattern("alpha_pattern", module, self._config.get("lora_alpha", 8))
        root = math.sqrt(rank) if self._config.get("use_rslora") else rank
        return float(alpha) / root

    def _version(self) -> tuple[int, ...]:
        stated = str(self._config.get("peft_version", "0"))
        return tuple(map(int, re.findall(r"\d+", stated)[:3]))

    def _pattern(self, name: str, module: str, otherwise: Any) -> Any:
        for key, value in (self._config.get(name) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return otherwise
