"""What a client does in a round: local steps on its own data, and a message."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from raclora_jax._core import checks
from raclora_jax._core.keys import folded, key_data
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.types import KeyLike, LossFn
from raclora_jax.federated._batches import reshuffled
from raclora_jax.federated._checks import check_range
from raclora_jax.federated._messages import LARGEST_COUNT, Arrays, Message, State, Trained
from raclora_jax.federated._state import loss_of, rule_of, stamp_of, start_of
from raclora_jax.federated._strategies import Strategy


class Local(NamedTuple):
    """What a client does with its data in one round.

    Attributes:
      loss_fn: ``loss_fn(params, *batch)``, a scalar.
      learning_rate: A float, or a schedule of the round.
      batch_size: Examples a local step.
      steps: Local steps a round. Give this or ``epochs``.
      epochs: Passes over the client's examples a round, those that fill no batch left
        for another pass.
      inner: Preconditioner of a local step, without learning rate; gradient descent by
        default. It starts anew each round, and is handed ``key``, that of the client and
        the round, if it takes it.
    """

    loss_fn: LossFn
    learning_rate: optax.ScalarOrSchedule
    batch_size: int
    steps: int | None = None
    epochs: int | None = None
    inner: optax.GradientTransformation = optax.identity()


def client_update(
    strategy: Strategy,
    state: State,
    data: tuple[Any, ...],
    local: Local,
    *,
    client: Array | int,
    count: Array | int | None = None,
    rank: int | None = None,
    key: KeyLike,
) -> Message:
    """Local steps of one client from where the round starts.

    ``F <- F - rate(round) inner(dloss / dF)`` on minibatches in random reshuffling: each
    pass takes the examples in a new order, a function of (key, client, round). In
    Fed-RAC-LoRA F starts at zero; the weights never move within a round.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      data: Arrays ``(n, ...)``, the arguments of the loss after the weights.
      local: The local training.
      client: The client's number.
      count: How many of the n rows are examples, the rest padding; all by default. A
        batch larger than that goes round the examples again.
      rank: A rank below the spec's, for ``flexlora``.
      key: The client's own key; the round and the client's number are taken into it.

    Returns:
      A ``Message``.

    Raises:
      TypeError: If ``client`` or ``count`` are not whole.
      ValueError: If data, sizes or rank do not fit, or ``count`` is above n.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> def loss_fn(params, x): return jnp.mean((x @ params["kernel"]) ** 2)
      >>> local = Local(loss_fn, 0.1, batch_size=4, epochs=1)
      >>> message = client_update(
      ...     strategy, state, (jnp.ones((8, 6)),), local, client=3, key=1)
      >>> message.trained.factors["kernel"].shape, int(message.count)
      ((2, 6), 8)
    """
    rows = _rows(data)
    steps, own_steps = _steps(local, rows), None
    check_range("client", client, LARGEST_COUNT)
    check_range("count", rows if count is None else count, rows)
    if count is not None and local.epochs is not None:
        # As many as its own examples give; the program has room for all rows.
        own_steps = local.epochs * jnp.maximum(count // local.batch_size, 1)
    count = rows if count is None else count
    plans = plan_tree(strategy.spec, state.base_params)
    start = start_of(strategy, state)
    if rank is not None:
        start = _narrowed(strategy, start, rank, plans=plans, pad=True)
    loss = loss_of(strategy, local.loss_fn)
    rule = rule_of(strategy, state, local.inner)
    given = local.learning_rate
    # A schedule runs over rounds: local steps of a round are alike on all clients.
    rate = given(state.round) if callable(given) else given

    def step(
        carry: tuple[Trained, Any], now: tuple[Array, Array]
    ) -> tuple[tuple[Trained, Any], None]:
        (trained, opt_state), (index, rows) = carry, now
        batch = jax.tree.map(lambda array: jnp.asarray(array)[rows], data)
        grads = jax.grad(loss)(trained, state, *batch)
        updates, opt_state = rule.update(grads, opt_state, trained, key=own)
        # A schedule may give a float32 array, which would widen an update of 16 bits.
        updates = jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates)
        after = optax.apply_updates(trained, updates), opt_state
        if own_steps is not None:
            # Steps past a client's own are computed and left out: under vmap all clients
            # are one program, which has the steps that all rows would give.
            live = index < own_steps
            after = jax.tree.map(lambda a, b: jnp.where(live, a, b), after, carry)
        return after, None

    # Client and round are words of the key: a client that is asked again sees another
    # order, and its order does not depend on who else is asked.
    words = jnp.stack([jnp.asarray(w, jnp.uint32) for w in (client, state.round)])
    own = folded(key_data(key), words[:, None])[0]
    order = reshuffled(own, rows, count, steps, local.batch_size)
    numbered = jnp.arange(steps), order
    (trained, _), _ = lax.scan(step, (start, rule.init(start)), numbered)
    if rank is not None:
        trained = _narrowed(strategy, trained, rank, plans=plans)
    number, round, examples = (
        jnp.asarray(n, jnp.int32) for n in (client, state.round, count)
    )
    stamp = stamp_of(strategy, state.base_params)
    return Message(trained, number, round, examples, stamp)


def client_updates(
    strategy: Strategy,
    state: State,
    data: tuple[Any, ...],
    local: Local,
    *,
    clients: Array,
    counts: Array | None = None,
    key: KeyLike,
    mesh: Mesh | None = None,
) -> Message:
    """``client_update`` of many clients at once.

    Args:
      strategy: The strategy of the run.
      state: Where the run stands.
      data: Arrays ``(clients, n, ...)``.
      local: The local training.
      clients: Their numbers, int32 ``(clients,)``.
      counts: Examples of each, ``(clients,)``; n by default.
      key: As in ``client_update``, the same for all.
      mesh: A mesh of one axis to spread the clients over by ``jax.shard_map``; its size
        must divide their number. Without one they run under ``jax.vmap``.

    Returns:
      A ``Message`` whose arrays have a leading axis of clients.

    Raises:
      ValueError: As ``client_update``, or if the mesh does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax import federated
      >>> strategy = federated.raclora(2)
      >>> state = federated.init(strategy, {"kernel": jnp.ones((6, 4))}, key=0)
      >>> def loss_fn(params, x): return jnp.mean((x @ params["kernel"]) ** 2)
      >>> local = Local(loss_fn, 0.1, batch_size=4, epochs=1)
      >>> messages = client_updates(
      ...     strategy, state, (jnp.ones((3, 8, 6)),), local,
      ...     clients=jnp.arange(3), key=1)
      >>> messages.trained.factors["kernel"].shape
      (3, 2, 6)
    """
    check_range("clients", clients, LARGEST_COUNT)
    clients = jnp.asarray(clients)
    number = clients.shape[0]
    # Counts that are not given are known before the program runs: fewer orders to sort.
    own = (data, clients) if counts is None else (data, clients, jnp.asarray(counts))
    for array in jax.tree.leaves(own):
        if jnp.shape(array)[0] != number:
            raise ValueError(
                f"{number} clients need data and counts with a leading axis of that "
                f"size, got shape {jnp.shape(array)}"
            )

    if counts is not None:
        check_range("counts", counts, _rows(jax.tree.map(lambda a: a[0], data)))

    def many(state: State, key: Array, *own: Any) -> Message:
        def one(data: Any, client: Array, count: Array | None = None) -> Message:
            return client_update(
                strategy, state, data, local, client=client, count=count, key=key
            )

        return jax.vmap(one)(*own)

    if mesh is None:
        return many(state, key_data(key), *own)
    if len(mesh.axis_names) != 1 or number % mesh.size:
        raise ValueError(
            f"clients are spread over a mesh of one axis whose size divides their "
            f"number, got {number} clients and a mesh of {dict(mesh.shape)}"
        )
    axis = mesh.axis_names[0]

    def spread(state: State, key: Array, *own: Any) -> Message:
        # What is alike on all devices meets what is not in the carry of a scan.
        state, key = jax.lax.pcast((state, key), axis, to="varying")
        return many(state, key, *own)

    every, each = PartitionSpec(), PartitionSpec(axis)
    specs = (every, every, *(each for _ in own))
    run = jax.shard_map(spread, mesh=mesh, in_specs=specs, out_specs=each)
    return run(state, key_data(key), *own)


def _rows(data: tuple[Any, ...]) -> int:
    """How many rows the arrays have, if they agree."""
    sizes = {jnp.shape(array)[:1] for array in jax.tree.leaves(data)}
    if not isinstance(data, tuple) or len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "data must be a tuple of arrays with the same number of rows, at least 1, "
            f"got leading sizes {sorted(sizes)}; write (images, labels)"
        )
    return int(sizes.pop()[0])


def _steps(local: Local, rows: int) -> int:
    if (local.steps is None) == (local.epochs is None):
        raise ValueError(
            f"Local: give steps or epochs, one of them, got steps={local.steps} and "
            f"epochs={local.epochs}"
        )
    for name in ("batch_size", "steps", "epochs"):
        value = getattr(local, name)
        if value is not None:
            checks.count(f"Local: {name}", value)
    if local.steps is not None:
        return local.steps
    assert local.epochs is not None
    return local.epochs * max(rows // local.batch_size, 1)


def _narrowed(
    strategy: Strategy,
    trained: Trained,
    rank: int,
    *,
    plans: Any,
    pad: bool = False,
) -> Trained:
    """The leading components of every pair, the others zero or cut off.

    A component whose factors are both zero has a zero gradient: it stays.
    """
    least = min(plan.rank for plan in plans.values() if plan.adapted)
    if not strategy.any_rank or not 1 <= rank <= least:
        raise ValueError(
            f"rank must be from 1 to {least} and is for flexlora alone, got rank={rank} "
            f"with {strategy.name}"
        )

    def cut(arrays: Arrays) -> Arrays:
        kept = {}
        for path, array in arrays.items():
            axis = len(plans[path].batch)
            if not plans[path].adapted:
                kept[path] = array
            elif pad:
                shape = np.ones(array.ndim, int)
                shape[axis] = array.shape[axis]
                own = jnp.arange(array.shape[axis]).reshape(shape) < rank
                kept[path] = jnp.where(own, array, 0)
            else:
                kept[path] = lax.slice_in_dim(array, 0, rank, axis=axis)
        return kept

    return Trained(cut(trained.factors), cut(trained.sketches))
