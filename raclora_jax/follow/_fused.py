"""A fused step of the trainer as a message."""

from __future__ import annotations

import jax
import numpy as np
import optax

from raclora_jax._chain.state import find_state
from raclora_jax._core import checks, paths
from raclora_jax._core.digest import digests
from raclora_jax._core.planning import plan_leaves
from raclora_jax._core.types import OptState, PyTree
from raclora_jax._forms.optimizer import RacLora
from raclora_jax.follow._checks import check_key, check_outside, check_picks
from raclora_jax.follow._exact import rows_in
from raclora_jax.follow._message import Message, Part
from raclora_jax.follow._position import Position
from raclora_jax.follow._sketches import everywhere, own_sketches


def encode_fused(
    params: PyTree,
    opt_state: OptState,
    tx: optax.GradientTransformation,
    position: Position,
    *,
    digest_every: int = 100,
) -> bytes:
    """A fused step as a message, which is made when the weights have moved.

    Where the sketch picks rows, as that of the laws ``"block"`` and ``"coordinate"`` and
    of ``mode="full"`` does, it holds the new values of those rows; leaves trained in full
    are held whole. The trainer goes on from ``passed(position, message)``.

    Args:
      params: The weights after the step.
      opt_state: The state after it.
      tx: What the step was made with.
      position: Where the weights stood before it.
      digest_every: As in ``encode``; they are of the weights after the step.

    Returns:
      The message.

    Raises:
      ValueError: If state and position do not belong together, or a leaf moves in more
        rows than its sketch picks.
      TypeError: If ``tx`` is not what ``raclora`` returned, or it is called inside
        ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> params, key = {"kernel": jnp.ones((6, 4))}, jax.random.key(0)
      >>> spec = rl.Spec(2, sketch="block", side="left")
      >>> tx = rl.raclora(0.1, spec, inner=rl.orthogonal(), key=key)
      >>> step = jax.jit(rl.fused_step(lambda p, x: jnp.sum((x @ p["kernel"]) ** 2), tx))
      >>> position = rl.follow.start(params, key=key)
      >>> new, state, _ = step(params, tx.init(params), jnp.ones((3, 6)))
      >>> message = encode_fused(new, state, tx, position)
      >>> follower, _ = rl.follow.apply(params, message, position)
      >>> bool(jnp.all(follower["kernel"] == new["kernel"]))
      True
    """
    checks.count("digest_every", digest_every)
    if not isinstance(tx, RacLora):
        raise TypeError(
            f"tx must be what raclora(...) returned, got {type(tx).__name__}; hand over "
            "that of fused_step"
        )
    state = find_state(opt_state)
    leaves, _ = paths.flatten(params)
    check_outside((params, state))
    check_key(state.key_data, position, "opt_state")
    decaying = tx.descent.decaying(params)
    plans = plan_leaves(tx.descent.run.spec, leaves)
    for path, plan in plans.items():
        if plan.adapted:
            check_picks(plan, decaying.get(path, False))
    adapted = {path: plan for path, plan in plans.items() if plan.adapted}
    own = own_sketches(position.run, int(state.link), adapted)
    moved = {
        path: rows_in(leaves[path], everywhere(one.sketch, leaves[path]), one.plan)
        for path, one in own.items()
    }
    moved |= {path: leaves[path] for path, plan in plans.items() if plan.mode == "dense"}

    def part(path: str, values: np.ndarray) -> Part:
        dtype = str(leaves[path].dtype)
        if path not in own:
            return Part("whole", dtype, values)
        stamp, digest = plans[path].stamp, own[path].digest
        return Part("rows", dtype, values, stamp=stamp, sketch=digest)

    parts = {path: part(path, values) for path, values in jax.device_get(moved).items()}
    weights = digests(leaves) if position.step % digest_every == 0 else None
    return Message(*position, int(state.link), parts, weights, False).to_bytes()
