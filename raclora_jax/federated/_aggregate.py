"""Messages into a step: which are used, and their mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from raclora_jax._core.planning import plan_tree
from raclora_jax.federated._checks import Expected
from raclora_jax.federated._messages import (
    LARGEST_COUNT,
    Arrays,
    Drop,
    Message,
    RoundLog,
    State,
    Step,
    nbytes,
)
from raclora_jax.federated._privacy import Privacy, private_mean
from raclora_jax.federated._robust import Robust
from raclora_jax.federated._state import advance, stamp_of, start_of, stays_finite
from raclora_jax.federated._strategies import Strategy, mean_rule


def aggregate(
    strategy: Strategy,
    state: State,
    messages: Iterable[Any],
    *,
    privacy: Privacy | None = None,
    mean: Robust | None = None,
) -> tuple[Step | None, RoundLog]:
    """The weighted mean of the messages that can be used.

    A message is dropped, with one line in the log, if it is nothing or no message, has
    another stamp, another round or other shapes, is a second one of its client, is not
    finite in the dtypes of the run, or has a weight that is no number from 0 to
    ``2**31 - 1``. Where the step would leave weights that are not finite, the message of
    the largest norm is dropped, and so on. The state is not touched.

    The weighted mean believes its clients: one of weight or size 1e6 takes it. For a
    bound on that see ``mean``.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      messages: What came in, in any order: it is summed in the order of the clients.
      privacy: Clip and noise on what the clients trained; then all weigh the same. For
        strategies whose step is the mean of that, so not FedEx-LoRA and FlexLoRA.
      mean: ``trimmed_mean``, ``median`` or ``bounded_mean`` in place of the weighted one,
        for strategies where all clients share one basis: raclora, ffa_lora and fedavg;
        FedIT has ``bounded_mean`` alone. Whoever has any weight weighs the same. Not with
        ``privacy``, which is a bounded mean itself.

    Returns:
      ``(step, log)``. ``step`` is ``None`` if no message is left, all that are left weigh
      nothing, or they are too few for ``mean``.

    Raises:
      TypeError: If ``messages`` is one message, or ``mean`` none of the three.
      ValueError: If ``privacy`` or ``mean`` is not defined for the strategy.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> step, log = aggregate(strategy, state, [None])
      >>> print(step, log, sep="\\n")
      None
      round 0: 0 in the mean, 1 dropped, 0 bytes up
      a client sent nothing
    """
    if isinstance(messages, Message):
        raise TypeError(
            "aggregate takes a list of messages, got one Message; write [message], and "
            "use combine for the stacked messages of client_updates"
        )
    _check_mean(strategy, privacy, mean)
    expected = Expected(strategy, state)
    kept: dict[int, Message] = {}
    sizes: dict[int, int] = {}
    dropped: list[Drop] = []
    for message in messages:
        read = expected.read(message, kept)
        if isinstance(read, Drop):
            dropped.append(read)
        else:
            kept[read.client], sizes[read.client] = read, nbytes(message)
    left = [kept[client] for client in sorted(kept)]
    step, used, more = _landing(strategy, state, left, privacy, mean)
    clients = tuple(message.client for message in used)
    up = sum(sizes[client] for client in clients)
    return step, RoundLog(expected.round, clients, (*dropped, *more), up)


def combine(
    strategy: Strategy,
    state: State,
    messages: Message,
    *,
    weights: Array | None = None,
    mean: Robust | None = None,
) -> Step:
    """The aggregation rule alone, pure: for clients simulated inside ``jax.jit``.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      messages: Stacked messages, as of ``client_updates``; one that is not finite weighs
        nothing.
      weights: ``(clients,)``; the counts of examples by default, 0 for one that takes no
        part. One that is not between 0 and ``2**31 - 1`` is 0.
      mean: As in ``aggregate``.

    Returns:
      The ``Step`` of the mean. Where all weights are 0, or those that are not are too
      few for ``mean``, it goes nowhere.

    Raises:
      TypeError: If ``mean`` is none of the three.
      ValueError: If ``mean`` is not defined for the strategy.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> factors = {"kernel": jnp.stack([jnp.ones((2, 6)), jnp.zeros((2, 6))])}
      >>> messages = federated.Message(
      ...     federated.Trained(factors, {}), jnp.arange(2), jnp.zeros(2, int),
      ...     jnp.array([3, 1]), stamp="")
      >>> float(combine(strategy, state, messages).trained.factors["kernel"][0, 0])
      0.75
    """
    _check_mean(strategy, None, mean)
    start = start_of(strategy, state)
    stacked = messages.trained
    wide = jnp.result_type(jnp.float32, *jax.tree.leaves(stacked))
    weights = jnp.asarray(messages.count if weights is None else weights).astype(wide)
    usable = (weights >= 0) & (weights <= LARGEST_COUNT)
    for leaf in jax.tree.leaves(stacked):
        usable &= jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
    weights = jnp.where(usable, weights, 0)
    total = weights.sum()

    # Not a weight of 0 alone: 0 times an infinity or a NaN of a client's is NaN.
    def clean(leaf: Array, start: Array) -> Array:
        shape = (-1,) + (1,) * start.ndim
        return jnp.where(usable.reshape(shape), leaf, start)

    stacked = jax.tree.map(clean, stacked, start)
    missed: Arrays = {}
    if mean is None:
        shares = weights / jnp.where(total > 0, total, 1)
        plans = plan_tree(strategy.spec, state.base_params)
        trained, missed = strategy.combine(plans, stacked, shares)
        enough = total > 0
    else:
        trained = mean.of(stacked, start, weights > 0)
        enough = (weights > 0).sum() >= mean.least()
    trained = jax.tree.map(lambda m, s: jnp.where(enough, m, s), trained, start)
    return Step(trained, missed, state.round, stamp_of(strategy, state.base_params))


_combine = jax.jit(
    lambda strategy, state, messages, mean: combine(strategy, state, messages, mean=mean),
    static_argnums=(0, 3),
)
_lands = jax.jit(
    lambda strategy, state, step: stays_finite(
        strategy, state, advance(strategy, state, step)
    ),
    static_argnums=0,
)


def _check_mean(strategy: Strategy, privacy: Privacy | None, mean: Robust | None) -> None:
    if privacy is not None and strategy.combine is not mean_rule:
        raise ValueError(
            f"privacy covers the mean of what clients train, and {strategy.name} sends "
            "down more than that; use raclora, ffa_lora, fedit or fedavg"
        )
    if mean is None:
        return
    if not isinstance(mean, Robust):
        raise TypeError(
            f"mean must be trimmed_mean(...), median() or bounded_mean(...), got {mean!r}"
        )
    if privacy is not None:
        raise ValueError(
            f"{mean.name} does not go with privacy, whose noise is reckoned for a sum of "
            "clipped clients: that is a bounded mean already, with norm=Privacy.clip; "
            "give one of the two"
        )
    mean.check(strategy)


def _landing(
    strategy: Strategy,
    state: State,
    messages: list[Message],
    privacy: Privacy | None,
    mean: Robust | None,
) -> tuple[Step | None, list[Message], list[Drop]]:
    """A step that leaves finite weights, the messages in it, and those left out."""
    dropped: list[Drop] = []
    while messages:
        short = _too_few(messages, mean)
        if short:
            return None, [], dropped + [Drop(one.client, *short) for one in messages]
        step = _step_of(strategy, state, messages, privacy, mean)
        if _lands(strategy, state, step):
            return step, messages, dropped
        # One fewer each time, so that the mean has another shape and compiles anew.
        worst = max(messages, key=_norm)
        line = (
            f"client {worst.client} sent numbers that leave weights that are not finite"
        )
        dropped.append(Drop(worst.client, "not finite", line))
        messages = [one for one in messages if one is not worst]
    return None, [], dropped


def _too_few(messages: list[Message], mean: Robust | None) -> tuple[str, str] | None:
    """Why these messages have no mean, if they have none: a reason and a line."""
    number = len(messages)
    taking = sum(message.count > 0 for message in messages)
    if not taking:
        return "no weight", f"the weights of the {number} messages left sum to 0"
    if mean is not None and taking < mean.least():
        return "few", f"{taking} messages left, {mean.name} needs {mean.least()}"
    return None


def _norm(message: Message) -> float:
    # float32 would lose the order of the largest: a square overflows from 1.9e19 on.
    squares = (np.sum(np.float64(a) ** 2) for a in jax.tree.leaves(message.trained))
    return float(np.sqrt(sum(squares)))


def _step_of(
    strategy: Strategy,
    state: State,
    messages: list[Message],
    privacy: Privacy | None,
    mean: Robust | None,
) -> Step:
    stacked = jax.tree.map(
        lambda *arrays: np.stack(arrays), *(message.trained for message in messages)
    )
    stamp = messages[0].stamp
    if privacy is not None:
        start = start_of(strategy, state)
        moved = jax.tree.map(lambda all_, one: all_ - one, stacked, start)
        added = private_mean(moved, privacy, state.round)
        return Step(jax.tree.map(jnp.add, start, added), {}, state.round, stamp)
    counts = np.array([message.count for message in messages])
    # Summed here: float32 loses small counts beside large ones.
    weights = counts / counts.sum() if mean is None else counts > 0
    return _combine(strategy, state, Message(stacked, None, None, weights, stamp), mean)
