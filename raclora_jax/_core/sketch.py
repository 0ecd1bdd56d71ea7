"""Sketches: (key data, path, link) in, one frozen random factor out."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from raclora_jax._core.cholesky import inverse_cholesky
from raclora_jax._core.keys import folded, path_words
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

    Leaves whose sketches have one size and one law are drawn as one stack: a
    program has one drawing for all layers, and is compiled in a fraction of the time.
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
    groups: dict[tuple[_Kind, _Place | None], list[LeafPlan]] = {}
    for one in (one for plan in plans for one in plan.each):
        kind = _Kind(one.law, one.rank, one.dim, str(one.sketch_dtype), one.selection)
        groups.setdefault((kind, _lives(one)), []).append(one)
    drawn: dict[LeafPlan, Drawn] = {}
    for (kind, place), members in groups.items():
        sizes = [math.prod(plan.batch_shape) for plan in members]
        words = [
            (*path_words("sketch", plan.path), index)
            for plan, size in zip(members, sizes, strict=True)
            for index in range(size)
        ]
        stack = _draw_stack(data, link, jnp.array(words, jnp.uint32), kind, place)
        for plan, own in zip(
            members, cut(stack, sizes, jnp.asarray(link) < 0), strict=True
        ):
            drawn[plan] = plan.as_sketch(_apart(own, plan))

    def of(plan: LeafPlan) -> Drawn:
        if plan.chance is None:
            return drawn[plan]
        left, right = plan.sides
        is_left = _is_left(data, link, plan.chance)
        return BothSketches(drawn[left], drawn[right], is_left)

    return {plan.path: of(plan) for plan in plans}


def _is_left(data: Array, link: Array | int, chance: float) -> Array:
    """Whether the link uses the left side of a leaf, one number for all leaves."""
    words = jnp.array([*path_words("side", ""), 0], jnp.uint32)
    words = words.at[2].set(jnp.asarray(link).astype(jnp.uint32))
    with jax.threefry_partitionable(True):
        number = jax.random.bits(folded(data, words[:, None])[0], (), jnp.uint32)
    return number < jnp.uint32(min(round(chance * 2**32), 2**32 - 1))


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
    """What sketches must share to be drawn together; static and hashable."""

    law: str
    rank: int
    dim: int
    dtype: str
    selection: Selection | None


# Traced once for all stacks of one size, wherever they are drawn.
@functools.partial(jax.jit, static_argnames=("kind", "place"))
def _draw_stack(
    data: Array, link: Array | int, words: Array, kind: _Kind, place: _Place | None
) -> Array:
    """Sketches ``(n, rank, dim)`` from ``n`` rows of (two words of a path, index)."""
    first, second, index = words.T
    turn = jnp.zeros((), jnp.int32)
    if kind.selection is not None and kind.law == "block":
        # One draw a cycle: the order of its blocks.
        link, turn = jnp.divmod(jnp.asarray(link, jnp.int32), kind.selection.blocks)
    links = jnp.full_like(index, link)
    keys = folded(data, jnp.stack([first, second, links, index]))
    # The process-wide flag changes the bits of every draw; a chain must not depend on it.
    with jax.threefry_partitionable(True):
        if kind.selection is not None and kind.law == "block":
            return _block(keys, turn, kind.selection)
        shape = (kind.rank, kind.dim)
        stack = _LAWS[kind.law](keys, shape, jnp.dtype(kind.dtype))
    return stack if place is None else constrained(stack, place.sharding)


def _gram(sketches: Array) -> Array:
    """S S^T of each sketch, (n, rank, rank)."""
    # In parts: where all terms are alike, one long sum of them rounds to one side.
    count, rank, dim = sketches.shape
    parts = 1
    while dim % (2 * parts) == 0 and dim // (2 * parts) >= 256 and parts < 16:
        parts *= 2
    split = sketches.reshape(count, rank, parts, dim // parts)
    dims = (((3,), (3,)), ((0, 2), (0, 2)))
    grams = lax.dot_general(split, split, dims, precision=lax.Precision.HIGHEST)
    return jnp.sum(grams, axis=1)


def _whiten_once(sketches: Array, shift: float) -> Array:
    """L^-1 S with L L^T = S S^T + shift * trace(S S^T) I."""
    gram = _gram(sketches)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    # Inverting at rank x rank and multiplying is far cheaper than a triangular solve
    # on the tall matrix.
    inverse = inverse_cholesky(gram + shift * trace * eye[None])
    return jnp.matmul(inverse, sketches, precision=lax.Precision.HIGHEST)


def _whiten(sketches: Array) -> Array:
    """Orthonormal rows by Cholesky QR; the shift keeps an ill-conditioned draw finite.

    Fukaya et al., `Shifted Cholesky QR <https://arxiv.org/abs/1809.11085>`_, 2018.
    """
    shift = 4 * float(jnp.finfo(sketches.dtype).eps)
    sketches = _whiten_once(sketches, shift)
    if not _well_conditioned(*sketches.shape[1:]):
        sketches = _whiten_once(sketches, shift)
    return _whiten_once(sketches, 0.0)


def _well_conditioned(rank: int, dim: int) -> bool:
    """Whether two passes are enough for any draw.

    Two passes give orthonormal rows up to condition numbers of some hundreds in float32.
    A Gaussian exceeds 500 with probability below (13 / 500)^(dim / 2) here, 1e-25.

    Chen and Dongarra, `Condition numbers of Gaussian random matrices
    <https://arxiv.org/abs/0810.0800>`_, 2005.
    """
    return dim >= 32 and dim >= 2 * rank


def _gaussian_raw(keys: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def _orthonormal(keys: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    # Rows of L^-1 G with a positive diagonal in L are Haar: whitening a Gaussian draw
    # and making it orthonormal are one thing.
    return _whiten(_gaussian_raw(keys, shape, dtype))


def _rademacher(keys: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    def with_word(word: int) -> Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, word))(keys)

    # Not jax.random.rademacher, which draws other bits when x64 is on.
    bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(with_word(0))
    signs = jnp.where(bits >> 31, -1, 1).astype(dtype)
    # A singular draw gives way to a Gaussian one. Both laws, and being singular, are
    # blind to permutations and signs of the axes, so the mean projector stays
    # (rank / dim) I.
    spare = _gaussian_raw(with_word(1), shape, dtype)
    inverse = inverse_cholesky(_gram(signs) / shape[1])
    # A diagonal of L above 1e-2; NaN compares false.
    diagonal = jnp.diagonal(inverse, axis1=1, axis2=2)
    regular = jnp.all(diagonal < 1e2, axis=1)[:, None, None]
    return _whiten(jnp.where(regular, signs, spare))


def _coordinate(keys: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    rank, dim = shape
    chosen = jax.vmap(lambda key: jax.random.permutation(key, dim)[:rank])(keys)
    return chosen.astype(dtype)


def _block(keys: Array, turn: Array, chosen: Selection) -> Array:
    """Where the blocks of a turn start, int32 (n,).

    Each cycle takes its blocks in an order of its own. Where the rank does not divide
    the side they start at a place of its own too, and wrap around: every row is then as
    likely as any other, and ``dim % rank`` rows wait for another cycle.
    """

    def one(key: Array) -> Array:
        bits = jax.random.bits(key, (chosen.blocks + 1,), jnp.uint32)
        block = jnp.argsort(bits[1:])[turn].astype(jnp.int32)
        start = block * (chosen.rank // chosen.runs)
        if chosen.sliced:
            return start
        offset = (bits[0] % chosen.dim).astype(jnp.int32)
        return (start + offset) % chosen.dim

    return jax.vmap(one)(keys)


_LAWS = {
    "orthonormal": _orthonormal,
    "rademacher": _rademacher,
    "coordinate": _coordinate,
    "gaussian_raw": _gaussian_raw,
}
