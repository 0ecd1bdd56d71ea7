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
from raclora_jax._core.polar import POLYNOMIALS, matmul, polynomial
from raclora_jax._core.sharding import auto_axes, sharding_of
from raclora_jax._core.types import Leaves, PyTree

_SECOND_MOMENT_DECAY = 0.95


def orthogonal(
    *, momentum: float = 0.0, second_moment: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Replaces each factor's gradient by its polar factor; an ``inner`` without state.

    ``F = U diag(s) V^T`` becomes ``sqrt(max(rank, n)) U V^T``, of root mean square 1,
    with ``n`` numbers on the side that is not sketched. Singular values down to 0.01 of
    ``|F|`` end within 1.3 % of 1, smaller ones shrink towards zero. At rank 1
    this is the normalised gradient. Leaves trained in full (biases, norms, a head) get
    Adam.

    Its step falls by ``f(W+) <= f(W) - lr sqrt(n) ||S G||_* + lr^2 n rank L / 2``, and
    ``E ||S G||_* >= lambda ||G||_*`` by Jensen's inequality, so the chain keeps its
    guarantee for exact gradients. Under minibatch noise ``sigma`` a floor of about
    ``2 sqrt(dim) sigma`` in the nuclear norm stays, as with every normalised step
    without momentum: larger batches or ``momentum`` lower it.

    Args:
      momentum: Decay of a momentum of the factor's size, with Nesterov's look ahead, in
        [0, 1); 0 keeps none. A new link resets it as ``moments`` says.
      second_moment: Whether to keep a mean square for each of the ``n`` columns, as
        NorMuon does, and divide by its root.

    Returns:
      An optax transformation, to be passed as ``inner``. It takes the leaves' plans as
      the extra argument ``plans``, which ``raclora`` hands over; without it, leaves of
      two axes are read as factors of ``(rank, n)``.

    Raises:
      ValueError: If ``momentum`` is outside [0, 1).
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
      `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025.
    """
    checks.number("momentum", momentum, checks.DECAY)
    checks.flag("second_moment", second_moment)

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
        directions = polar_factors({p: answer[p] for p in factors}, factors)
        for path, axis in factors.items():
            direction = directions[path]
            if second_moment:
                moments[path], direction = _even(
                    direction, state.second_moment[path], count, axis
                )
            answer[path] = math.sqrt(max(_sizes(direction, axis))) * direction
        new = OrthogonalState(adam, momenta, count, moments)
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
    lambda matrices, axes: {path: sharding_of(array) for path, array in matrices.items()}
)
def polar_factors(matrices: dict[str, Array], axes: dict[str, int]) -> dict[str, Array]:
    """``polar_factor`` of several matrices: those of one rank are worked on as a stack.

    Polynomials of the Gram matrix on the short side. A matrix is divided by its largest
    entry before it is squared, so that one of any finite size has a finite answer.

    Args:
      matrices: ``{path: array (batch..., rank, *axes)}``.
      axes: ``{path: where the rank stands}``.

    Returns:
      ``{path: array}``.
    """
    wide = {
        path: _of_size_one(_lying(matrix, axes[path]), axes[path])
        for path, matrix in matrices.items()
    }
    grams: dict[tuple[int, jnp.dtype], dict[str, Array]] = {}
    for path, matrix in wide.items():
        axis = axes[path]
        stack, behind = tuple(range(axis)), tuple(range(axis + 1, matrix.ndim))
        gram = _product(matrix, matrix, ((behind, behind), (stack, stack)))
        kind = matrix.shape[axis], matrix.dtype
        grams.setdefault(kind, {})[path] = gram
    polar = {}
    for (short, _), members in grams.items():
        flat = [gram.reshape(-1, short, short) for gram in members.values()]
        whole = jnp.concatenate(flat)
        # A diagonal of a Gram matrix, so never below zero; NaN compares false.
        never = whole[0, 0, 0] < 0
        sizes = [gram.shape[0] for gram in flat]
        roots = cut(_inverse_root(whole), sizes, never)
        for (path, gram), root in zip(members.items(), roots, strict=True):
            root, axis = root.reshape(gram.shape), axes[path]
            stack = tuple(range(axis))
            turned = _product(root, wide[path], (((axis + 1,), (axis,)), (stack, stack)))
            polar[path] = _standing(turned, matrices[path].shape, axis)
    return {path: polar[path] for path in matrices}


def _inverse_root(gram: Array) -> Array:
    """``G^(-1/2)`` of a stack of Gram matrices, zero where one is."""
    square = jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
    square = jnp.where(square > 0, square, 1)
    gram = gram / square

    def turn(
        carry: tuple[Array, Array], coefficients: Array
    ) -> tuple[tuple[Array, Array], None]:
        gram, root = carry
        # Everything here is a polynomial of one symmetric matrix, so all of it commutes.
        step = polynomial(coefficients, gram)
        return (matmul(matmul(step, gram), step), matmul(step, root)), None

    # A loop, so that a compiler which tunes its products does so once.
    *first, last = jnp.asarray(POLYNOMIALS, gram.dtype)
    start = gram, jnp.eye(gram.shape[-1], dtype=gram.dtype)[None] / jnp.sqrt(square)
    (gram, root), _ = lax.scan(turn, start, jnp.stack(first))
    return matmul(polynomial(last, gram), root)


def _of_size_one(matrix: Array, axis: int) -> Array:
    own = tuple(range(axis, matrix.ndim))
    largest = jnp.max(jnp.abs(matrix), axis=own, keepdims=True)
    return matrix / jnp.where(largest == 0, 1, largest)


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
