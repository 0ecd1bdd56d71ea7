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
from raclora_jax._core.parts import cut
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.polar import matmul, polynomial
from raclora_jax._core.sharding import auto_axes, sharding_of, stack_sharding, zeros
from raclora_jax._core.types import Leaves, PyTree

# Odd polynomials a x + b x^3 + c x^5 that together take [0.05, 1] to [0.993, 1.007], the
# best of their degree for that interval, one after the other. Four that reach down to
# 0.01, six to 0.001 and the exact factor train no better: the language study of
# benchmarks.pretrained.polynomials.
# Amsel et al., The Polar Express, https://arxiv.org/abs/2505.16932, 2025.
POLYNOMIALS = (
    (6.752377658562778, -18.35097701582252, 13.263270201686687),
    (2.537864289097895, -1.874676947609866, 0.44128041789978734),
    (1.9269788381671442, -1.3066169275548185, 0.38070546999552385),
)
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
        ``rank x rank`` (``n x n`` if that is smaller); 0 keeps none. 0.9 changes little
        on text, 1 is for few and noisy targets. A new link begins anew as ``moments``
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
        return OrthogonalState(
            adam=ADAM.init(others) if others else (),
            momentum={p: jnp.zeros_like(leaves[p]) for p in factors} if momentum else {},
            count=jnp.zeros((), jnp.int32) if second_moment else (),
            second_moment={p: jnp.zeros_like(m) for p, m in means.items()}
            if second_moment
            else {},
            seen=jnp.zeros((), jnp.int32) if memory else (),
            gram={p: _no_gram(leaves[p], axis, block_size) for p, axis in factors.items()}
            if memory
            else {},
            unit={p: _no_unit(leaves[p], axis, block_size) for p, axis in factors.items()}
            if memory
            else {},
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
            answer[path] = math.sqrt(_long_side(direction, axis, block_size)) * direction
        new = OrthogonalState(adam, momenta, count, moments, seen, grams, units)
        return paths.unflatten(treedef, {p: answer[p] for p in leaves}), new

    return per_matrix(optax.GradientTransformationExtraArgs(init, update))


def polar_factor(matrix: Array, axis: int) -> Array:
    """``U V^T`` of ``matrix = U diag(s) V^T``, without a singular value decomposition.

    Args:
      matrix: Array ``(batch..., rank, *axes)``.
      axis: Where the rank stands: axes before it stack matrices, those behind it are the
        other side.

    Returns:
      Array of the same shape; zero where the matrix is.
    """
    return polar_factors({"": matrix}, {"": axis})[""]


@auto_axes(
    lambda matrices, axes, block_size=None: {
        path: sharding_of(array) for path, array in matrices.items()
    }
)
def polar_factors(
    matrices: dict[str, Array], axes: dict[str, int], block_size: int | None = None
) -> dict[str, Array]:
    """``polar_factor`` of several matrices: those of one rank are worked on as a stack.

    Polynomials of the Gram matrix on the short side. A matrix is divided by its largest
    entry before it is squared, so that one of any finite size has a finite answer.

    Args:
      matrices: ``{path: array (batch..., rank, *axes)}``.
      axes: ``{path: where the rank stands}``.
      block_size: How many rows are a matrix of their own at most; all by default.

    Returns:
      ``{path: array}``.
    """
    whole, axes_of_whole = matrices, axes
    matrices, axes = _in_blocks(matrices, axes, block_size)
    units = {path: _largest(matrix, axes[path]) for path, matrix in matrices.items()}
    lying = _in_units(matrices, axes, units)
    turned = _turned(matrices, axes, lying, _grams(lying, axes))
    return _joined(turned, whole, axes_of_whole)


@auto_axes(
    lambda matrices, axes, grams, units, seen, memory, block_size=None: (
        {path: sharding_of(array) for path, array in matrices.items()},
        {path: sharding_of(array) for path, array in grams.items()},
        {path: sharding_of(array) for path, array in units.items()},
    )
)
def whitened(
    matrices: dict[str, Array],
    axes: dict[str, int],
    grams: dict[str, Array],
    units: dict[str, Array],
    seen: Array,
    memory: float,
    block_size: int | None = None,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """``polar_factors`` by Gram matrices that are in part a mean over earlier matrices.

    Args:
      matrices: ``{path: array (batch..., rank, *axes)}``.
      axes: ``{path: where the rank stands}``.
      grams: ``{path: array (batch..., short, short)}``, the mean of the Gram matrices
        before, in squares of the units.
      units: ``{path: array (batch...,)}``, the largest entry of any matrix before.
      seen: int32 scalar, how many matrices there were, this one among them.
      memory: Weight of the mean.
      block_size: How many rows are a matrix of their own at most; all by default. Where
        there are more, ``grams`` and ``units`` have an axis of blocks behind the batch.

    Returns:
      ``{path: array}`` like ``matrices``, and the new ``grams`` and ``units``.
    """
    whole, axes_of_whole = matrices, axes
    matrices, axes = _in_blocks(matrices, axes, block_size)
    new_units, means, mixed = {}, {}, {}
    for path, matrix in matrices.items():
        largest = _largest(matrix, axes[path]).reshape(units[path].shape)
        new_units[path] = jnp.maximum(units[path], largest)
    spread = {
        path: unit.reshape(unit.shape + (1,) * (matrices[path].ndim - axes[path]))
        for path, unit in new_units.items()
    }
    lying = _in_units(matrices, axes, spread)
    for path, gram in _grams(lying, axes).items():
        # A larger entry than any before makes the unit larger.
        shrunk = units[path] / jnp.where(new_units[path] == 0, 1, new_units[path])
        before = grams[path] * (shrunk**2)[..., None, None]
        means[path] = before + (gram - before) / seen.astype(gram.dtype)
        mixed[path] = (1 - memory) * gram + memory * means[path]
    turned = _turned(matrices, axes, lying, mixed)
    return _joined(turned, whole, axes_of_whole), means, new_units


def _blocks(matrix: Array, axis: int, block_size: int | None) -> tuple[int, int]:
    """Into how many blocks of how many rows a matrix is cut; the last may have fewer."""
    rank = matrix.shape[axis]
    count = 1 if block_size is None else -(-rank // block_size)
    return count, -(-rank // count)


def _long_side(matrix: Array, axis: int, block_size: int | None) -> int:
    """The longer side of a block, at whose root its polar factor has mean square 1."""
    return max(_blocks(matrix, axis, block_size)[1], _sizes(matrix, axis)[1])


def _in_blocks(
    matrices: dict[str, Array], axes: dict[str, int], block_size: int | None
) -> tuple[dict[str, Array], dict[str, int]]:
    """Stacks of blocks of rows, filled up with zeros, and where their rows stand."""
    cut_up, within = dict(matrices), dict(axes)
    for path, matrix in matrices.items():
        axis = axes[path]
        count, size = _blocks(matrix, axis, block_size)
        if count > 1:
            filled = [(0, 0)] * matrix.ndim
            filled[axis] = (0, count * size - matrix.shape[axis])
            shape = (*matrix.shape[:axis], count, size, *matrix.shape[axis + 1 :])
            cut_up[path] = jnp.pad(matrix, filled).reshape(shape)
            within[path] = axis + 1
    return cut_up, within


def _joined(
    blocks: dict[str, Array], matrices: dict[str, Array], axes: dict[str, int]
) -> dict[str, Array]:
    """The inverse of ``_in_blocks`` for matrices that were cut."""
    found = {}
    for path, matrix in matrices.items():
        axis, rank = axes[path], matrix.shape[axes[path]]
        shape = (*matrix.shape[:axis], -1, *matrix.shape[axis + 1 :])
        found[path] = lax.slice_in_dim(blocks[path].reshape(shape), 0, rank, axis=axis)
    return found


def _in_units(
    matrices: dict[str, Array], axes: dict[str, int], units: dict[str, Array]
) -> dict[str, Array]:
    """The matrices, lying, divided by units with as many axes as they have."""
    return {
        path: _lying(matrix / jnp.where(units[path] == 0, 1, units[path]), axes[path])
        for path, matrix in matrices.items()
    }


def _grams(lying: dict[str, Array], axes: dict[str, int]) -> dict[str, Array]:
    """``F F^T`` of each matrix."""
    found = {}
    for path, matrix in lying.items():
        axis = axes[path]
        stack, behind = tuple(range(axis)), tuple(range(axis + 1, matrix.ndim))
        found[path] = _product(matrix, matrix, ((behind, behind), (stack, stack)))
    return found


def _turned(
    matrices: dict[str, Array],
    axes: dict[str, int],
    lying: dict[str, Array],
    grams: dict[str, Array],
) -> dict[str, Array]:
    """``G^(-1/2) F`` of each matrix, in its own shape."""
    kinds: dict[tuple[int, jnp.dtype], dict[str, Array]] = {}
    for path, gram in grams.items():
        kinds.setdefault((gram.shape[-1], gram.dtype), {})[path] = gram
    turned = {}
    for (short, _), members in kinds.items():
        flat = [gram.reshape(-1, short, short) for gram in members.values()]
        whole = jnp.concatenate(flat)
        # A diagonal of a Gram matrix, so never below zero; NaN compares false.
        never = whole[0, 0, 0] < 0
        sizes = [gram.shape[0] for gram in flat]
        roots = cut(_inverse_root(whole), sizes, never)
        for (path, gram), root in zip(members.items(), roots, strict=True):
            root, axis = root.reshape(gram.shape), axes[path]
            stack = tuple(range(axis))
            one = _product(root, lying[path], (((axis + 1,), (axis,)), (stack, stack)))
            turned[path] = _standing(one, matrices[path].shape, axis)
    return {path: turned[path] for path in matrices}


def _inverse_root(gram: Array) -> Array:
    """``G^(-1/2)`` of a stack of Gram matrices, zero where one is."""
    gram, scale = _divided(gram, jnp.trace(gram, axis1=1, axis2=2))
    # The first product says more of the largest eigenvalue than the trace does.
    square = matmul(gram, gram)
    gram, nearer = _divided(gram, jnp.sum(square**2, axis=(1, 2)) ** 0.25)
    first, *others = POLYNOMIALS
    root = step = polynomial(first, gram, square / nearer**2)
    for coefficients in others:
        # Everything here is a polynomial of one symmetric matrix, so all of it commutes.
        gram = matmul(matmul(step, gram), step)
        step = polynomial(coefficients, gram, matmul(gram, gram))
        root = matmul(step, root)
    return root / jnp.sqrt(scale * nearer)


def _divided(matrix: Array, size: Array) -> tuple[Array, Array]:
    """Matrices divided by their sizes, or by one where a size is zero."""
    size = jnp.where(size > 0, size, 1)[:, None, None]
    return matrix / size, size


def _largest(matrix: Array, axis: int) -> Array:
    """The largest entry of each matrix, its axes kept with size 1."""
    return jnp.max(jnp.abs(matrix), axis=tuple(range(axis, matrix.ndim)), keepdims=True)


def _no_gram(factor: Array, axis: int, block_size: int | None) -> Array:
    """Zeros for the Gram matrices of a factor, on its short side."""
    short = min(_blocks(factor, axis, block_size)[1], _sizes(factor, axis)[1])
    shape = (*_stack(factor, axis, block_size), short, short)
    return zeros(shape, factor.dtype, stack_sharding(factor, axis))


def _no_unit(factor: Array, axis: int, block_size: int | None) -> Array:
    """Zeros, one for each matrix of a factor."""
    shape = _stack(factor, axis, block_size)
    return zeros(shape, factor.dtype, stack_sharding(factor, axis))


def _stack(factor: Array, axis: int, block_size: int | None) -> tuple[int, ...]:
    """The sizes of the axes before those of a matrix, blocks among them."""
    count, _ = _blocks(factor, axis, block_size)
    return (*factor.shape[:axis], *((count,) if count > 1 else ()))


def _lying(matrix: Array, axis: int) -> Array:
    """The matrix, turned if it has more rows than columns."""
    rows, columns = _sizes(matrix, axis)
    if columns >= rows:
        return matrix
    return matrix.reshape(*matrix.shape[: axis + 1], columns).mT


def _standing(matrix: Array, shape: tuple[int, ...], axis: int) -> Array:
    """The inverse of ``_lying`` for a matrix that had a shape."""
    rows, columns = shape[axis], math.prod(shape[axis + 1 :])
    return matrix if columns >= rows else matrix.mT.reshape(shape)


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


def _sizes(matrix: Array, axis: int) -> tuple[int, int]:
    return matrix.shape[axis], math.prod(matrix.shape[axis + 1 :])


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


def _product(left: Array, right: Array, dims: Any) -> Array:
    return lax.dot_general(left, right, dims, precision=lax.Precision.HIGHEST)
