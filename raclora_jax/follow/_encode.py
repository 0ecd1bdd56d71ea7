"""A step of the trainer as a message."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._chain.state import find_state
from raclora_jax._core import checks, paths
from raclora_jax._core.digest import digests
from raclora_jax._core.factor import Factor, Origin, is_factor, plan_of_update
from raclora_jax._core.keys import step_keys
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.rounding import is_low
from raclora_jax._core.sides import in_link
from raclora_jax._core.types import Leaf, OptState, PyTree
from raclora_jax.follow._checks import check_key, check_leaf, check_outside
from raclora_jax.follow._message import Message, Part
from raclora_jax.follow._numbers import NUMBERS, Numbers, Packed, packed
from raclora_jax.follow._position import Position
from raclora_jax.follow._sketches import Own, own_sketches, probe


def encode(
    params: PyTree,
    updates: PyTree,
    opt_state: OptState,
    position: Position,
    *,
    numbers: Numbers = "float32",
    digest_every: int = 100,
) -> bytes:
    """An update in factor form as a message.

    The trainer moves by the message too, with ``apply`` in the place of
    ``raclora_jax.apply_updates``: what is rounded is then rounded for all alike. For each
    adapted leaf it holds ``scaling * F``, ``rank x n`` numbers, the decay and the key for
    rounding; leaves trained in full are held as their updates are. Leaves that stay
    cost no number. Sketches are drawn again from the key.

    Args:
      params: The weights that the update is for.
      updates: What ``tx.update`` returned, with a ``Factor`` for each adapted leaf; a
        dense update of one is sent whole.
      opt_state: The state that it returned beside.
      position: Where the weights stand.
      numbers: Dtype of the numbers of a factor. Those of 16 and of 8 bits are rounded
        without bias, those of 8 to multiples of one bfloat16 for each row.
      digest_every: In how many messages one has digests of all weights, 4 bytes a leaf
        that cost a pass over them; the first has them.

    Returns:
      The message.

    Raises:
      ValueError: If weights, update, state and position do not belong together, a number
        is not finite, or a leaf has float32 copies or 64 bits.
      TypeError: If it is called inside ``jit``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W, tx = {"kernel": jnp.zeros((6, 4))}, rl.raclora(0.1, 2, key=0)
      >>> state, position = tx.init(W), rl.follow.start(W, key=0)
      >>> sketches = rl.sample_sketch(W, 2, key=0)
      >>> grads = rl.project({"kernel": jnp.ones((6, 4))}, sketches, 2)
      >>> updates, state = tx.update(grads, state, W)
      >>> message = encode(W, updates, state, position)
      >>> follower, _ = rl.follow.apply(W, message, position)
      >>> bool(jnp.any(follower["kernel"] != 0))
      True
    """
    checks.choice("numbers", numbers, NUMBERS)
    checks.count("digest_every", digest_every)
    state = find_state(opt_state)
    leaves, _ = paths.flatten(params)
    steps, _ = paths.flatten(updates, is_leaf=is_factor)
    check_outside((params, updates, state))
    check_key(state.key_data, position, "opt_state")
    plans = {}
    for path, step in steps.items():
        if path not in leaves:
            raise ValueError(
                f"the update of {paths.show(path)} has no leaf in params; expected "
                "updates of the tree whose gradients tx.update took"
            )
        if is_factor(step):
            plans[path] = plan_of_update(path, step, leaves[path])
            check_leaf(plans[path])
    own = own_sketches(position.run, int(state.link), plans)
    keys = step_keys(state.key_data, "message", plans, position.step)
    sent = {
        path: packed(in_link(steps[path].value, one.plan), keys[path], one.plan, numbers)
        for path, one in own.items()
    }
    told = {
        path: _told(
            steps[path].origin, dataclasses.replace(plans[path], path=""), one.plan
        )
        for path, one in own.items()
    }
    sent, told, dense = jax.device_get(
        (sent, told, {path: s for path, s in steps.items() if path not in plans})
    )
    parts = {}
    for path, step in steps.items():
        if path in plans:
            parts[path] = _factor_part(path, step, own[path], sent[path], told[path])
        elif (part := _dense_part(path, dense[path], leaves[path])) is not None:
            parts[path] = part
    weights = digests(leaves) if position.step % digest_every == 0 else None
    return Message(*position, int(state.link), parts, weights, True).to_bytes()


def _factor_part(
    path: str, step: Factor, own: Own, sent: Packed, told: tuple[np.ndarray, np.ndarray]
) -> Part:
    """What is sent of a factor."""
    plan, decay = own.plan, float(step.decay)
    where = f"leaf {paths.show(path)}"
    if not (sent.finite and np.isfinite(decay)):
        raise ValueError(
            f"{where}: expected finite numbers, got an update with others; leave such "
            "steps out, as optax.apply_if_finite does"
        )
    if not sent.moves and decay == 0:
        return Part("still", plan.dtype, stamp=step.stamp, sketch=own.digest)
    words, seen = told
    here = own.seen.astype(np.float64)
    if np.max(np.abs(here - seen)) > 1e-2 * np.max(np.abs(here)):
        raise ValueError(
            f"{where}: expected an update on the sketch of the link that opt_state is "
            "in, got one on another; encode each update with the state that tx.update "
            "returned beside it, and begin a new run where the law of sketches changes"
        )
    key = (int(words[0]), int(words[1])) if is_low(plan.dtype) else None
    return Part(
        kind="factor",
        dtype=plan.dtype,
        numbers=np.asarray(sent.numbers),
        scales=None if sent.scales is None else np.asarray(sent.scales),
        stamp=step.stamp,
        sketch=own.digest,
        decay=decay,
        key=key,
    )


def _dense_part(path: str, update: np.ndarray, weight: Leaf) -> Part | None:
    """What is sent of a leaf that is trained in full, ``None`` if it stays."""
    if update.dtype == jax.dtypes.float0 or not np.any(update):
        return None
    where = f"leaf {paths.show(path)}"
    if update.shape != weight.shape:
        raise ValueError(
            f"{where}: expected an update of shape {weight.shape}, got {update.shape}; "
            "encode what tx.update returned"
        )
    if not np.all(np.isfinite(update)):
        raise ValueError(
            f"{where}: expected finite numbers, got an update with others; leave such "
            "steps out, as optax.apply_if_finite does"
        )
    return Part("added", str(weight.dtype), update)


@functools.partial(jax.jit, static_argnames=("plan", "used"))
def _told(origin: Origin, plan: LeafPlan, used: LeafPlan) -> tuple[Array, Array]:
    """The key for rounding of an update, and some of its sketch."""
    read = origin.read(plan)
    words = jnp.zeros(2, jnp.uint32)
    if read.key is not None:
        words = jax.random.key_data(read.key)
    return words, probe(in_link(read.sketch, used), used)
