"""Sketches: (key data, path, link) in, one frozen random factor out."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax import paths
from raclora_jax.factorize import inverse_cholesky
from raclora_jax.plan import LeafPlan, plan_tree
from raclora_jax.spec import Spec

_IMPL = "threefry2x32"


def key_data(key: Any) -> Array:
    """The two words a chain's randomness starts from.

    Args:
      key: A typed threefry key, raw threefry key data of shape (2,), or an int seed.

    Returns:
      uint32 array of shape (2,).

    Raises:
      TypeError: If there is no key, or the value is no key.
      ValueError: If the key is not a single threefry key.

    Example:
      >>> key_data(7).tolist()
      [0, 7]
    """
    is_array, is_int = hasattr(key, "dtype"), hasattr(key, "__index__")
    if isinstance(key, bool) or not (is_array or is_int):
        raise TypeError(
            f"key must be a jax key or an int seed, got {key!r} of type "
            f"{type(key).__name__}; pass key=jax.random.key(0)"
        )
    if not is_array:
        return _seed(operator.index(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(key))
        if impl != _IMPL or key.shape != ():
            raise ValueError(
                f"key must be one {_IMPL} key, got impl {impl} of shape {key.shape}; "
                f"pass jax.random.key(0, impl={_IMPL!r})"
            )
        return jax.random.key_data(key)
    if key.dtype == jnp.uint32 and key.shape == (2,):
        return jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ():
        return _seed(key)
    raise ValueError(
        f"key must be one {_IMPL} key: a typed key, uint32 data of shape (2,), or an "
        f"int seed; got {key.dtype} of shape {key.shape}; pass key=jax.random.key(0)"
    )


def _seed(seed: Any) -> Array:
    """What ``jax.random.key`` makes of a seed of 32 bits, whether x64 is on or off."""
    if not isinstance(seed, jax.core.Tracer) and not 0 <= int(seed) < 2**32:
        raise ValueError(
            f"an int as key must be between 0 and 2**32 - 1, got {seed}: JAX reads "
            "other seeds differently when x64 is on; pass key=jax.random.key(seed)"
        )
    return jnp.stack([jnp.uint32(0), jnp.asarray(seed, jnp.uint32)])


def leaf_key(data: Array, domain: str, path: str) -> Array:
    """The key of one leaf for one purpose, whatever else the tree holds.

    Args:
      data: Key data of the chain, uint32 of shape (2,).
      domain: What the key is for, such as ``"sketch"``.
      path: Canonical path of the leaf.

    Returns:
      A typed key.
    """
    return _folded(data, jnp.array(_words(domain, path), jnp.uint32)[:, None])[0]


def leaf_keys(
    data: Array, domain: str, names: Iterable[str], word: Array
) -> dict[str, Array]:
    """``{path: fold_in(leaf_key(data, domain, path), word)}``, all at once.

    Args:
      data: Key data of the chain, uint32 of shape (2,).
      domain: What the keys are for.
      names: Canonical paths.
      word: Integer scalar, such as the count of the step.
    """
    names = list(names)
    if not names:
        return {}
    words = jnp.array([_words(domain, path) for path in names], jnp.uint32)
    counts = jnp.full((1, len(names)), word).astype(jnp.uint32)
    keys = _folded(data, jnp.concatenate([words.T, counts]))
    return {path: keys[index] for index, path in enumerate(names)}


@jax.jit
def _folded(data: Array, words: Array) -> Array:
    """The keys that start from ``data`` and take in the words of a column in turn."""
    key = jax.random.wrap_key_data(data, impl=_IMPL)
    # A loop, because a cipher takes long to compile and nothing to run.
    keys, _ = lax.scan(
        lambda keys, word: (jax.vmap(jax.random.fold_in)(keys, word), None),
        jnp.broadcast_to(key, words.shape[1:]),
        words,
    )
    return keys


@functools.lru_cache(maxsize=4096)
def _words(domain: str, path: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{domain}\0{path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def draw(data: Array, link: Array | int, plan: LeafPlan) -> Array:
    """Draws the sketch of one leaf for one link.

    A pure function of key data, path, link and position in the stack: tree order,
    other leaves, jit and the process's random settings do not enter.

    Args:
      data: Key data of the chain, uint32 of shape (2,).
      link: Index of the link, int32 scalar.
      plan: Plan of a leaf with mode ``"lowrank"``.

    Returns:
      Array of ``plan.sketch_shape`` in ``plan.wide_dtype``, with
      E[S S^T] = (rank / dim) I, save for ``"gaussian_raw"``, whose entries are N(0, 1).
    """
    return draw_all(data, link, (plan,))[plan.path]


def draw_all(
    data: Array, link: Array | int, plans: Iterable[LeafPlan]
) -> dict[str, Array]:
    """The sketches of every adapted leaf, ``{path: sketch}``, as ``draw`` gives them.

    Leaves whose sketches have one size and one distribution are drawn as one stack: a
    program has one drawing for all layers, and is compiled in a fraction of the time.
    """
    adapted = tuple(plan for plan in plans if plan.mode == "lowrank")
    return _draw_adapted(data, link, adapted) if adapted else {}


# Traced and lowered once for all the places of a step that may draw.
@functools.partial(jax.jit, static_argnames="plans")
def _draw_adapted(
    data: Array, link: Array | int, plans: tuple[LeafPlan, ...]
) -> dict[str, Array]:
    groups: dict[_Kind, list[LeafPlan]] = {}
    for plan in plans:
        kind = _Kind(plan.sketch, plan.rank, plan.dim, str(plan.wide_dtype))
        groups.setdefault(kind, []).append(plan)
    drawn: dict[str, Array] = {}
    for kind, members in groups.items():
        sizes = [math.prod(plan.batch_shape) for plan in members]
        words = [
            (*_words("sketch", plan.path), index)
            for plan, size in zip(members, sizes, strict=True)
            for index in range(size)
        ]
        stack = _draw_stack(data, link, jnp.array(words, jnp.uint32), kind)
        start = 0
        for plan, size in zip(members, sizes, strict=True):
            own = lax.slice_in_dim(stack, start, start + size)
            drawn[plan.path] = _apart(own, plan.sketch_shape)
            start += size
    return drawn


def _apart(sketch: Array, shape: tuple[int, ...]) -> Array:
    """The sketch in a shape that keeps its sharding to itself.

    Left to propagation, the sharding of one leaf would spread over the stack to all its
    members, and every step would gather them. It does not pass a reshape that joins a
    sharded axis to one before it.
    """
    twice = jnp.concatenate([sketch.ravel(), sketch.ravel()])
    return twice.reshape(2, *shape)[0]


class _Kind(NamedTuple):
    """What sketches must share to be drawn together; static and hashable."""

    distribution: str
    rank: int
    dim: int
    dtype: str


# Traced once for all stacks of one size, wherever they are drawn.
@functools.partial(jax.jit, static_argnames="kind")
def _draw_stack(data: Array, link: Array | int, words: Array, kind: _Kind) -> Array:
    """Sketches ``(n, rank, dim)`` from ``n`` rows of (two words of a path, index)."""
    first, second, index = words.T
    links = jnp.full_like(index, link)
    keys = _folded(data, jnp.stack([first, second, links, index]))
    # The process-wide flag changes the bits of every draw; a chain must not depend on it.
    with jax.threefry_partitionable(True):
        shape = (kind.rank, kind.dim)
        return _DISTRIBUTIONS[kind.distribution](keys, shape, jnp.dtype(kind.dtype))


def sample_sketch(params: Any, spec: Spec | int, *, key: Any, link: Any = 0) -> Any:
    """Draws the sketches of a whole tree, or of one leaf.

    Args:
      params: Tree of arrays or ``ShapeDtypeStruct``s.
      spec: A ``Spec`` or a rank.
      key: Typed threefry key, raw key data, or int seed.
      link: Index of the link, int or int32 scalar.

    Returns:
      The same tree with the sketch ``(batch..., rank, *axes of the sketched side)``
      for each adapted leaf and ``optax.MaskedNode()`` elsewhere.

    Raises:
      ValueError: If the spec does not fit the tree, or the key is no threefry key.

    Example:
      >>> import jax.numpy as jnp
      >>> S = sample_sketch(jnp.zeros((6, 4)), 2, key=0)
      >>> S.shape, bool(jnp.allclose(S @ S.T, jnp.eye(2), atol=1e-6))
      ((2, 4), True)

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Assumption 5.1.
    """
    data, link = key_data(key), jnp.asarray(link, jnp.int32)
    plans = plan_tree(spec, params)
    _, treedef = paths.flatten(params)
    drawn = draw_all(data, link, plans.values())
    return paths.unflatten(treedef, {p: drawn.get(p, optax.MaskedNode()) for p in plans})


def _gram(sketches: Array) -> Array:
    """S S^T of each sketch, (n, rank, rank)."""
    dims = (((2,), (2,)), ((0,), (0,)))
    return lax.dot_general(sketches, sketches, dims, precision=lax.Precision.HIGHEST)


def _whiten_once(sketches: Array, shift: float) -> Array:
    """L^-1 S with L L^T = S S^T + shift * trace(S S^T) I."""
    gram = _gram(sketches)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    # Inverting at rank x rank and multiplying is far cheaper than a triangular solve
    # on the tall matrix.
    inverse = inverse_cholesky(gram + shift * trace * eye)
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


def _gaussian_raw(keys: Array, shape: tuple[int, int], dtype: Any) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def _orthonormal(keys: Array, shape: tuple[int, int], dtype: Any) -> Array:
    # Rows of L^-1 G with a positive diagonal in L are Haar: whitening a Gaussian draw
    # and making it orthonormal are one thing.
    return _whiten(_gaussian_raw(keys, shape, dtype))


def _rademacher(keys: Array, shape: tuple[int, int], dtype: Any) -> Array:
    def folded(word: int) -> Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, word))(keys)

    # Not jax.random.rademacher, which draws other bits when x64 is on.
    bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(folded(0))
    signs = jnp.where(bits >> 31, -1, 1).astype(dtype)
    # A singular draw gives way to a Gaussian one. Both laws, and being singular, are
    # blind to permutations and signs of the axes, so the mean projector stays
    # (rank / dim) I.
    spare = _gaussian_raw(folded(1), shape, dtype)
    inverse = inverse_cholesky(_gram(signs) / shape[1])
    # A diagonal of L above 1e-2; NaN compares false.
    diagonal = jnp.diagonal(inverse, axis1=1, axis2=2)
    regular = jnp.all(diagonal < 1e2, axis=1)[:, None, None]
    return _whiten(jnp.where(regular, signs, spare))


def _coordinate(keys: Array, shape: tuple[int, int], dtype: Any) -> Array:
    rank, dim = shape
    chosen = jax.vmap(lambda key: jax.random.permutation(key, dim)[:rank])(keys)
    return jax.nn.one_hot(chosen, dim, dtype=dtype)


_DISTRIBUTIONS = {
    "orthonormal": _orthonormal,
    "gaussian": _orthonormal,
    "rademacher": _rademacher,
    "coordinate": _coordinate,
    "gaussian_raw": _gaussian_raw,
}
