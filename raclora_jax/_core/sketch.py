"""Sketches: (key data, path, link) in, one frozen random factor out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from raclora_jax._core.bits import bits, cipher, normal, shuffled
from raclora_jax._core.keys import path_words
from raclora_jax._core.orthonormal import orthonormal, signs
from raclora_jax._core.parts import cut
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.select import Selection
from raclora_jax._core.sharding import auto_axes, constrained, is_explicit
from raclora_jax._core.sides import BothSketches, sketch_shardings
from raclora_jax._core.types import Drawn


def draw(data: Array, link: Array | int, plan: LeafPlan) -> Drawn:
    """Draws the sketch of one leaf for one link.

    A pure function of key data, path, link and position in the stack: tree order,
    other leaves, jit and the process's random settings do not enter.

    Args:
      data: Key data of the chain, uint32 of shape (2,).
      link: Index of the link, int32 scalar.
      plan: Plan of a leaf with mode ``"lowrank"``.

    Returns:
      Array of ``plan.sketch_shape`` in ``plan.sketch_dtype``, with
      E[S S^T] = (rank / dim) I, save for ``"gaussian_raw"``, whose entries are N(0, 1);
      ``Picks`` of the laws that pick rows; ``BothSketches`` where the side is drawn.
    """
    return draw_all(data, link, (plan,))[plan.path]


def draw_all(
    data: Array, link: Array | int, plans: Iterable[LeafPlan]
) -> dict[str, Drawn]:
    """The sketches of every adapted leaf, ``{path: sketch}``, as ``draw`` gives them.

    All matrices get their keys at once, those of one size their numbers, those of one
    rank their normalisation, and the laws that pick rows all their picks: a program has
    one drawing for all layers, and is compiled in a fraction of the time.
    """
    adapted = tuple(plan for plan in plans if plan.mode == "lowrank")
    if not adapted:
        return {}
    out = {plan.path: sketch_shardings(plan) for plan in adapted if plan.sharding}
    if not out or any(is_explicit(plan.sharding) for plan in adapted):
        return auto_axes(lambda *_: out)(_draw_adapted)(data, link, adapted)
    # Where no type says it, the bits of one device are worth more than local sums.
    drawn = _draw_adapted(data, link, tuple(with_sharding(p, None) for p in adapted))
    return drawn | jax.device_put({path: drawn[path] for path in out}, out)


# Traced and lowered once for all the places of a step that may draw.
@functools.partial(jax.jit, static_argnames="plans")
def _draw_adapted(
    data: Array, link: Array | int, plans: tuple[LeafPlan, ...]
) -> dict[str, Drawn]:
    link = jnp.asarray(link, jnp.int32)
    each = [one for plan in plans for one in plan.each]
    picking = [one for one in each if one.selection is not None]
    arrays = [one for one in each if one.selection is None]
    drawn = _picked(data, link, picking) if picking else {}
    drawn |= _arrays(data, link, arrays) if arrays else {}

    def of(plan: LeafPlan) -> Drawn:
        if plan.chance is None:
            return drawn[plan]
        left, right = plan.sides
        is_left = _is_left(data, link, plan.chance)
        return BothSketches(drawn[left], drawn[right], is_left)

    return {plan.path: of(plan) for plan in plans}


def _is_left(data: Array, link: Array, chance: float) -> Array:
    """Whether the link uses the left side of a leaf, one number for all leaves."""
    words = map(jnp.uint32, (*path_words("side", ""), 0))
    number = bits(_Matrices(*words).keys(data, link), jnp.uint32(0), jnp.uint32(0))
    return number < jnp.uint32(min(round(chance * 2**32), 2**32 - 1))


class _Matrices(NamedTuple):
    """What tells the matrices of some leaves from each other, one after the other.

    Attributes:
      one: The first word of their leaf's path, uint32.
      other: The second one.
      place: Their place in the stack of the leaf, uint32.
    """

    one: Array
    other: Array
    place: Array

    @classmethod
    def of(cls, plans: Sequence[LeafPlan]) -> _Matrices:
        sizes = [math.prod(plan.batch_shape) for plan in plans]
        words = np.array([path_words("sketch", plan.path) for plan in plans], np.uint32)
        place = np.concatenate([np.arange(size, dtype=np.uint32) for size in sizes])
        return cls(*map(jnp.asarray, (*np.repeat(words, sizes, axis=0).T, place)))

    def keys(self, data: Array, link: Array) -> tuple[Array, Array]:
        """The two words of the key of each in a link, or in one of its own."""
        shape = self.place.shape
        links = jnp.broadcast_to(link.astype(jnp.uint32), shape)
        words = jnp.stack([self.one, self.place]), jnp.stack([self.other, links])

        def take_in(
            key: tuple[Array, Array], two: tuple[Array, Array]
        ) -> tuple[tuple[Array, Array], None]:
            return cipher(key, *two), None

        # A loop, since a compiler may write a cipher out again wherever a key is used.
        start = jnp.broadcast_to(data[0], shape), jnp.broadcast_to(data[1], shape)
        key, _ = lax.scan(take_in, start, words)
        return key


def _arrays(data: Array, link: Array, plans: Sequence[LeafPlan]) -> dict[LeafPlan, Drawn]:
    """The sketches of the laws whose sketches are arrays, of one kind as one stack."""
    groups: dict[_Kind, list[LeafPlan]] = {}
    for plan in plans:
        groups.setdefault(_Kind.of(plan), []).append(plan)
    ordered = [plan for members in groups.values() for plan in members]
    keys = _Matrices.of(ordered).keys(data, link)
    sizes = {
        kind: [math.prod(plan.batch_shape) for plan in members]
        for kind, members in groups.items()
    }
    ends = itertools.accumulate(map(sum, sizes.values()), initial=0)
    stacks = {
        kind: _numbers(keys[0][start:end], keys[1][start:end], kind)
        for kind, (start, end) in zip(groups, itertools.pairwise(ends), strict=True)
    }
    projectors = [kind for kind in groups if _LAWS[kind.law].projects]
    whole = orthonormal([stacks[kind] for kind in projectors])
    stacks |= dict(zip(projectors, whole, strict=True))
    drawn: dict[LeafPlan, Drawn] = {}
    for kind, members in groups.items():
        parts = cut(stacks[kind], sizes[kind], link < 0)
        drawn |= {p: _apart(one, p) for p, one in zip(members, parts, strict=True)}
    return drawn


def _apart(sketch: Array, plan: LeafPlan) -> Array:
    """The sketch in its own shape, with a sharding that it keeps to itself.

    Left to propagation, the sharding of one leaf would spread over the stack to all its
    members, and every step would gather them. It does not pass a reshape that joins a
    sharded axis to one before it.
    """
    place = plan.sketch_sharding
    if place is not None:
        return constrained(sketch.reshape(plan.sketch_shape), place)
    # Of two copies one is taken: a reshape that the compiler cannot see through, and that
    # costs nothing once it is fused.
    twice = jnp.concatenate([sketch.ravel(), sketch.ravel()])
    return twice.reshape(2, *plan.sketch_shape)[0]


class _Place(NamedTuple):
    """Where the sketches of a stack live; static and hashable.

    Attributes:
      sharding: Of a stack ``(n, rank, dim)``.
      path: The leaf, where its own stack is sharded: it is drawn by itself.
    """

    sharding: NamedSharding
    path: str


def _lives(plan: LeafPlan) -> _Place | None:
    """Where a leaf's sketches are drawn, if it is known and an axis each can say it."""
    sharding, stack = plan.sketch_sharding, len(plan.batch)
    if sharding is None or plan.selection is not None:
        return None
    spec = [*sharding.spec, *(None for _ in plan.sketch_shape[len(sharding.spec) :])]
    first = [entry for entry in spec[:stack] if entry is not None]
    # Of axes that are drawn as one only the first can be sharded.
    side = spec[stack + 1 :]
    if spec[1:stack].count(None) < stack - 1 or any(side[1:]):
        return None
    own = PartitionSpec(first[0] if first else None, None, side[0])
    return _Place(NamedSharding(sharding.mesh, own), plan.path if first else "")


class _Kind(NamedTuple):
    """What sketches must share to be drawn as one stack; static and hashable."""

    law: str
    rank: int
    dim: int
    dtype: str
    place: _Place | None

    @classmethod
    def of(cls, plan: LeafPlan) -> _Kind:
        return cls(plan.law, plan.rank, plan.dim, str(plan.sketch_dtype), _lives(plan))


class _Law(NamedTuple):
    """A law whose sketches are arrays.

    Attributes:
      start: What it makes of normal numbers ``(n, rank, dim)``.
      projects: Whether the rows are then made orthonormal.
    """

    start: Callable[[Array], Array]
    projects: bool


_LAWS = {
    "orthonormal": _Law(lambda numbers: numbers, projects=True),
    "rademacher": _Law(signs, projects=True),
    "gaussian_raw": _Law(lambda numbers: numbers, projects=False),
}


def _numbers(one: Array, other: Array, kind: _Kind) -> Array:
    """What the sketches ``(n, rank, dim)`` of ``n`` keys are made of."""
    shape = (len(one), kind.rank, kind.dim)
    row, column = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 2))
    key = one[:, None, None], other[:, None, None]
    drawn = bits(key, jnp.uint32(0), row * jnp.uint32(kind.dim) + column)
    numbers = normal(drawn).astype(kind.dtype)
    numbers = _LAWS[kind.law].start(numbers)
    return numbers if kind.place is None else constrained(numbers, kind.place.sharding)


def _picked(data: Array, link: Array, plans: Sequence[LeafPlan]) -> dict[LeafPlan, Drawn]:
    """The picks of the laws that pick rows, all of one law at once."""
    drawn: dict[LeafPlan, Drawn] = {}
    for law, draw in _PICKING_LAWS.items():
        members = [plan for plan in plans if plan.law == law]
        if not members:
            continue
        sizes = [math.prod(plan.sketch_shape) for plan in members]
        parts = cut(draw(data, link, members), sizes, link < 0)
        drawn |= {
            plan: plan.as_sketch(_apart(own, plan))
            for plan, own in zip(members, parts, strict=True)
        }
    return drawn


def _blocks(data: Array, link: Array, plans: Sequence[LeafPlan]) -> Array:
    """Where the block of every matrix starts, int32.

    Each cycle takes its blocks in an order of its own. Where the rank does not divide
    the side they start at a place of its own too, and wrap around: every row is then as
    likely as any other, and ``dim % rank`` rows wait for another cycle.
    """
    blocks = _each(plans, lambda chosen: chosen.blocks)
    lengths = _each(plans, lambda chosen: chosen.rank // chosen.runs)
    dims = _each(plans, lambda chosen: chosen.dim)
    wraps = _each(plans, lambda chosen: 1 if chosen.sliced else chosen.dim)
    cycle, turn = jnp.divmod(link.astype(jnp.uint32), blocks)
    keys = _Matrices.of(plans).keys(data, cycle)
    offsets = bits(keys, jnp.uint32(0), jnp.uint32(0)) % wraps
    starts = shuffled(keys, turn, jnp.asarray(blocks)) * lengths
    return ((starts + offsets) % dims).astype(jnp.int32)


def _coordinates(data: Array, link: Array, plans: Sequence[LeafPlan]) -> Array:
    """The rows that every matrix picks, int32, one matrix after the other."""
    ranks = _each(plans, lambda chosen: chosen.rank)
    dims = _each(plans, lambda chosen: chosen.dim)
    places = np.concatenate([np.arange(rank, dtype=np.uint32) for rank in ranks])
    matrix = np.repeat(np.arange(len(ranks)), ranks)
    one, other = _Matrices.of(plans).keys(data, link)
    keys, sizes = (one[matrix], other[matrix]), jnp.asarray(dims[matrix])
    return shuffled(keys, jnp.asarray(places), sizes).astype(jnp.int32)


def _each(plans: Sequence[LeafPlan], number: Callable[[Selection], int]) -> np.ndarray:
    """A number of the selection of every matrix, uint32."""
    sizes = [math.prod(plan.batch_shape) for plan in plans]
    found = [number(plan.selection) for plan in plans if plan.selection is not None]
    return np.repeat(np.asarray(found, np.uint32), sizes)


_PICKING_LAWS = {"block": _blocks, "coordinate": _coordinates}
