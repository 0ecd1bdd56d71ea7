"""The state of a method of pairs, by name of what is trained and by leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from raclora_jax._core.types import PyTree
from raclora_jax.methods._pieces import Pair

Groups = dict[str, dict[str, Array]]


class PairState(NamedTuple):
    """State of a pair method; every dict of arrays is keyed by path.

    Attributes:
      base: The weights the pair is added to.
      drawn: The factors that start random.
      zero: The factors that start at zero.
      extra: ``{name: {path: array}}``, what else of a leaf the method trains.
      dense: Trained differences of the leaves that are not adapted.
      inner: ``{group: state}`` of the inner rule for each trained group; ``"pair"`` for
        a rule of both factors.
      subset: What decides which leaves are trained, if anything does.
      count: int32 scalar, steps taken.
    """

    base: PyTree
    drawn: dict[str, Array]
    zero: dict[str, Array]
    extra: Groups
    dense: dict[str, Array]
    inner: dict[str, Any]
    subset: PyTree
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def pairs(self) -> dict[str, Pair]:
        """What is known of each adapted leaf."""
        return by_leaf({"drawn": self.drawn, "zero": self.zero, **self.extra})

    def holding(self, groups: Groups) -> PairState:
        """The state with other arrays in some groups."""
        return self._replace(
            drawn=groups.get("drawn", self.drawn),
            zero=groups.get("zero", self.zero),
            extra={name: groups.get(name, held) for name, held in self.extra.items()},
            dense=groups.get("dense", self.dense),
        )


def by_leaf(groups: Mapping[str, Mapping[str, Array]]) -> dict[str, Pair]:
    """``{name: {path: array}}`` as ``{path: Pair}``."""
    names = dict.fromkeys(path for arrays in groups.values() for path in arrays)
    return {
        path: {name: arrays[path] for name, arrays in groups.items() if path in arrays}
        for path in names
    }


def by_name(pairs: Mapping[str, Pair]) -> dict[str, dict[str, Array]]:
    """``{path: Pair}`` as ``{name: {path: array}}``."""
    names = dict.fromkeys(name for pair in pairs.values() for name in pair)
    return {
        name: {path: pair[name] for path, pair in pairs.items() if name in pair}
        for name in names
    }


def of_pairs(groups: Groups) -> dict[str, Pair]:
    """What belongs to adapted leaves, by leaf."""
    return by_leaf({group: held for group, held in groups.items() if group != "dense"})


def paths_of(groups: Groups) -> list[str]:
    """The leaves that have something in some group, in order."""
    return sorted({path for held in groups.values() for path in held})


def only(groups: Groups, live: set[str]) -> Groups:
    """What belongs to some leaves."""
    return {
        group: {path: array for path, array in held.items() if path in live}
        for group, held in groups.items()
    }


def where(live: dict[str, Array] | None, new: Groups, old: Groups) -> Groups:
    """The new arrays of leaves that are trained, the old ones of those at rest."""
    if live is None:
        return new

    def one(path: str, new: Array, old: Array) -> Array:
        return jnp.where(live[path], new, old) if path in live else new

    return {
        group: {path: one(path, held[path], old[group][path]) for path in held}
        for group, held in new.items()
    }
