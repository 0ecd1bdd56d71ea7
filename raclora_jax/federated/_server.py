"""What the server does in a round: check the messages, take their mean, step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from raclora_jax._core.keys import folded, key_data
from raclora_jax._core.plan import plan_tree
from raclora_jax._core.types import KeyLike, OptState
from raclora_jax._forms.factor_rules import restart
from raclora_jax.federated._checks import Expected, check_step
from raclora_jax.federated._messages import (
    Drop,
    Message,
    RoundLog,
    State,
    Step,
    nbytes,
)
from raclora_jax.federated._privacy import Privacy, private_mean
from raclora_jax.federated._state import advance, rule_of, stamp_of, start_of
from raclora_jax.federated._strategies import Strategy, mean_rule


def sample_clients(clients: int, take: int, *, round: Array | int, key: KeyLike) -> Array:
    """Who takes part in a round: ``take`` of the clients, without replacement.

    Args:
      clients: How many there are.
      take: How many take part.
      round: The round.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      Their numbers in order, int32 ``(take,)``.

    Raises:
      ValueError: If ``take`` is not between 1 and ``clients``.

    Example:
      >>> sample_clients(100, 10, round=0, key=0).shape
      (10,)
    """
    if not 1 <= take <= clients:
        raise ValueError(f"take must be from 1 to clients={clients}, got {take}")
    words = jnp.asarray([[round]], jnp.uint32)
    own = folded(key_data(key), words)[0]
    with jax.threefry_partitionable(True):
        order = jax.random.permutation(own, clients)
    return jnp.sort(order[:take]).astype(jnp.int32)


def aggregate(
    strategy: Strategy,
    state: State,
    messages: Iterable[Any],
    *,
    privacy: Privacy | None = None,
) -> tuple[Step | None, RoundLog]:
    """The weighted mean of the messages that can be used.

    A message is dropped, with one line in the log, if it is nothing or no message, has
    another stamp, another round or other shapes, is a second one of its client, is not
    finite, or has a weight that is negative or not finite. The state is not touched.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      messages: What came in, in any order: it is summed in the order of the clients.
      privacy: Clip and noise on what the clients trained; then all weigh the same. For
        strategies whose step is the mean of that, so not FedEx-LoRA and FlexLoRA.

    Returns:
      ``(step, log)``. ``step`` is ``None`` if no message is left, or all that are left
      weigh nothing.

    Raises:
      ValueError: If ``privacy`` is given with a strategy that sends more than the mean.

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
    if privacy is not None and strategy.combine is not mean_rule:
        raise ValueError(
            f"privacy covers the mean of what clients train, and {strategy.name} sends "
            "down more than that; use raclora, ffa_lora, fedit or fedavg"
        )
    expected = Expected(strategy, state)
    kept: dict[int, Message] = {}
    dropped: list[Drop] = []
    for message in messages:
        drop = expected.refuses(message, kept)
        if drop is None:
            kept[int(message.client)] = message
        else:
            dropped.append(drop)
    used = [kept[client] for client in sorted(kept)]
    total = sum(float(message.count) for message in used)
    if used and total == 0:
        line = f"the weights of the {len(used)} messages left sum to 0"
        dropped += [Drop(client, "no weight", line) for client in sorted(kept)]
        used = []
    log = RoundLog(
        int(state.round),
        tuple(int(message.client) for message in used),
        tuple(dropped),
        sum(nbytes(message) for message in used),
    )
    if not used:
        return None, log
    stacked = jax.tree.map(
        lambda *arrays: np.stack([np.asarray(array) for array in arrays]),
        *(expected.padded(message) for message in used),
    )
    if privacy is not None:
        return _private(strategy, state, stacked, privacy), log
    return _combine(strategy, state, stacked, None), log


def combine(
    strategy: Strategy,
    state: State,
    messages: Message,
    *,
    weights: Array | None = None,
) -> Step:
    """The aggregation rule alone, pure: for clients simulated inside ``jax.jit``.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      messages: Stacked messages, as of ``client_updates``; one that is not finite weighs
        nothing.
      weights: ``(clients,)``, not negative; the counts of examples by default, 0 for one
        that takes no part.

    Returns:
      The ``Step`` of the mean. Where all weights are 0 it goes nowhere.

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
    start = start_of(strategy, state)
    stacked = messages.trained
    wide = jnp.result_type(jnp.float32, *jax.tree.leaves(stacked))
    weights = jnp.asarray(messages.count if weights is None else weights).astype(wide)
    finite = jnp.ones(weights.shape, bool)
    for leaf in jax.tree.leaves(stacked):
        finite &= jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
    weights = jnp.where(finite, weights, 0)
    total = weights.sum()

    def clean(leaf: Array, start: Array) -> Array:
        shape = (-1,) + (1,) * start.ndim
        return jnp.where(finite.reshape(shape), leaf, start)

    stacked = jax.tree.map(clean, stacked, start)
    shares = weights / jnp.where(total > 0, total, 1)
    plans = plan_tree(strategy.spec, state.base_params)
    mean, missed = strategy.combine(plans, stacked, shares)
    mean = jax.tree.map(lambda m, s: jnp.where(total > 0, m, s), mean, start)
    return Step(mean, missed, state.round, stamp_of(strategy, state.base_params))


def server_init(
    strategy: Strategy, state: State, tx: optax.GradientTransformation
) -> OptState:
    """The state of a server's rule.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      tx: As in ``server_step``.

    Returns:
      The optax state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> opt_state = server_init(strategy, state, optax.sgd(1.0, momentum=0.9))
    """
    return rule_of(strategy, state, tx).init(start_of(strategy, state))


def server_step(
    strategy: Strategy,
    state: State,
    step: Step | None,
    *,
    tx: optax.GradientTransformation | None = None,
    opt_state: OptState = None,
) -> tuple[State, OptState, Step]:
    """Ends a round: the server's rule, the merge, the next link.

    Without ``tx`` the clients' mean is taken as it is. With one, start minus mean is its
    gradient, in factor coordinates: ``optax.sgd(1.0)`` is the mean again. A new link is
    new coordinates, so the moments of the factors start again with it; under
    ``optax.partition`` with the labels of ``factor_labels`` those of dense leaves go on.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      step: What ``aggregate`` or ``combine`` gave; ``None`` skips the round: the weights
        stay, and the next round has another sketch.
      tx: An optax rule with its learning rate.
      opt_state: The state of ``tx``, from ``server_init`` or the round before.

    Returns:
      ``(state, opt_state, step)``: the next round, and what to send to the clients.

    Raises:
      ValueError: If the step is of another round or stamp, or ``tx`` has no state.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> state, _, step = server_step(strategy, state, None)
      >>> int(state.round), step.trained
      (1, None)
    """
    stamp = stamp_of(strategy, state.base_params)
    if step is None:
        step = Step(None, {}, state.round, stamp)
    check_step(step, state, stamp)
    if tx is not None and opt_state is None:
        raise ValueError(
            "server_step: tx needs its state; pass opt_state=server_init(strategy, "
            "state, tx), then what server_step returned"
        )
    if tx is not None and step.trained is not None:
        start = start_of(strategy, state)
        away = jax.tree.map(lambda s, m: s - jnp.asarray(m), start, step.trained)
        rule = rule_of(strategy, state, tx)
        updates, opt_state = rule.update(away, opt_state, start)
        moved = optax.apply_updates(start, updates)
        step = Step(moved, step.residual, step.round, step.stamp)
    after = _advance(strategy, state, step)
    if tx is not None and strategy.rounds_per_link is not None:
        fresh = restart(
            opt_state, rule_of(strategy, state, tx), start_of(strategy, after)
        )
        new_link = after.chain.link != state.chain.link
        opt_state = jax.tree.map(
            lambda new, old: jnp.where(new_link, new, old), fresh, opt_state
        )
    return after, opt_state, step


def replay(strategy: Strategy, state: State, steps: Sequence[Step]) -> State:
    """Brings a client that missed rounds to where the others are.

    The same program as the server's runs on the same numbers: on one kind of device the
    result is equal to the last bit.

    Args:
      strategy: The strategy of the run.
      state: Where the client stands.
      steps: The steps it missed, in order.

    Returns:
      The ``State`` after the last of them.

    Raises:
      ValueError: If a step is missing or of another run; the message says which.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> behind = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> _, _, step = server_step(strategy, behind, None)
      >>> int(replay(strategy, behind, [step]).round)
      1
    """
    stamp = stamp_of(strategy, state.base_params)
    for step in steps:
        check_step(step, state, stamp)
        state = _advance(strategy, state, step)
    return state


# One program for the server and for a client that replays: the same bits.
_advance = jax.jit(advance, static_argnames="strategy")
_combine = jax.jit(
    lambda strategy, state, messages, weights: combine(
        strategy, state, messages, weights=weights
    ),
    static_argnums=0,
)


def _private(
    strategy: Strategy, state: State, messages: Message, privacy: Privacy
) -> Step:
    start = start_of(strategy, state)
    moved = jax.tree.map(lambda all_, one: all_ - one, messages.trained, start)
    mean = private_mean(moved, privacy, state.round)
    trained = jax.tree.map(lambda s, m: s + m, start, mean)
    return Step(trained, {}, state.round, messages.stamp)
