"""Federated rounds: what is aggregated, what is refused, and that all paths agree."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import chequered, repeat

import raclora_jax as rl
from raclora_jax import federated as fed
from raclora_jax.federated._batches import reshuffled

CLIENTS, ROWS = 8, 12
RULES = (rl.Rule("stack", batch=0), rl.Rule("frozen", mode="frozen"))
STRATEGIES = {
    "raclora": fed.raclora,
    "two rounds a link": functools.partial(fed.raclora, rounds_per_link=2),
    "fedavg": fed.fedavg,
    "ffa_lora": fed.ffa_lora,
    "fedit": fed.fedit,
    "fedex": fed.fedex,
    "flexlora": fed.flexlora,
}
PAIRS = ("fedit", "fedex", "flexlora")


update_all = jax.jit(fed.client_updates, static_argnums=(0, 3), static_argnames="mesh")


@pytest.fixture(autouse=True)
def _float64():
    """Closed forms to rounding; the flag is restored after."""
    with jax.enable_x64(True):
        yield


def model(dtype=np.float64):
    """Lopsided leaves: a kernel, a stack of two, a bias, and one that is frozen."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 5), "stack": (2, 5, 3), "bias": (5,), "frozen": (3,)}
    draws = {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}
    return {name: jnp.asarray(draw, dtype) for name, draw in draws.items()}


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    out = hidden @ params["stack"][0] + jnp.tanh(hidden @ params["stack"][1])
    return jnp.mean((out * (1 + params["frozen"]) - y) ** 2)


def examples(dtype=np.float64):
    """Data of every client, no two alike."""
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(CLIENTS, ROWS, size)) for size in (6, 3))
    return jnp.asarray(x + np.arange(CLIENTS)[:, None, None] / 4, dtype), jnp.asarray(
        y, dtype
    )


def make(name, side="left", sketch="orthonormal", rank=2, **fields):
    return STRATEGIES[name](
        rl.Spec(rank, side=side, sketch=sketch, rules=RULES, **fields)
    )


LOCAL = fed.Local(loss_fn, 0.1, batch_size=5, steps=3)


def random_messages(strategy, state, seed=0, clients=5):
    """Messages of the right form with random content and weights."""
    rng = np.random.default_rng(seed)
    like = fed.Trained(state.factors, state.chain.sketches if strategy.pair else {})
    stamp = fed.stamp_of(strategy, state.base_params)

    def one(client):
        trained = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), like)
        return fed.Message(trained, client, state.round, int(rng.integers(1, 9)), stamp)

    return [one(client) for client in range(clients)]


def lifted(factor, sketch, side):
    """``S F`` or ``F S^T`` by einsum, stacked leaves too; scaling is 1 here."""
    first, second = (sketch, factor) if side == "left" else (factor, sketch)
    return np.einsum("...rm,...rn->...mn", np.asarray(first), np.asarray(second))


def sketches_of(strategy, state):
    plans = rl.plan(strategy.spec, state.base_params)
    return {
        path: reference.explicit(sketch, plans[path])
        for path, sketch in state.chain.sketches.items()
    }


def mean_products(strategy, state, messages, side):
    """The weights plus the weighted mean of the clients' own products, in NumPy."""
    weights = np.array([message.count for message in messages], float)
    weights /= weights.sum()
    shared = sketches_of(strategy, state)
    want = {path: np.array(leaf) for path, leaf in state.base_params.items()}
    for weight, message in zip(weights, messages, strict=True):
        for path, factor in message.trained.factors.items():
            if path not in shared:
                want[path] += weight * factor
                continue
            own = message.trained.sketches.get(path, shared[path])
            want[path] += weight * lifted(factor, own, side)
    return want


def after(strategy, state, messages):
    step, log = fed.aggregate(strategy, state, messages)
    assert log.dropped == ()
    return fed.params_of(strategy, fed.server_step(strategy, state, step)[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "sketch"),
    [
        ("raclora", "orthonormal"),
        ("raclora", "block"),
        ("raclora", "gaussian_raw"),
        ("ffa_lora", "orthonormal"),
    ],
)
def test_mean_of_products_is_exact(name, side, sketch):
    strategy = make(name, side, sketch)
    state = fed.init(strategy, model(), key=3)
    messages = random_messages(strategy, state)
    want = mean_products(strategy, state, messages, side)
    chex.assert_trees_all_close(
        jax.device_get(after(strategy, state, messages)), want, rtol=1e-14, atol=1e-14
    )


def test_fedavg_is_the_mean_of_the_weights():
    strategy, params, data = make("fedavg"), model(), examples()
    state = fed.init(strategy, params, key=0)
    whole = fed.Local(loss_fn, 0.1, batch_size=ROWS, steps=4)
    counts = np.array([12, 3, 7, 12, 5, 9, 1, 10])
    trained, grad_fn = [], jax.jit(jax.grad(loss_fn))
    for client in range(CLIENTS):
        # All examples in one batch: a client of fewer goes round them again.
        weights = dict(params)
        rows = np.asarray(
            reshuffled_rows(client, counts[client], whole.batch_size, whole.steps)
        )
        for step in rows:
            grads = grad_fn(weights, data[0][client][step], data[1][client][step])
            grads["frozen"] = jnp.zeros(3)
            weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads)
        trained.append(weights)
    share = counts / counts.sum()
    want = jax.tree.map(
        lambda *ws: sum(a * w for a, w in zip(share, ws, strict=True)), *trained
    )
    together = update_all(
        strategy, state, data, whole, clients=jnp.arange(8), counts=counts, key=7
    )
    messages = [jax.tree.map(lambda a, c=c: a[c], together) for c in range(CLIENTS)]
    chex.assert_trees_all_close(after(strategy, state, messages), want, rtol=1e-12)


def reshuffled_rows(client, count, batch_size, steps):
    """The rows that ``client_update`` takes in round 0 with key 7."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), client), 0)
    return reshuffled(key, ROWS, int(count), steps, batch_size)


@pytest.mark.parametrize("side", ["left", "right"])
def test_fedit_misses_the_residual_and_fedex_adds_it(side):
    strategies = [make(name, side) for name in ("fedit", "fedex")]
    states = [fed.init(strategy, model(), key=3) for strategy in strategies]
    messages = [
        random_messages(*pair, seed=2) for pair in zip(strategies, states, strict=True)
    ]
    mean = mean_products(strategies[0], states[0], messages[0], side)
    own, exact = (
        jax.device_get(after(*a)) for a in zip(strategies, states, messages, strict=True)
    )
    chex.assert_trees_all_close(exact, mean, rtol=1e-13, atol=1e-13)
    weights = np.array([message.count for message in messages[0]], float)
    weights /= weights.sum()
    for path in ("kernel", "stack"):
        factors, sketches = (
            np.stack([getattr(message.trained, kind)[path] for message in messages[0]])
            for kind in ("factors", "sketches")
        )
        centred = [a - np.tensordot(weights, a, 1) for a in (factors, sketches)]
        missed = np.tensordot(weights, lifted(*centred, side), 1)
        assert np.linalg.norm(missed) > 0.1 * np.linalg.norm(mean[path])
        np.testing.assert_allclose(mean[path] - own[path], missed, rtol=1e-12, atol=1e-13)


def test_the_residual_travels_in_the_smaller_form():
    params = {"wide": jnp.zeros((40, 50)), "small": jnp.zeros((6, 5))}
    strategy = fed.fedex(rl.Spec(1, side="left"))
    state = fed.init(strategy, params, key=0)
    messages = random_messages(strategy, state, clients=3)
    step, _ = fed.aggregate(strategy, state, messages)
    assert jax.tree.map(np.shape, step.residual) == {
        "wide": ((3, 1, 50), (3, 1, 40)),
        "small": (6, 5),
    }
    want = mean_products(strategy, state, messages, "left")
    got = fed.params_of(strategy, fed.server_step(strategy, state, step)[0])
    chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("ranks", "side"), chequered([(2, 2, 2, 2, 2), (1, 2, 1, 2, 1)], ["left", "right"])
)
def test_flexlora_is_the_nearest_of_its_rank(side, ranks):
    strategy = make("flexlora", side)
    state = fed.init(strategy, model(), key=3)
    messages = [
        dataclasses.replace(message, trained=narrowed(message.trained, rank))
        for rank, message in zip(ranks, random_messages(strategy, state), strict=True)
    ]
    mean = mean_products(strategy, state, messages, side)
    got = jax.device_get(after(strategy, state, messages))
    for path in ("kernel", "stack"):
        base = np.asarray(state.base_params[path])
        values = np.linalg.svd(mean[path] - base, compute_uv=False)
        tail = np.sqrt((values[..., 2:] ** 2).sum())
        error = np.linalg.norm(got[path] - mean[path])
        np.testing.assert_allclose(error, tail, rtol=1e-12)
        assert tail > 0.05 * np.linalg.norm(values)
        assert (np.linalg.matrix_rank(got[path] - base, tol=1e-9) == 2).all()
    np.testing.assert_allclose(got["bias"], mean["bias"], rtol=1e-14)


def narrowed(trained, rank):
    """A client's own rank: the rank axis of the stack is its second."""

    def cut(arrays):
        own = {"kernel": np.s_[:rank], "stack": np.s_[:, :rank]}
        return {path: array[own.get(path, ...)] for path, array in arrays.items()}

    return fed.Trained(*map(cut, trained))


def test_flexlora_never_forms_a_dense_svd():
    strategy = fed.flexlora(2)
    state = fed.init(strategy, {"kernel": jnp.zeros((40, 50))}, key=0)
    stacked = stack(random_messages(strategy, state, clients=4))
    run = functools.partial(fed.combine, strategy)
    seen = [
        eqn.invars[0].aval.shape
        for eqn in jax.make_jaxpr(run)(state, stacked).jaxpr.eqns
        for eqn in inner_equations(eqn)
        if eqn.primitive.name == "svd"
    ]
    assert seen == [(8, 8)]


def inner_equations(eqn):
    yield eqn
    for value in eqn.params.values():
        if hasattr(value, "jaxpr"):
            for inner in value.jaxpr.eqns:
                yield from inner_equations(inner)


def test_a_smaller_client_keeps_its_rank():
    strategy, data = make("flexlora"), examples()
    state = fed.init(strategy, model(), key=0)
    own = tuple(array[0] for array in data)
    message = fed.client_update(strategy, state, own, LOCAL, client=0, rank=1, key=1)
    shapes = jax.tree.map(np.shape, message.trained)
    assert shapes.factors["kernel"] == (1, 5)
    assert shapes.sketches["stack"] == (2, 1, 5)
    step, log = fed.aggregate(strategy, state, [message])
    assert log.accepted == (0,)
    delta = fed.params_of(strategy, fed.server_step(strategy, state, step)[0])
    delta = np.asarray(delta["kernel"] - state.base_params["kernel"])
    assert np.linalg.matrix_rank(delta, tol=1e-9) == 1


def stack(messages):
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *messages)
    return arrays


def test_ffa_is_one_endless_link():
    """Against the adapter form with one chain that never goes on, written out."""
    strategy, params, data = make("ffa_lora"), model(), examples()
    spec, steps, rate = strategy.spec, 3, 0.1
    state = fed.init(strategy, params, key=5)
    shared, chain = rl.init_adapter(params, spec, key=5)
    grad_fn = jax.jit(jax.grad(rl.adapted(loss_fn, spec)))
    local = fed.Local(loss_fn, rate, batch_size=ROWS, steps=steps)
    for _ in range(3):
        messages = update_all(
            strategy, state, data, local, clients=jnp.arange(CLIENTS), key=7
        )
        state, _, _ = fed.server_step(
            strategy, state, fed.combine(strategy, state, messages)
        )
        own = []
        for client in range(CLIENTS):
            factors = shared
            for _ in range(steps):
                batch = [array[client] for array in data]
                grads = grad_fn(factors, params, chain, *batch)
                factors = jax.tree.map(lambda f, g: f - rate * g, factors, grads)
            own.append(factors)
        shared = jax.tree.map(lambda *fs: sum(fs) / CLIENTS, *own)
    want = rl.effective_params(params, shared, chain, spec)
    chex.assert_trees_all_close(fed.params_of(strategy, state), want, rtol=1e-11)
    assert int(state.round) == 3


@pytest.mark.parametrize(
    ("name", "sketch"),
    [
        repeat("raclora", "orthonormal"),
        ("raclora", "block"),
        ("fedavg", "block"),
        ("fedit", "orthonormal"),
    ],
)
def test_vmap_shard_map_and_a_loop_agree(name, sketch):
    strategy, data = make(name, sketch=sketch), examples()
    state = fed.init(strategy, model(), key=0)
    state = jax.tree.map(lambda a: a, state)._replace(round=jnp.int32(3))
    mesh = jax.make_mesh((8,), ("clients",), (jax.sharding.AxisType.Auto,))
    counts = jnp.array([12, 3, 7, 12, 5, 9, 1, 10])
    run = functools.partial(
        fed.client_updates, strategy, state, data, LOCAL, counts=counts, key=7
    )
    together = jax.jit(lambda ids: run(clients=ids))(jnp.arange(CLIENTS))
    spread = jax.jit(lambda ids: run(clients=ids, mesh=mesh))(jnp.arange(CLIENTS))
    chex.assert_trees_all_close(
        jax.device_get(spread), jax.device_get(together), rtol=1e-12, atol=1e-14
    )
    for client in (1, 6):
        own = tuple(array[client] for array in data)
        alone = fed.client_update(
            strategy, state, own, LOCAL, client=client, count=int(counts[client]), key=7
        )
        chex.assert_trees_all_close(
            alone,
            jax.tree.map(lambda a, c=client: a[c], together),
            rtol=1e-12,
            atol=1e-14,
        )
    moved = jax.tree.leaves(
        jax.tree.map(
            lambda a, b: jnp.abs(a - b).max(), together.trained.factors, state.factors
        )
    )
    assert min(moved) > 1e-3


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        repeat("raclora", np.float32),
        ("raclora", jnp.bfloat16),
        ("two rounds a link", jnp.bfloat16),
        ("ffa_lora", jnp.bfloat16),
        ("fedex", jnp.bfloat16),
        ("flexlora", np.float32),
        ("fedavg", np.float32),
    ],
)
def test_replay_is_equal_to_the_last_bit(name, dtype):
    strategy = make(name)
    start = fed.init(strategy, model(dtype), key=0)
    state, steps = start, []
    for round in range(4):
        step = None
        if round != 1:
            messages = random_messages(strategy, state, seed=round)
            step, _ = fed.aggregate(strategy, state, messages)
        state, _, step = fed.server_step(strategy, state, step)
        steps.append(jax.device_get(step))
    behind = fed.replay(strategy, start, steps[:1])
    late = fed.replay(strategy, behind, steps[1:])
    chex.assert_trees_all_equal(jax.device_get(late), jax.device_get(state))
    assert fed.params_of(strategy, state)["kernel"].dtype == dtype
    with pytest.raises(ValueError, match=r"ends round 2, the state stands at round 1"):
        fed.replay(strategy, behind, steps[2:])
    with pytest.raises(ValueError, match="stamp"):
        fed.replay(make("fedavg" if name != "fedavg" else "raclora"), behind, steps[1:])


@pytest.mark.parametrize("sketch", ["orthonormal", "block"])
def test_a_sketch_is_a_function_of_key_and_link(sketch):
    strategy = make("raclora", sketch=sketch)
    state = fed.init(strategy, model(), key=9)
    for link in range(3):
        want = rl.sample_sketch(model(), strategy.spec, key=9, link=link)
        for path, drawn in state.chain.sketches.items():
            chex.assert_trees_all_equal(drawn, want[path])
        # Whoever answers, and if nobody does.
        step = None
        if link == 0:
            messages = random_messages(strategy, state, clients=2)
            step, _ = fed.aggregate(strategy, state, messages)
        state, _, _ = fed.server_step(strategy, state, step)


def test_a_skipped_round_leaves_the_weights():
    strategy = make("raclora")
    state = fed.init(strategy, model(), key=0)
    skipped, _, step = fed.server_step(strategy, state, None)
    chex.assert_trees_all_equal(skipped.base_params, state.base_params)
    assert (int(skipped.round), step.trained) == (1, None)


def broken(message, **changes):
    return dataclasses.replace(message, **changes)


def with_factors(message, **factors):
    own = message.trained.factors | factors
    return broken(message, trained=message.trained._replace(factors=own))


BAD = {
    "nothing": [
        lambda m: None,
        lambda m: "a string",
        lambda m: broken(m, client=None),
        lambda m: broken(m, client=0.5),
    ],
    "stamp": [lambda m: broken(m, stamp="0" * 16)],
    "round": [lambda m: broken(m, round=5), lambda m: broken(m, round="0")],
    "shape": [
        lambda m: with_factors(m, kernel=np.zeros((3, 5))),
        lambda m: with_factors(m, extra=np.zeros(3)),
        lambda m: with_factors(m, frozen=np.zeros(3)),
        lambda m: broken(m, trained=fed.Trained({}, {})),
        lambda m: broken(m, trained=m.trained.factors),
        lambda m: broken(m, trained=fed.Trained(None, {})),
        lambda m: with_factors(m, bias=np.zeros(5, int)),
        lambda m: broken(m, trained=m.trained._replace(sketches={"kernel": 0})),
    ],
    "not finite": [
        lambda m: with_factors(m, bias=np.full(5, np.nan)),
        lambda m: with_factors(m, bias=np.full(5, np.inf)),
    ],
    "weight": [
        lambda m: broken(m, count=-1),
        lambda m: broken(m, count=np.nan),
        lambda m: broken(m, count=np.inf),
        lambda m: broken(m, count=np.ones(2)),
    ],
}
CASES = [(reason, spoil) for reason, spoils in BAD.items() for spoil in spoils]


@pytest.mark.parametrize(("reason", "spoil"), CASES)
def test_a_bad_message_is_dropped_by_name_and_harms_nothing(reason, spoil):
    strategy = make("raclora")
    state = fed.init(strategy, model(), key=0)
    good = random_messages(strategy, state)
    bad = spoil(broken(good[2], client=17))
    clean, _ = fed.aggregate(strategy, state, good)
    step, log = fed.aggregate(strategy, state, [bad, *reversed(good)])
    chex.assert_trees_all_equal(step, clean)
    assert log.counts == {reason: 1}
    assert log.accepted == (0, 1, 2, 3, 4)
    line = log.dropped[0].line
    assert "\n" not in line
    assert reason == "nothing" or "client 17" in line
    assert str(log).splitlines()[1] == line


def test_the_second_message_of_a_client_is_dropped():
    strategy = make("raclora")
    state = fed.init(strategy, model(), key=0)
    good = random_messages(strategy, state)
    twice = random_messages(strategy, state, seed=5)[1]
    step, log = fed.aggregate(strategy, state, [*good, twice])
    chex.assert_trees_all_equal(step, fed.aggregate(strategy, state, good)[0])
    assert log.counts == {"twice": 1}


def test_nothing_left_is_no_step():
    strategy = make("raclora")
    state = fed.init(strategy, model(), key=0)
    step, log = fed.aggregate(strategy, state, [])
    assert (step, log.accepted, log.dropped, log.bytes_up) == (None, (), (), 0)
    weightless = [broken(m, count=0) for m in random_messages(strategy, state)]
    step, log = fed.aggregate(strategy, state, weightless)
    assert (step, log.counts) == (None, {"no weight": 5})
    assert "sum to 0" in log.dropped[0].line


def test_simulated_clients_that_fail_weigh_nothing():
    strategy = make("fedit")
    state = fed.init(strategy, model(), key=0)
    messages = stack(random_messages(strategy, state))
    messages.trained.factors["bias"][2] = np.nan
    weights = jnp.array([1.0, 2.0, 3.0, 0.0, 1.0])
    step = fed.combine(strategy, state, messages, weights=weights)
    drop = jax.tree.map(lambda a: a[[0, 1, 4]], messages)
    want = fed.combine(strategy, state, drop, weights=weights[jnp.array([0, 1, 4])])
    chex.assert_trees_all_close(step, want, rtol=1e-14)
    none = fed.combine(strategy, state, messages, weights=jnp.zeros(5))
    chex.assert_trees_all_equal(none.trained.factors, state.factors)
    chex.assert_trees_all_equal(none.trained.sketches, state.chain.sketches)


@pytest.mark.parametrize("name", STRATEGIES)
def test_bytes_are_those_of_the_arrays(name):
    strategy = make(name)
    state = fed.init(strategy, model(np.float32), key=0)
    messages = random_messages(strategy, state)
    step, log = fed.aggregate(strategy, state, messages)
    numbers = {
        "fedavg": 6 * 5 + 2 * 5 * 3 + 5,
        **dict.fromkeys(PAIRS, 2 * (6 + 5) + 2 * 2 * (5 + 3) + 5),
    }.get(name, 2 * 5 + 2 * 2 * 3 + 5)
    header = sum(
        np.asarray(part).nbytes
        for part in (messages[0].client, messages[0].round, messages[0].count)
    )
    assert log.bytes_up == 5 * (4 * numbers + header)
    residual = {"fedex": 4 * (6 * 5 + 2 * 5 * 3)}.get(name, 0)
    assert fed.nbytes(step) == 4 * numbers + residual + 4


def test_server_momentum_in_factor_coordinates():
    """Heavy ball within a link, from nothing at the next; a dense leaf keeps its own."""
    strategy = make("two rounds a link")
    params = model()
    state = fed.init(strategy, params, key=0)
    rule = optax.sgd(0.5, momentum=0.9)
    labels = rl.factor_labels(params, strategy.spec)
    tx = optax.partition({"lowrank": rule, "dense": rule}, labels)
    opt_state = fed.server_init(strategy, state, tx)
    velocity = dict.fromkeys(state.factors, 0.0)
    want = {path: np.array(leaf) for path, leaf in params.items()}
    for round in range(4):
        messages = random_messages(strategy, state, seed=round)
        shared = sketches_of(strategy, state)
        if round == 2:
            velocity |= dict.fromkeys(("kernel", "stack"), 0.0)
        weights = np.array([message.count for message in messages], float)
        for path in velocity:
            stacked = np.stack([m.trained.factors[path] for m in messages])
            mean = np.tensordot(weights / weights.sum(), stacked, 1)
            velocity[path] = 0.9 * velocity[path] + mean - np.asarray(state.factors[path])
            delta = 0.5 * velocity[path]
            if path in shared:
                delta = lifted(delta, shared[path], "left")
            want[path] = want[path] + delta
        step, _ = fed.aggregate(strategy, state, messages)
        state, opt_state, _ = fed.server_step(
            strategy, state, step, tx=tx, opt_state=opt_state
        )
    got = jax.device_get(fed.params_of(strategy, state))
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-13)
    assert int(state.chain.link) == 2


def test_local_rates_follow_the_round_and_rules_are_told_the_plans():
    strategy, data = make("raclora"), examples()
    state = fed.init(strategy, model(), key=0)._replace(round=jnp.int32(4))
    own = tuple(array[0] for array in data)

    def update(rate, inner=None, steps=1):
        local = fed.Local(loss_fn, rate, batch_size=ROWS, steps=steps)
        local = local if inner is None else local._replace(inner=inner)
        message = fed.client_update(strategy, state, own, local, client=0, key=0)
        return message.trained.factors

    halved = update(lambda round: 0.8 * 0.5**round)
    chex.assert_trees_all_close(halved, update(0.05), rtol=1e-13)
    factor = np.asarray(update(1.0, rl.orthogonal())["stack"])
    np.testing.assert_allclose(
        np.linalg.norm(factor, axis=(1, 2)) ** 2 / 3, [2, 2], rtol=0.1
    )


def test_every_pass_takes_every_example_once():
    key = jax.random.key(2)
    rows = np.asarray(reshuffled(key, 13, 13, 9, 4))
    passes = rows.reshape(3, 12)
    assert all(len(set(one)) == 12 for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    padded = np.asarray(jax.jit(lambda n: reshuffled(key, 20, n, 6, 4))(9))
    assert padded.max() == 8
    assert all(len(set(one)) == 8 for one in padded.reshape(3, 8))
    few = np.asarray(reshuffled(key, 20, 3, 2, 5))
    assert all(np.bincount(one, minlength=3).tolist().count(2) == 2 for one in few)


def test_epochs_are_passes():
    strategy, data = make("raclora"), examples()
    state = fed.init(strategy, model(), key=0)
    own = tuple(array[0] for array in data)
    run = functools.partial(fed.client_update, strategy, state, own, client=0, key=0)
    epochs = run(LOCAL._replace(steps=None, epochs=2))
    chex.assert_trees_all_equal(epochs, run(LOCAL._replace(steps=4)))


def test_epochs_are_passes_over_a_clients_own_examples():
    """Padding makes no more steps of it."""
    strategy, data = make("raclora"), examples()
    state = fed.init(strategy, model(), key=0)
    own = tuple(array[0] for array in data)
    run = functools.partial(fed.client_update, strategy, state, client=0, key=0)
    once = LOCAL._replace(steps=None, epochs=1)
    few = LOCAL.batch_size + 1  # of which one fills no batch
    passed = run(own, local=once, count=few)
    steps = run(own, local=LOCAL._replace(steps=1), count=few)
    chex.assert_trees_all_close(passed, steps, rtol=1e-12)


def test_fedavg_freezes_what_the_rules_freeze():
    """By the first rule that matches, as everywhere; and all others are trained."""
    head = {"head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    rules = (rl.Rule("head/kernel", rows=0), rl.Rule("head/.*", mode="frozen"))
    whole = (rl.Rule(".*kernel"), rl.Rule(".*", mode="frozen"))
    for given in (rules, whole):
        plans = rl.plan(fed.fedavg(rl.Spec(2, rules=given)).spec, head)
        modes = {path: plan.mode for path, plan in plans.items()}
        assert modes == {"head/kernel": "dense", "head/bias": "frozen"}
    with pytest.raises(ValueError, match="goes by the shape of a leaf"):
        fed.fedavg(rl.Spec(2, rest="frozen"))


def test_sampling_is_without_replacement_and_even():
    draws = [fed.sample_clients(20, 5, round=r, key=0) for r in range(400)]
    assert all(len(set(np.asarray(ids).tolist())) == 5 for ids in draws)
    counts = np.bincount(np.concatenate(draws), minlength=20)
    deviation = np.sqrt(400 * 0.25 * 0.75)
    assert np.abs(counts - 100).max() < 4 * deviation


def step_without_state():
    strategy = make("raclora")
    state = fed.init(strategy, model(), key=0)
    fed.server_step(strategy, state, None, tx=optax.sgd(1.0))


def private_fedex():
    strategy = make("fedex")
    state = fed.init(strategy, model(), key=0)
    privacy = fed.Privacy(clip=1.0, noise_multiplier=1.0, take=5, key=0)
    fed.aggregate(strategy, state, [], privacy=privacy)


@pytest.mark.parametrize(
    ("words", "make_it"),
    [
        ("rounds_per_link", lambda: fed.raclora(2, rounds_per_link=0)),
        ("draws the side", lambda: fed.raclora(rl.Spec(2, side=0.5))),
        (
            r"Rule\('kernel'\): side=0.5",
            lambda: fed.fedit(rl.Spec(2, rules=[rl.Rule("kernel", side=0.5)])),
        ),
        ("picks rows", lambda: fed.fedit(rl.Spec(2, sketch="block"))),
        ("take", lambda: fed.sample_clients(5, 6, round=0, key=0)),
        ("tx needs its state", step_without_state),
        ("privacy covers", private_fedex),
        ("clip", lambda: fed.Privacy(clip=0.0, noise_multiplier=1.0, take=1, key=0)),
        ("steps or epochs", lambda: one_update(LOCAL._replace(epochs=1))),
        ("batch_size", lambda: one_update(LOCAL._replace(batch_size=0))),
        ("rank", lambda: one_update(LOCAL, rank=1)),
        ("count must be from 0 to 12, got 13", lambda: one_update(LOCAL, count=13)),
        ("client must be from 0", lambda: one_update(LOCAL, client=-1)),
        ("client must be from 0", lambda: one_update(LOCAL, client=2**32)),
        ("round must be", lambda: fed.sample_clients(5, 3, round=-1, key=0)),
        ("same number of rows", lambda: one_update(LOCAL, data=(np.ones((0, 6)),))),
        ("same number of rows", lambda: one_update(LOCAL, data=np.ones((4, 6)))),
        (
            "leading axis",
            lambda: fed.client_updates(
                make("raclora"),
                fed.init(make("raclora"), model(), key=0),
                examples(),
                LOCAL,
                clients=jnp.arange(3),
                key=0,
            ),
        ),
    ],
)
def test_bad_settings_are_refused_by_name(words, make_it):
    with pytest.raises(ValueError, match=words):
        make_it()


def one_update(local, data=None, **fields):
    strategy = make("raclora")
    state = fed.init(strategy, model(), key=0)
    own = tuple(array[0] for array in examples()) if data is None else data
    return fed.client_update(strategy, state, own, local, key=0, **{"client": 0} | fields)


# FedKRSO


def krso_by_hand(data, start, P, walk, steps, rate):
    """A client as the paper has it: B from zero in each subspace, merged at its end."""
    (x, y), params = data, start
    gathered = np.zeros((len(P), P.shape[2], start["kernel"].shape[1]))
    for seed in walk:
        B, W = np.zeros(gathered[seed].shape), params["kernel"]
        rules = {"B": reference.Adam(0.9, 0.999, 1e-8)}
        rules["bias"] = reference.Adam(0.9, 0.999, 1e-8)
        for _ in range(steps):
            rest = x @ params["kernel"] + params["bias"] - y
            rest = rest * 2 / rest.size
            B = B - rate * rules["B"](P[seed].T @ (x.T @ rest))
            bias = params["bias"] - rate * rules["bias"](rest.sum(0))
            params = {"kernel": W + P[seed] @ B, "bias": bias}
        gathered[seed] += B
    return gathered, params


def test_fedkrso_clients_gather_in_shared_subspaces():
    """Of all walks through K = 2 one is a client's, three clients in two rounds."""
    seeds, rank, steps, intervals, rate = 2, 2, 2, 3, 0.05
    rng = np.random.default_rng(3)
    params = {"kernel": rng.normal(size=(7, 5)), "bias": rng.normal(size=5)}
    x, y = rng.normal(size=(3, 9, 7)), rng.normal(size=(3, 9, 5))

    def regression(params, x, y):
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    strategy = fed.fedkrso(rl.Spec(rank, side="left"), seeds=seeds)
    rule = fed.one_seed(optax.scale_by_adam(), seeds=seeds, steps=steps)
    local = fed.Local(regression, rate, batch_size=9, steps=steps * intervals, inner=rule)
    state = fed.init(strategy, jax.tree.map(jnp.asarray, params), key=0)
    law, walks = rl.Spec(seeds * rank, side="left", sketch="gaussian_raw"), []
    for link in range(2):
        raw = rl.sample_sketch(params, law, key=0, link=link)["kernel"]
        P = np.asarray(raw).reshape(seeds, rank, 7).transpose(0, 2, 1) / np.sqrt(rank)
        messages = fed.client_updates(
            strategy, state, (x, y), local, clients=jnp.arange(3), key=1
        )
        sums, biases = [], []
        for client in range(3):
            sent = np.asarray(messages.trained.factors["kernel"][client])
            every = {
                walk: krso_by_hand((x[client], y[client]), params, P, walk, steps, rate)
                for walk in itertools.product(range(seeds), repeat=intervals)
            }
            own = [
                walk
                for walk, (gathered, _) in every.items()
                if np.allclose(sent, gathered.reshape(-1, 5), atol=1e-9)
            ]
            assert len(own) == 1
            walks += own
            sums.append(every[own[0]][0])
            biases.append(every[own[0]][1]["bias"])
        change = sum(P[k] @ np.mean(sums, 0)[k] for k in range(seeds))
        params = {"kernel": params["kernel"] + change, "bias": np.mean(biases, 0)}
        step = fed.combine(strategy, state, messages)
        state, _, _ = fed.server_step(strategy, state, step)
        for name, leaf in fed.params_of(strategy, state).items():
            np.testing.assert_allclose(leaf, params[name], atol=1e-9)
    # Clients and rounds have walks of their own.
    assert len(set(walks)) > 2


def test_fedkrso_refuses_what_it_has_no_place_for():
    with pytest.raises(ValueError, match=r"alpha=4\.0: FedKRSO draws P"):
        fed.fedkrso(rl.Spec(2, alpha=4.0), seeds=2)
    for made in (
        lambda: fed.fedkrso(2, seeds=0),
        lambda: fed.one_seed(optax.identity(), seeds=1, steps=0),
    ):
        with pytest.raises(ValueError, match="must be"):
            made()
