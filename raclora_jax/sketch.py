"""Sketches: (key data, path, link) in, one frozen random factor out."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable
from typing import Any

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
    digest = hashlib.blake2b(f"{domain}\0{path}".encode(), digest_size=8).digest()
    key = jax.random.wrap_key_data(data, impl=_IMPL)
    for word in (digest[:4], digest[4:]):
        key = jax.random.fold_in(key, jnp.uint32(int.from_bytes(word, "little")))
    return key


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
    key = jax.random.fold_in(leaf_key(data, "sketch", plan.path), link)
    stack = math.prod(plan.batch_shape)
    shape = plan.sketch_shape[len(plan.batch) :]

    def one(index: Array) -> Array:
        index_key = jax.random.fold_in(key, index)
        return _DISTRIBUTIONS[plan.sketch](index_key, shape, plan.wide_dtype)

    # The process-wide flag changes the bits of every draw; a chain must not depend on it.
    with jax.threefry_partitionable(True):
        sketches = jax.vmap(one)(jnp.arange(stack, dtype=jnp.int32))
    return sketches.reshape(plan.sketch_shape)


def draw_all(
    data: Array, link: Array | int, plans: Iterable[LeafPlan]
) -> dict[str, Array]:
    """The sketches of every adapted leaf, ``{path: sketch}``."""
    return {plan.path: draw(data, link, plan) for plan in plans if plan.mode == "lowrank"}


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


def _gram(sketch: Array) -> Array:
    """S S^T over the axes of the sketched side, (rank, rank)."""
    axes = tuple(range(1, sketch.ndim))
    dims = ((axes, axes), ((), ()))
    return lax.dot_general(sketch, sketch, dims, precision=lax.Precision.HIGHEST)


def _whiten_once(sketch: Array, shift: float) -> Array:
    """L^-1 S with L L^T = S S^T + shift * trace(S S^T) I."""
    gram = _gram(sketch)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    # Inverting at rank x rank and multiplying is far cheaper than a triangular solve
    # on the tall matrix.
    inverse = inverse_cholesky(gram + shift * jnp.trace(gram) * eye)
    return jnp.tensordot(inverse, sketch, axes=1, precision=lax.Precision.HIGHEST)


def _whiten(sketch: Array) -> Array:
    """Orthonormal rows by Cholesky QR; the shift keeps an ill-conditioned draw finite.

    Fukaya et al., `Shifted Cholesky QR <https://arxiv.org/abs/1809.11085>`_, 2018.
    """
    shift = 4 * float(jnp.finfo(sketch.dtype).eps)
    return _whiten_once(_whiten_once(_whiten_once(sketch, shift), shift), 0.0)


def _gaussian_raw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, shape, dtype)


def _orthonormal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    # Rows of L^-1 G with a positive diagonal in L are Haar: whitening a Gaussian draw
    # and making it orthonormal are one thing.
    return _whiten(_gaussian_raw(key, shape, dtype))


def _rademacher(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    # Not jax.random.rademacher, which draws other bits when x64 is on.
    bits = jax.random.bits(jax.random.fold_in(key, 0), shape, jnp.uint32)
    signs = jnp.where(bits >> 31, -1, 1).astype(dtype)
    spare = jax.random.normal(jax.random.fold_in(key, 1), shape, dtype)
    # A singular draw gives way to a Gaussian one. Both laws, and being singular, are
    # blind to permutations and signs of the axes, so the mean projector stays
    # (rank / dim) I.
    gram = _gram(signs) / math.prod(shape[1:])
    # A diagonal of L above 1e-2; NaN compares false.
    regular = jnp.all(jnp.diagonal(inverse_cholesky(gram)) < 1e2)
    return _whiten(jnp.where(regular, signs, spare))


def _coordinate(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    dim = math.prod(shape[1:])
    chosen = jax.random.permutation(key, dim)[: shape[0]]
    return jax.nn.one_hot(chosen, dim, dtype=dtype).reshape(shape)


_DISTRIBUTIONS = {
    "orthonormal": _orthonormal,
    "gaussian": _orthonormal,
    "rademacher": _rademacher,
    "coordinate": _coordinate,
    "gaussian_raw": _gaussian_raw,
}
