"""What the server does once a round has its mean: step, and bring back who was away."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks
from raclora_jax._core.keys import folded, key_data
from raclora_jax._core.types import KeyLike, OptState
from raclora_jax._forms.factor_rules import reset_moments
from raclora_jax.federated._checks import check_range, check_step
from raclora_jax.federated._messages import LARGEST_COUNT, State, Step
from raclora_jax.federated._state import (
    advance,
    rule_of,
    stamp_of,
    start_of,
    stays_finite,
)
from raclora_jax.federated._strategies import Strategy


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
    checks.count("take", take, most=clients, way_out=f"there are {clients} clients")
    check_range("round", round, LARGEST_COUNT)
    words = jnp.asarray([[round]], jnp.uint32)
    own = folded(key_data(key), words)[0]
    with jax.threefry_partitionable(True):
        order = jax.random.permutation(own, clients)
    return jnp.sort(order[:take]).astype(jnp.int32)


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
      TypeError: If ``step`` is no ``Step``.
      ValueError: If the step is of another round or stamp, has other shapes, is not
        finite or leaves weights that are not (what is traced is not looked at), or
        ``tx`` has no state.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> state, _, step = server_step(strategy, state, None)
      >>> int(state.round), step.trained
      (1, None)
    """
    if step is None:
        step = Step(None, {}, state.round, stamp_of(strategy, state.base_params))
    check_step(step, strategy, state)
    if tx is not None and opt_state is None:
        raise ValueError(
            "server_step: tx needs its state; pass opt_state=server_init(strategy, "
            "state, tx), then what server_step returned"
        )
    if tx is not None and step.trained is not None:
        start = start_of(strategy, state)
        # Start less mean stands for a gradient: a rule such as SGD goes against it.
        away = jax.tree.map(lambda s, m: s - jnp.asarray(m), start, step.trained)
        rule = rule_of(strategy, state, tx)
        updates, opt_state = rule.update(away, opt_state, start)
        moved = optax.apply_updates(start, updates)
        # What goes down is where the rule arrived: who replays has no rule and no state.
        step = Step(moved, step.residual, step.round, step.stamp)
    after = _moved(strategy, state, step)
    if tx is not None and strategy.rounds_per_link is not None:
        # Made whether it is used or not: inside jit nobody knows if the link is new.
        fresh = reset_moments(
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
      TypeError: If one of them is no ``Step``.
      ValueError: If a step is missing, of another run or damaged; the message says which.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> behind = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> _, _, step = server_step(strategy, behind, None)
      >>> int(replay(strategy, behind, [step]).round)
      1
    """
    for step in steps:
        check_step(step, strategy, state)
        state = _moved(strategy, state, step)
    return state


# One program for the server and for a client that replays: the same bits.
_advance = jax.jit(advance, static_argnames="strategy")
_stays_finite = jax.jit(stays_finite, static_argnums=0)


def _moved(strategy: Strategy, state: State, step: Step) -> State:
    """The state after a step, unless its weights would be lost."""
    after = _advance(strategy, state, step)
    finite = _stays_finite(strategy, state, after)
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(
            f"the step of round {int(state.round)} leaves weights that are not finite; "
            "the state is as it was: skip the round with server_step(strategy, state, "
            "None), or let aggregate find who sent it"
        )
    return after
