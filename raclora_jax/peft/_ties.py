"""Embeddings that are the head too: one leaf here, two modules in PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from raclora_jax._core import paths
from raclora_jax.peft._format import PREFIX, keys
from raclora_jax.peft._targets import Target


def check_told(
    changed: Iterable[str], leaves: Mapping[str, Any], names: Mapping[str, Target]
) -> None:
    """Refuses a changed embedding of which nothing says whether the head is it too.

    Raises:
      ValueError: If ``tied`` is not given and no other leaf can be the head.
    """
    for path in changed:
        target = names[path]
        if target.kind != "embedding" or target.tied is not None:
            continue
        size = np.size(leaves[path])
        if not any(
            other.kind == "linear" and np.size(leaves[where]) == size
            for where, other in names.items()
        ):
            raise ValueError(
                f"leaf {paths.show(path)} is the embedding {target.name} and is changed, "
                "and nothing says whether the head is tied to it, which PEFT changes "
                "apart: say so by Target(..., tied='lm_head.weight'), or by tied=False "
                "if it is not"
            )


def head_of(target: Target) -> str:
    """The module that is the embedding too."""
    return target.tied.rpartition(".")[0] if target.tied else ""


def shared(tensors: Mapping[str, np.ndarray], target: Target) -> dict[str, np.ndarray]:
    """What the head has of an embedding's own entries."""
    down, up = keys(target.module, "embedding")
    whole = PREFIX + target.name
    found: dict[str, np.ndarray] = {}
    if down in tensors:
        # The head is the embedding transposed, so factors trade places: of A (rank,
        # words) and B (width, rank) come the head's A (rank, width) and B (words, rank).
        first, second = keys(head_of(target), "linear")
        found |= {first: tensors[up].T, second: tensors[down].T}
    if whole in tensors:
        found[f"{PREFIX}{target.tied}"] = tensors[whole]
    return found


def check_one(
    path: str,
    target: Target,
    tensors: Mapping[str, np.ndarray],
    file: str,
    follows: bool,
) -> set[str]:
    """The head's entries, if both modules have the same change; one leaf holds no two.

    Args:
      path: The leaf.
      target: Its name.
      tensors: The adapter's.
      file: Of the config, for messages.
      follows: Whether PEFT lets the head follow the embedding.

    Raises:
      ValueError: If PEFT changes the one otherwise than the other.
    """
    wanted = shared(tensors, target)
    module = head_of(target)
    known = {*keys(module, "linear"), f"{PREFIX}{target.tied}"}
    here = known & set(tensors)
    if here and here != set(wanted):
        why = f"has {min(here ^ set(wanted))} for one of the two alone"
    elif not follows and not here and wanted:
        why = (
            "changes the embedding, and ensure_weight_tying does not say of the head too"
        )
    elif any(not np.array_equal(tensors[key], wanted[key]) for key in here):
        why = "changes the head otherwise than the embedding"
    else:
        return here
    raise ValueError(
        f"leaf {paths.show(path)} is {target.name} and the tied {target.tied}, and the "
        f"adapter of {file} {why}: untie them, so that the head has a leaf of its own"
    )
