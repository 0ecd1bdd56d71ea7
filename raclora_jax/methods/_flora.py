"""Flora: momentum compressed by random projections that are never stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import as_rule
from raclora_jax._core import checks, paths
from raclora_jax._core.keys import key_data
from raclora_jax._core.lowrank import change_of_basis, in_basis, lift_leaf
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.methods._algebra import refuse_alpha
from raclora_jax.methods._method import Method, from_transform
from raclora_jax.methods._projected import (
    basis_plans,
    of_one_side,
    seen_in,
    size_of_moved,
    unit_projections,
)


class FloraState(NamedTuple):
    """State of Flora.

    Attributes:
      momentum: ``{path: array}``, of the factor's shape where the leaf is adapted and of
        the leaf's where it is not.
      inner: State of the inner rule.
      count: int32 scalar, steps taken.
    """

    momentum: dict[str, Array]
    inner: Any
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def flora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    momentum: float = 0.9,
    key: KeyLike,
) -> Method:
    """Flora: ``M <- b M + (1 - b) A D``, ``W <- W - lr (b A^T M + (1 - b) D)``.

    D is the direction that ``inner`` makes of the dense gradient and A is ``rank x dim``
    with entries N(0, 1/rank), so ``E A^T A = I``. A is drawn anew every
    ``spec.resample_every`` steps, and then ``M <- A' (A^T M)`` with the old A inside and
    the new one outside; the released optax code uses the old one for both and reads the
    result with the new. ``A' A^T`` multiplies the length of M by ``sqrt(dim / rank)`` in
    the mean square, so M stays bounded only if
    ``momentum^resample_every sqrt(dim / rank) < 1`` (our remark). A comes from the key
    and is never stored. Published: rank 4, ``resample_every=1000``. Left out of the
    released code: the step scaled by the size of the parameter, and small or oblong
    leaves passed over; say so by rules.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, ranks, and the steps a projection lives; its ``sketch`` is not
        used, and it has no ``alpha``.
      inner: Preconditioner without learning rate, of dense gradients; by default
        Adafactor's: a factored second moment, clipped at root mean square 1.
      momentum: b, in [0, 1).
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``. It trains every number of its leaves: the second term is the
      direction itself.

    Raises:
      ValueError: If ``momentum`` is outside [0, 1), the side is drawn, ``alpha`` is
        given, or a rank exceeds a side.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = flora(1e-2, Spec(2), key=0), {"kernel": jnp.zeros((6, 4))}
      >>> method.trained(params), method.optimizer_bytes(params)
      (24, 96)

    References:
      Hao, Cao and Mou, `Flora: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024.
    """
    spec, data = of_one_side(spec), key_data(key)
    checks.number("momentum", momentum, checks.DECAY)
    refuse_alpha(spec, "Flora draws A")
    rule = as_rule(_adafactor() if inner is None else inner)

    def init(params: PyTree) -> FloraState:
        plans = basis_plans(spec, params)
        moved = {path: plan for path, plan in plans.items() if plan.mode != "frozen"}
        zeros = {p: jnp.zeros(pl.trained_shape, pl.wide_dtype) for p, pl in moved.items()}
        leaves, _ = paths.flatten(params)
        seen = {p: jnp.asarray(leaves[p], pl.wide_dtype) for p, pl in moved.items()}
        return FloraState(zeros, rule.init(seen), jnp.zeros((), jnp.int32))

    def update(
        grads: PyTree, state: FloraState, params: PyTree
    ) -> tuple[PyTree, FloraState]:
        plans = basis_plans(spec, grads)
        leaves, treedef = paths.flatten(grads)
        weights, _ = paths.flatten(params)
        moved = {path: plan for path, plan in plans.items() if plan.mode != "frozen"}
        seen, like = (
            {p: jnp.asarray(tree[p], plan.wide_dtype) for p, plan in moved.items()}
            for tree in (leaves, weights)
        )
        directions, inner = rule.update(seen, state.inner, like)
        link = state.count // spec.resample_every
        now = unit_projections(data, link, plans)

        def transported() -> dict[str, Array]:
            before = unit_projections(data, link - 1, plans)
            bases = {p: change_of_basis(now[p], before[p], plans[p]) for p in now}
            carried = {p: in_basis(bases[p], state.momentum[p], plans[p]) for p in now}
            return state.momentum | carried

        begins = (state.count > 0) & (state.count % spec.resample_every == 0)
        # Projections are not stored: the last ones are drawn again where they are needed.
        kept = lax.cond(begins, transported, lambda: state.momentum)
        momenta, updates = {}, jax.tree.map(jnp.zeros_like, leaves)
        for path, direction in directions.items():
            plan = plans[path]
            mean = momentum * kept[path]
            mean += (1 - momentum) * seen_in(now, direction, plan)
            momenta[path] = mean
            if plan.adapted:
                mean = lift_leaf(mean, now[path], plan)
            updates[path] = momentum * mean + (1 - momentum) * direction
        count = optax.safe_increment(state.count)
        return paths.unflatten(treedef, updates), FloraState(momenta, inner, count)

    tx = optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )
    return from_transform(
        tx,
        trained=lambda params: size_of_moved(basis_plans(spec, params).values()),
        moments=lambda opt_state: (opt_state[0].momentum, opt_state[0].inner),
    )


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(
        # optax factors sides from 128 on only: smaller leaves would hold full moments.
        optax.scale_by_factored_rms(decay_rate=0.99, min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
    )
