"""The stateless inner rule: every direction a factor has, at one length."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import ADAM, OrthogonalState, known_plans
from raclora_jax._chain.separable import per_matrix
from raclora_jax._core import checks, paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Leaves, PyTree
from raclora_jax._core.whiten import long_side, nothing_seen, polar_factors, whitened

_SECOND_MOMENT_DECAY = 0.95


def orthogonal(
    *,
    momentum: float = 0.0,
    second_moment: bool = False,
    memory: float = 0.0,
    block_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each factor's gradient by its polar factor; an ``inner`` without state.

    ``F = U diag(s) V^T`` becomes ``sqrt(max(rank, n)) U V^T``, of root mean square 1,
    with ``n`` numbers on the side that is not sketched. Singular values down to 0.05 of
    their 8-norm ``(sum s^8)^(1/8)``, which is near the largest, end within 0.7 % of 1,
    and smaller ones shrink towards zero. At rank 1 this is the normalised gradient.
    Leaves trained in full (biases, norms, a head) get Adam.

    Its step falls by ``f(W+) <= f(W) - lr sqrt(n) ||S G||_* + lr^2 n rank L / 2``, and
    ``E ||S G||_* >= lambda ||G||_*`` by Jensen's inequality, so the chain keeps its
    guarantee for exact gradients. Under minibatch noise ``sigma`` a floor of about
    ``2 sqrt(dim) sigma`` in the nuclear norm stays, as with every normalised step
    without momentum: larger batches, ``momentum`` or ``memory`` lower it.

    With ``memory = m`` the gradient ``F_k`` of step ``k`` of a link is whitened by what
    the link has seen before it, too: ::

        ((1 - m) F_k F_k^T + m / k sum_{j <= k} F_j F_j^T)^(-1/2) F_k

    in place of ``(F_k F_k^T)^(-1/2) F_k = U V^T``. Its singular values are at most
    ``1 / sqrt(1 - m)``, and a batch with a large gradient takes a larger step than one
    with a small one, so that noise averages out over steps.

    With ``block_size = k`` the rows of a factor are cut into the fewest blocks of at
    most ``k``, of one size but for the last, and each is a matrix of its own in all of
    the above. Of ``rank > k`` rows the Gram matrices then cost ``k / rank`` of what they
    cost, their polynomials ``(k / rank)^2``, and a memory has ``rank k`` numbers. Blocks
    are not orthogonal to each other: a step is at most ``sqrt(rank / k)`` times as long
    in its largest direction, and as long as before over all. It falls by no less, since
    the nuclear norms of blocks add up to at least that of the whole.

    Args:
      momentum: Decay of a momentum of the factor's size, with Nesterov's look ahead, in
        [0, 1); 0 keeps none. A new link resets it as ``moments`` says.
      second_moment: Whether to keep a mean square for each of the ``n`` columns, as
        NorMuon does, and divide by its root.
      memory: Weight in [0, 1] of the mean of the Gram matrices of the link, which are
        ``rank x rank`` (``n x n`` if that is smaller); 0 keeps none. 0.8, with links of
        25, is for few and noisy targets; on text it changes little at small ranks, and
        0.9 helps whole gradients in long runs. A new link begins anew as ``moments``
        says.
      block_size: How many rows are whitened together at most; all by default. For large
        ranks, and leaves that take no sketch.

    Returns:
      An optax transformation, to be passed as ``inner``. It takes the leaves' plans as
      the extra argument ``plans``, which ``raclora`` hands over; without it, leaves of
      two axes are read as factors of ``(rank, n)``.

    Raises:
      ValueError: If ``momentum`` is outside [0, 1), ``memory`` outside [0, 1], or
        ``block_size`` below 1.
      TypeError: If an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> params = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
      >>> tx = rl.raclora(1e-2, 2, inner=rl.orthogonal(), key=0)
      >>> jax.tree.leaves(tx.init(params).inner_state.lowrank)
      []

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024. Amsel et
      al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025. Li et al.,
      `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025. Blocks of rows: Khaled et al.,
      `MuonBP <https://arxiv.org/abs/2510.16981>`_, 2025, where they are what a device
      holds.
    """
    checks.number("momentum", momentum, checks.DECAY)
    checks.flag("second_moment", second_moment)
    checks.number("memory", memory, checks.PROBABILITY)
    if block_size is not None:
        block_size = checks.count("block_size", block_size)

    def init(params: PyTree) -> OrthogonalState:
        leaves, _ = paths.flatten(params)
        factors, others = _split(leaves, known_plans())
        means = {p: jnp.mean(leaves[p], axis=axis) for p, axis in factors.items()}
        seen = {
            path: nothing_seen(leaves[path], axis, block_size)
            for path, axis in (factors.items() if memory else ())
        }
        return OrthogonalState(
            adam=ADAM.init(others) if others else (),
            momentum={p: jnp.zeros_like(leaves[p]) for p in factors} if momentum else {},
            count=jnp.zeros((), jnp.int32) if second_moment else (),
            second_moment={p: jnp.zeros_like(m) for p, m in means.items()}
            if second_moment
            else {},
            seen=jnp.zeros((), jnp.int32) if memory else (),
            gram={path: gram for path, (gram, _) in seen.items()},
            unit={path: unit for path, (_, unit) in seen.items()},
        )

    def update(
        updates: PyTree,
        state: OrthogonalState,
        params: PyTree = None,
        *,
        plans: dict[str, LeafPlan] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, OrthogonalState]:
        del params, extra
        leaves, treedef = paths.flatten(updates)
        factors, others = _split(leaves, known_plans() if plans is None else plans)
        adam = state.adam
        answer: Leaves = {}
        if others:
            answer, adam = ADAM.update(others, adam)
        momenta, moments, count = {}, {}, state.count
        if second_moment:
            count = optax.safe_increment(count)
        for path in factors:
            gradient = leaves[path]
            if momentum:
                momenta[path] = momentum * state.momentum[path] + gradient
                gradient = momentum * momenta[path] + gradient
            answer[path] = gradient
        gradients = {p: answer[p] for p in factors}
        seen, grams, units = state.seen, state.gram, state.unit
        if memory:
            seen = optax.safe_increment(seen)
            directions, grams, units = whitened(
                gradients, factors, grams, units, seen, memory, block_size
            )
        else:
            directions = polar_factors(gradients, factors, block_size)
        for path, axis in factors.items():
            direction = directions[path]
            if second_moment:
                moments[path], direction = _even(
                    direction, state.second_moment[path], count, axis
                )
            answer[path] = math.sqrt(long_side(direction, axis, block_size)) * direction
        new = OrthogonalState(adam, momenta, count, moments, seen, grams, units)
        return paths.unflatten(treedef, {p: answer[p] for p in leaves}), new

    return per_matrix(optax.GradientTransformationExtraArgs(init, update))


def _split(
    leaves: Leaves, plans: dict[str, LeafPlan] | None
) -> tuple[dict[str, int], Leaves]:
    """The rank axes of the factors, and the leaves that are none."""
    factors, others = {}, {}
    for path, leaf in leaves.items():
        if plans is None:
            axis = 0 if jnp.ndim(leaf) == 2 else None
        elif path in plans:
            axis = len(plans[path].batch) if plans[path].adapted else None
        else:
            raise ValueError(
                f"orthogonal was handed leaf {paths.show(path)}, which raclora has no "
                "plan of; nothing between raclora and orthogonal may rename or join "
                "leaves"
            )
        if axis is None:
            others[path] = leaf
        else:
            factors[path] = axis
    return factors, others


def _even(
    direction: Array, before: Array, count: Array, axis: int
) -> tuple[Array, Array]:
    """The columns' new mean squares, and the direction evened by their roots."""
    decay = _SECOND_MOMENT_DECAY
    now = jnp.mean(direction**2, axis=axis)
    mean = decay * before + (1 - decay) * now
    unbiased = mean / (1 - decay ** count.astype(mean.dtype))
    tiny = float(jnp.finfo(mean.dtype).tiny)
    even = (
        direction
        * lax.rsqrt(jnp.maximum(unbiased, tiny))[(slice(None),) * axis + (None,)]
    )
    # As long as it was, so that the learning rate keeps its meaning.
    own = tuple(range(axis, direction.ndim))
    length, was = (
        jnp.sqrt(jnp.sum(x**2, axis=own, keepdims=True)) for x in (even, direction)
    )
    return mean, even * (was / jnp.where(length > 0, length, 1))
