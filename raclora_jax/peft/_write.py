"""Adapters written as PEFT reads them."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from raclora_jax._core import paths
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree
from raclora_jax.peft._files import save
from raclora_jax.peft._folder import new_folder
from raclora_jax.peft._format import CONFIG, FILE, PREFIX, keys, modules, wrapper
from raclora_jax.peft._pairs import Adapter, Pair
from raclora_jax.peft._read import load_adapter
from raclora_jax.peft._targets import (
    Target,
    View,
    to_torch,
    torch_shapes,
    views,
    window_last,
)
from raclora_jax.peft._ties import check_told, head_of, shared

_TOLERANCE = 1e-5  # of a change read back, over its largest entry


def save_adapter(
    directory: str | os.PathLike[str],
    adapter: Adapter,
    params: PyTree,
    spec: Spec | int,
    names: Mapping[str, Target],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> pathlib.Path:
    """Writes an adapter as PEFT reads it: ``adapter_config.json`` and its safetensors.

    ``lora_alpha = r``, so that the factors stand as they are; a module of another rank
    has its own in ``rank_pattern`` and ``alpha_pattern``. Leaves changed in full become
    ``modules_to_save``, or the bias of ``lora_B`` beside an adapted matrix. The files
    are written beside, read back and compared, and only then get their name.

    Args:
      directory: The folder to make.
      adapter: What to write.
      params: The weights that it changes; leaves changed in full are saved whole.
      spec: Says the views of the leaves.
      names: ``{path: Target}`` of the leaves that are changed; see ``targets``.
      base_model: ``base_model_name_or_path`` of the config.
      task_type: Such as ``"CAUSAL_LM"`` or ``"SEQ_CLS"``.

    Returns:
      The folder.

    Raises:
      FileExistsError: If the folder exists.
      ValueError: If a changed leaf has no name or PEFT has no place for it.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> W, names = {"kernel": jnp.ones((6, 4))}, {"kernel": Target("head.weight")}
      >>> change = Adapter({"kernel": Pair(jnp.ones((2, 6)), jnp.ones((2, 4)))})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = save_adapter(f"{folder}/adapter", change, W, 2, names)
      ...     again = load_adapter(saved, W, 2, names)
      >>> again.pairs["kernel"].rank
      2
    """
    leaves, _ = paths.flatten(params)
    for path in (*adapter.pairs, *adapter.dense):
        if path not in names:
            raise ValueError(
                f"leaf {paths.show(path)} is changed and has no name; add it to names"
            )
    found = views(params, spec, {p: names[p] for p in _changed(adapter)})
    check_told(found, leaves, names)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    fused = [names[p] for p in adapter.pairs if names[p].kind == "experts"]
    for path, pair in adapter.pairs.items():
        target = names[path]
        if target.kind == "plain":
            raise ValueError(
                f"leaf {paths.show(path)} is adapted, but {target.name} is said to be "
                "plain: name its kind"
            )
        ranks |= dict.fromkeys(modules(found[path], target), pair.rank)
        if target.kind == "experts":
            tensors |= _experts(path, pair, found[path], wrapper(target, fused))
        else:
            tensors |= _factors(path, pair, found[path], target)
    kept = _dense(adapter, leaves, found, names, set(ranks), tensors)
    tied = [names[path] for path in found if names[path].tied]
    for target in tied:
        tensors |= shared(tensors, target)
        if target.module in ranks:
            ranks[head_of(target)] = ranks[target.module]
        else:
            kept.append(head_of(target))
    kinds = {names[path].kind for path in adapter.pairs}
    transposed = "transposed" in kinds
    biased = any(key.endswith(".lora_B.bias") for key in tensors)
    for kind, asked in (("embedding", biased), ("experts", biased or transposed)):
        if kind in kinds and asked:
            what = "a bias changed beside a pair" if biased else "a transposed matrix"
            raise ValueError(
                f"PEFT takes no {kind} in one adapter with {what}; freeze one of them in "
                "the spec, or export the merged model"
            )
    config = _config(ranks, fused, kept, transposed, biased) | {
        "base_model_name_or_path": base_model,
        "ensure_weight_tying": bool(tied),
        "task_type": task_type,
    }
    with new_folder(pathlib.Path(directory)) as folder:
        save(folder / f"{FILE}.safetensors", tensors)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        own = {path: _told(names[path]) for path in found}
        # Inside: where it fails, the folder is gone before it gets its name.
        _compare(adapter, load_adapter(folder, params, spec, own))
    return pathlib.Path(directory)


def _changed(adapter: Adapter) -> Iterable[str]:
    return (*adapter.pairs, *adapter.dense)


def _told(target: Target) -> Target:
    """The name by itself, of an embedding whose head is another leaf."""
    if target.kind == "embedding" and target.tied is None:
        return dataclasses.replace(target, tied=False)
    return target


def _float32(path: str, array: Any) -> np.ndarray:
    """As a file has it; what it cannot hold is refused before one is written."""
    with np.errstate(over="ignore"):
        found = np.asarray(jax.device_get(array)).astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError(
            f"leaf {paths.show(path)}: its change holds NaN, or numbers beyond float32; "
            "nothing was kept"
        )
    return found


def _flat(path: str, pair: Pair, view: View) -> tuple[np.ndarray, np.ndarray]:
    """``(batch..., rank, in)`` and ``(batch..., rank, out)``."""
    batch = view.sizes(view.batch)
    down, up = (
        _float32(path, side).reshape(*batch, pair.rank, -1)
        for side in (pair.down, pair.up)
    )
    return down, up


def _factors(path: str, pair: Pair, view: View, target: Target) -> dict[str, np.ndarray]:
    """``lora_A`` and ``lora_B`` of every module of a leaf."""
    down, up = _flat(path, pair, view)
    tensors = {}
    for index, module in zip(view.indices, modules(view, target), strict=True):
        first, second = keys(module, target.kind)
        tensors[first], tensors[second] = down[index], up[index].T
        if target.kind == "conv":
            ones = (1,) * (len(view.rows) - 1)
            tensors[first] = window_last(down[index], view)
            tensors[second] = up[index].T.reshape(-1, pair.rank, *ones)
    return tensors


def _experts(path: str, pair: Pair, view: View, module: str) -> dict[str, np.ndarray]:
    """Experts are the slow axis of the rows of A, and the fast one of B's columns."""
    down, up = _flat(path, pair, view)
    first, second = keys(module, "experts")
    return {
        first: down.reshape(-1, down.shape[-1]),
        second: up.transpose(2, 1, 0).reshape(up.shape[-1], -1),
    }


def _dense(
    adapter: Adapter,
    leaves: Mapping[str, Any],
    found: Mapping[str, View],
    names: Mapping[str, Target],
    adapted: set[str],
    tensors: dict[str, np.ndarray],
) -> list[str]:
    """Adds what is changed in full; returns the modules that are saved whole."""
    kept: dict[str, None] = {}
    for path, change in adapter.dense.items():
        view, target = found[path], names[path]
        exact = _float32(path, change)
        for name in torch_shapes(view, target):
            module, _, kind = name.rpartition(".")
            if module not in adapted:
                whole = exact + np.asarray(jax.device_get(leaves[path]), np.float32)
                tensors[PREFIX + name] = to_torch(whole, view, target, name)
                kept[module] = None
            elif kind == "bias":
                key = f"{PREFIX}{module}.lora_B.bias"
                tensors[key] = to_torch(exact, view, target, name)
            else:
                raise ValueError(
                    f"leaf {paths.show(path)} is changed in full, and {module} is "
                    f"adapted: PEFT has no place for {name}; freeze the leaf in the spec"
                )
    return list(kept)


def _config(
    ranks: Mapping[str, int],
    fused: Sequence[Target],
    kept: list[str],
    transposed: bool,
    biased: bool,
) -> dict[str, Any]:
    whole = {target.name for target in fused}
    counts = collections.Counter(ranks.values())
    rank = counts.most_common(1)[0][0] if counts else 1
    others = {module: own for module, own in ranks.items() if own != rank}
    return {
        # Each alpha is its rank: alpha / r is 1, since our scaling is in the factors.
        "alpha_pattern": others,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_bias": biased,
        "lora_dropout": 0.0,
        "modules_to_save": kept or None,
        "peft_type": "LORA",
        "peft_version": "0.19.1",  # since which experts lie as they do here
        "r": rank,
        "rank_pattern": others,
        "target_modules": sorted(set(ranks) - whole),
        "target_parameters": sorted(whole) or None,
        "use_dora": False,
        "use_rslora": False,
    }


def _compare(written: Adapter, read: Adapter) -> None:
    """Refuses to keep a file that says anything else."""
    for path, pair in written.pairs.items():
        again = read.pairs[path]
        _same(path, _product(pair), _product(again), floor=0.0)
    for path, change in written.dense.items():
        wrote = np.asarray(change, np.float64)
        # Saved as a sum, in float32, and read as a difference.
        _same(path, wrote, np.asarray(read.dense[path]), floor=1.0)


def _product(pair: Pair) -> np.ndarray:
    """The change, its row and column axes flattened."""
    sides = [np.asarray(jax.device_get(side), np.float64) for side in pair[:2]]
    down, up = (side.reshape(*side.shape[: pair.batch + 1], -1) for side in sides)
    return np.swapaxes(down, -1, -2) @ up


def _same(path: str, wrote: np.ndarray, read: np.ndarray, *, floor: float) -> None:
    most = float(np.max(np.abs(wrote), initial=0.0))
    off = float(np.max(np.abs(wrote - read), initial=0.0))
    if not off <= _TOLERANCE * max(most, floor):
        raise ValueError(
            f"leaf {paths.show(path)}: its change came back {off:.2e} off, or holds NaN; "
            "nothing was kept"
        )
