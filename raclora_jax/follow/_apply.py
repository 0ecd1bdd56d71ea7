"""A message on its way to the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raclora_jax._core import paths
from raclora_jax._core.digest import digests
from raclora_jax._core.factor import stamped_plan
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.record import checksum
from raclora_jax._core.types import Leaf, Leaves, PyTree
from raclora_jax.follow._adapted import Adapted, weights_of
from raclora_jax.follow._adapter import check_form, check_link, trained
from raclora_jax.follow._exact import added, moved_by_factor, rows_shape, with_rows
from raclora_jax.follow._message import Message, Part, check_next, check_weights
from raclora_jax.follow._position import Position
from raclora_jax.follow._sketches import Own, everywhere, own_sketches


def apply(params: PyTree, message: bytes, position: Position) -> tuple[Any, Position]:
    """The weights after a message, equal to the bit for all who apply it.

    ``W + (S F - decay * W)``, rounded once by the key in the message. The arithmetic is
    one whose bits do not depend on the program, the mesh or the device; sketches that are
    matrices are drawn by one program on one device, and are the same on devices of one
    kind. A follower whose sketches have other bits than the trainer's is told so.

    Of a run in the adapter form the factors become those of the message, and the first
    one of a link ends the link before, as ``next_link`` does.

    Args:
      params: The weights, on any mesh, in the trainer's dtypes, or a run in the adapter
        form as ``begin`` gives it.
      message: What ``encode``, ``encode_fused`` or ``encode_adapter`` returned.
      position: Where the weights stand.

    Returns:
      The new weights, with the dtypes and shardings of ``params``, and their position.

    Raises:
      ValueError: If the message is damaged, of another version or run, not the next one,
        or does not fit the weights, or sketches or weights have other bits than the
        trainer's. It names which. ``params`` are as they were.
      TypeError: If it is not bytes.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(3)}
      >>> state = rl.raclora(0.1, 2, key=0).init(W)
      >>> position = rl.follow.start(W, key=0)
      >>> try:
      ...     apply(W, b"no message", position)
      ... except ValueError as error:
      ...     print(str(error)[:29])
      this is no whole message: exp
    """
    read = Message.from_bytes(message)
    check_next(read, position, message)
    check_form(params, read)
    if isinstance(params, Adapted):
        return trained(params, read, position), _behind(position, message)
    leaves, treedef = paths.flatten(params)
    plans = _checked(read.parts, leaves)
    if read.weights is not None and read.before:
        check_weights(digests(leaves), read)
    own = own_sketches(read.run, read.link, plans)
    for path, one in own.items():
        _check_sketch(path, read.parts[path], one)
    new = {
        path: _moved(leaf, read.parts[path], own.get(path))
        if path in read.parts
        else leaf
        for path, leaf in leaves.items()
    }
    if read.weights is not None and not read.before:
        check_weights(digests(new), read)
    return paths.unflatten(treedef, new), _behind(position, message)


def passed(position: Position, message: bytes) -> Position:
    """The position behind a message, for a trainer whose weights have moved already.

    Args:
      position: Where the weights stood before.
      message: What ``encode_fused`` returned.

    Returns:
      The position.

    Raises:
      ValueError: If the message is damaged, or not the next one.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(3)}
      >>> state = rl.raclora(0.1, 2, key=0).init(W)
      >>> position = rl.follow.start(W, key=0)
      >>> message = rl.follow.encode(W, {"bias": jnp.ones(3)}, state, position)
      >>> passed(position, message).step
      1
    """
    check_next(Message.from_bytes(message), position, message)
    return _behind(position, message)


def join(params: PyTree, message: bytes) -> Position:
    """The position of weights that came by another way, such as a checkpoint.

    Args:
      params: The weights, or a run in the adapter form that ``begin`` made of them.
      message: A message of the run that has digests of the weights: one in
        ``digest_every`` has, and says whether they are those before it or after it; in
        the adapter form the first of each link, of the weights that it begins with.

    Returns:
      The position, from which ``apply`` goes on.

    Raises:
      ValueError: If the message is damaged, has no digests, or its weights are others.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(3)}
      >>> state = rl.raclora(0.1, 2, key=0).init(W)
      >>> position = rl.follow.start(W, key=0)
      >>> message = rl.follow.encode(W, {"bias": jnp.ones(3)}, state, position)
      >>> join(W, message) == position
      True
    """
    read = Message.from_bytes(message)
    if read.weights is None:
        raise ValueError(
            f"the message of step {read.step} has no digests of the weights; expected "
            "one that has: one in digest_every, or the first of a link"
        )
    check_form(params, read)
    check_weights(digests(weights_of(params)), read)
    if isinstance(params, Adapted):
        check_link(params, read)
    before = Position(read.run, read.step, read.last)
    return before if read.before else _behind(before, message)


def _behind(position: Position, message: bytes) -> Position:
    return Position(position.run, position.step + 1, checksum(message))


def _checked(parts: dict[str, Part], leaves: Leaves) -> dict[str, LeafPlan]:
    """The plans of the leaves that have sketches, once all parts are found to fit."""
    plans = {}
    for path, part in parts.items():
        where = f"leaf {paths.show(path)}"
        if path not in leaves:
            raise ValueError(
                f"{where} of the message is none of these weights; expected the tree "
                "that the trainer has"
            )
        dtype = str(leaves[path].dtype)
        if dtype != part.dtype:
            raise ValueError(
                f"{where}: expected a weight of {part.dtype}, got {dtype}; bits are the "
                "same in the trainer's dtypes only: follow in those, and cast a copy"
            )
        if part.stamp is not None:
            plans[path] = stamped_plan(path, part.stamp, leaves[path])
            continue
        wanted, got = np.shape(leaves[path]), part.numbers.shape
        if wanted != got:
            raise ValueError(
                f"{where}: expected values of shape {wanted}, got {got}; apply messages "
                "to the tree that the trainer has"
            )
    return plans


def _check_sketch(path: str, part: Part, own: Own) -> None:
    """Refuses a part that does not fit what was drawn for it."""
    plan, where = own.plan, f"leaf {paths.show(path)}"
    if own.digest != part.sketch:
        raise ValueError(
            f"{where}: expected a sketch of digest {part.sketch}, got {own.digest} drawn "
            "here; run trainer and follower on one kind of device with one version of "
            "jax, or take sketch='block', which is whole numbers"
        )
    if part.kind == "still":
        return
    wanted = plan.factor_shape if part.kind == "factor" else rows_shape(plan)
    if part.numbers.shape != wanted:
        raise ValueError(
            f"{where}: expected numbers of shape {wanted}, got {part.numbers.shape}; "
            "hand over what encode returned"
        )


def _moved(weight: Leaf, part: Part, own: Own | None) -> Leaf:
    """One leaf after its part of a message."""
    if part.kind == "still":
        return weight
    weight = jnp.asarray(weight)
    if own is None:
        values = jax.device_put(part.numbers, weight.sharding)
        return values if part.kind == "whole" else added(weight, values)
    decay = np.float32(part.decay) if part.decay else None
    key = None if part.key is None else np.array(part.key, np.uint32)
    sketch, numbers, scales, decay, key = everywhere(
        (own.sketch, part.numbers, part.scales, decay, key), weight
    )
    if part.kind == "rows":
        return with_rows(weight, numbers, sketch, own.plan)
    return moved_by_factor(weight, numbers, scales, sketch, decay, key, own.plan)
