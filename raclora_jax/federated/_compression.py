"""Compressed estimates of the clients' mean gradient: QGD, MARINA and EF21."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._core import checks, paths
from raclora_jax._core.keys import folded, key_data, leaf_key
from raclora_jax._core.types import KeyLike, PyTree

Name = Literal["qgd", "marina", "ef21"]


class Sparse(NamedTuple):
    """Some numbers of an array.

    Attributes:
      values: ``(k,)``.
      indices: int32 ``(k,)``, their places in the flattened array.
    """

    values: Array
    indices: Array


@dataclasses.dataclass(frozen=True)
class Compression:
    """How clients send gradients. Made by ``qgd``, ``marina`` and ``ef21``.

    Frozen and hashable: a static argument of ``jax.jit``.

    Args:
      name: ``"qgd"``, ``"marina"`` or ``"ef21"``.
      share: Share of the numbers of each leaf that are sent.
      probability: How likely a round sends all of them, for MARINA.

    Raises:
      ValueError: If share or probability is not in (0, 1].
    """

    name: Name
    share: float
    probability: float = 1.0

    def __post_init__(self) -> None:
        for field in ("share", "probability"):
            checks.number(f"{self.name}: {field}", getattr(self, field), checks.SHARE)


def qgd(share: float) -> Compression:
    """Quantised gradient descent: the mean of ``rand_k(grad f_j)``.

    Unbiased, and as noisy as the gradients are large: it stops at a floor wherever the
    clients' gradients do not vanish at the optimum.

    Args:
      share: k over the size of each leaf.

    Returns:
      A ``Compression``.

    Example:
      >>> qgd(0.1).share
      0.1

    References:
      Alistarh et al., `QSGD <https://arxiv.org/abs/1610.02132>`_, 2017; Khirirat et al.,
      `Distributed learning with compressed gradients
      <https://arxiv.org/abs/1806.06573>`_, 2018.
    """
    return Compression("qgd", share)


def marina(share: float, *, probability: float) -> Compression:
    """MARINA: ``g <- g + mean of rand_k(grad f_j(W') - grad f_j(W))``.

    Now and then, on a coin that all know from (key, round), the gradients are sent in
    full. What is compressed vanishes as the run converges, so there is no floor.

    Args:
      share: k over the size of each leaf.
      probability: How likely a round is sent in full.

    Returns:
      A ``Compression``.

    Example:
      >>> marina(0.1, probability=0.1).probability
      0.1

    References:
      Gorbunov et al., `MARINA <https://arxiv.org/abs/2102.07845>`_, 2021.
    """
    return Compression("marina", share, probability)


def ef21(share: float) -> Compression:
    """EF21: ``g_j <- g_j + top_k(grad f_j - g_j)``, and the mean of the ``g_j``.

    Each client remembers what it has sent so far; the largest numbers of what is missing
    go next.

    Args:
      share: k over the size of each leaf.

    Returns:
      A ``Compression``.

    Example:
      >>> ef21(0.1).name
      'ef21'

    References:
      Richtarik et al., `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021.
    """
    return Compression("ef21", share)


def is_full(compression: Compression, *, round: Array | int, key: KeyLike) -> Array:
    """Whether a round sends everything: MARINA's coin, and the first round.

    Args:
      compression: The compression of the run.
      round: The round.
      key: The public key of the run.

    Returns:
      A boolean scalar.

    Example:
      >>> bool(is_full(marina(0.1, probability=0.5), round=0, key=0))
      True
    """
    first = jnp.asarray(round) == 0
    if compression.name != "marina":
        return first & (compression.name == "ef21")
    # No client in this key: all throw one coin, and all send everything or none does.
    own = _key(key, "coin", round)
    return first | (jax.random.uniform(own) < compression.probability)


def compress(
    compression: Compression,
    grads: PyTree,
    memory: PyTree,
    *,
    full: bool,
    client: Array | int,
    round: Array | int,
    key: KeyLike,
) -> tuple[PyTree, PyTree]:
    """What a client sends of its gradient.

    The estimate lives with the weights, not in factor coordinates: these are new in every
    link, so the server projects the estimate on the sketch of the link.

    Args:
      compression: The compression of the run.
      grads: The client's gradients, dense arrays.
      memory: The gradients of the last round (MARINA), or what was sent so far (EF21);
        anything of the same structure in a first round. QGD hands it through.
      full: Static; whether the round sends everything, as ``is_full`` says.
      client: The client's number.
      round: The round.
      key: The public key of the run.

    Returns:
      ``(message, memory)``: a ``Sparse`` for each leaf, or the array itself in a round
      that sends everything.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = {"kernel": jnp.arange(6.0).reshape(2, 3)}
      >>> message, _ = compress(ef21(0.5), grads, {"kernel": jnp.zeros((2, 3))},
      ...                       full=False, client=0, round=1, key=0)
      >>> message["kernel"].values.tolist()
      [5.0, 4.0, 3.0]
    """
    if full:
        return grads, grads
    if compression.name == "qgd":
        return _rand_k(grads, compression.share, client, round, key), memory
    missing = jax.tree.map(lambda grad, known: grad - known, grads, memory)
    if compression.name == "marina":
        # MARINA's next difference is to this gradient itself, EF21's to what the server
        # knows of it, the sum of all that was sent.
        return _rand_k(missing, compression.share, client, round, key), grads
    leaves, treedef = paths.flatten(missing)
    sent = {path: _top_k(leaf, compression.share) for path, leaf in leaves.items()}
    message = paths.unflatten(treedef, sent)
    added = jax.tree.map(
        lambda known, part: known + dense(part, known.shape),
        memory,
        message,
    )
    return message, added


def estimate(
    compression: Compression, previous: PyTree, messages: PyTree, *, full: bool
) -> PyTree:
    """The server's estimate of the mean gradient.

    Args:
      compression: The compression of the run.
      previous: The estimate of the last round; anything of its structure in a first one.
      messages: The clients' messages, stacked along a leading axis.
      full: Static; as in ``compress``.

    Returns:
      Dense arrays.

    Raises:
      ValueError: If the messages are not of this round's kind and structure, are not
        finite, or name places that a leaf has not; what is traced is not looked at.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> grads = jnp.arange(4.0)
      >>> message, _ = compress(ef21(0.5), grads, 0 * grads,
      ...                       full=False, client=0, round=1, key=0)
      >>> stacked = jax.tree.map(lambda array: array[None], message)
      >>> estimate(ef21(0.5), jnp.zeros(4), stacked, full=False).tolist()
      [0.0, 0.0, 2.0, 3.0]
    """

    def mean(known: Array, parts: Any) -> Array:
        if full:
            return parts.mean(axis=0)
        spread = jax.vmap(lambda part: dense(part, known.shape))(parts).mean(axis=0)
        return spread if compression.name == "qgd" else known + spread

    leaves, treedef = paths.flatten(previous)
    sent, _ = paths.flatten(messages, is_leaf=lambda part: isinstance(part, Sparse))
    if set(leaves) != set(sent):
        odd = sorted(set(leaves) ^ set(sent))[0]
        raise ValueError(
            f"messages and estimate differ in {paths.show(odd)}; stack messages of "
            "compress, all of the same tree"
        )
    for path, parts in sent.items():
        _check_parts(paths.show(path), leaves[path], parts, full)
    return paths.unflatten(treedef, {p: mean(leaves[p], sent[p]) for p in leaves})


def _check_parts(name: str, known: Any, parts: Any, full: bool) -> None:
    """Refuses what clients sent of a leaf, if it cannot be theirs."""
    if isinstance(parts, Sparse) == full:
        raise ValueError(
            f"{name}: full={full} and the messages are {type(parts).__name__}; pass the "
            "same full= to compress and to estimate, as is_full says"
        )
    traced = any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(parts))
    if traced:
        return
    values = np.asarray(parts.values if isinstance(parts, Sparse) else parts)
    wrong = ~np.isfinite(values)
    if isinstance(parts, Sparse):
        places = np.asarray(parts.indices)
        if places.shape != values.shape or places.ndim != 2:
            raise ValueError(
                f"{name}: values of shape {values.shape} and indices of shape "
                f"{places.shape}, expected (clients, k) of both"
            )
        wrong = wrong | (places < 0) | (places >= np.size(known))
    bad = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    if bad.size:
        raise ValueError(
            f"{name}: message {bad[0]} of the stack is not finite or names a place "
            f"outside the {np.size(known)} numbers of the leaf; leave it out of the stack"
        )


def dense(sparse: Sparse, shape: tuple[int, ...]) -> Array:
    """The array with zeros wherever nothing was sent."""
    zeros = jnp.zeros(math.prod(shape), sparse.values.dtype)
    return zeros.at[sparse.indices].set(sparse.values).reshape(shape)


def _top_k(leaf: Array, share: float) -> Sparse:
    flat = leaf.ravel()
    # Rounded up: a leaf of few numbers sends one at least.
    _, indices = jax.lax.top_k(jnp.abs(flat), math.ceil(share * flat.size))
    return Sparse(flat[indices], indices.astype(jnp.int32))


def _rand_k(
    tree: PyTree, share: float, client: Array | int, round: Array | int, key: KeyLike
) -> PyTree:
    """k numbers of each leaf, scaled by ``size / k``: right on average."""
    leaves, treedef = paths.flatten(tree)

    def one(path: str, leaf: Array) -> Sparse:
        flat = leaf.ravel()
        count = math.ceil(share * flat.size)
        # Clients choose apart from one another, so that their errors average out.
        own = jax.random.fold_in(_key(key, path, round), client)
        with jax.threefry_partitionable(True):
            indices = jax.random.permutation(own, flat.size)[:count]
        return Sparse(flat[indices] * (flat.size / count), indices.astype(jnp.int32))

    return paths.unflatten(treedef, {p: one(p, leaf) for p, leaf in leaves.items()})


def _key(key: KeyLike, path: str, round: Array | int) -> Array:
    own = leaf_key(key_data(key), "compression", path)
    words = jnp.asarray([[round]], jnp.uint32)
    return folded(jax.random.key_data(own), words)[0]
