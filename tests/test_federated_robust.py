"""Robust means against NumPy, and against forged clients up to the breakdown point."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import chequered

import raclora_jax as rl
from raclora_jax import federated as fed

PARAMS = {"kernel": np.full((6, 5), 0.5, np.float32), "bias": np.zeros(5, np.float32)}
STRATEGIES = {"raclora": fed.raclora, "ffa_lora": fed.ffa_lora, "fedavg": fed.fedavg}


def begun(make=fed.raclora):
    strategy = make(rl.Spec(2, side="left"))
    return strategy, fed.init(strategy, PARAMS, key=0)


def messages_of(strategy, state, clients):
    like = fed.Trained(state.factors, state.chain.sketches if strategy.pair else {})
    stamp, rng = fed.stamp_of(strategy, PARAMS), np.random.default_rng(clients)

    def draw(array):
        return (array + rng.normal(size=array.shape)).astype(array.dtype)

    return [
        fed.Message(jax.tree.map(draw, like), client, 0, int(rng.integers(1, 99)), stamp)
        for client in range(clients)
    ]


def forged(message, size, count=2**31 - 1):
    trained = jax.tree.map(lambda a: np.full(a.shape, size, a.dtype), message.trained)
    return dataclasses.replace(message, trained=trained, count=count)


def numbers(step):
    return {p: np.float64(f) for p, f in step.trained.factors.items()}


def stacked(messages):
    paths = messages[0].trained.factors
    return {
        p: np.stack([np.float64(m.trained.factors[p]) for m in messages]) for p in paths
    }


def bounded(messages, norm):
    """Clipped one by one; the clients begin at zero."""
    arrays = stacked(messages)
    norms = np.sqrt(sum((a**2).reshape(len(a), -1).sum(1) for a in arrays.values()))
    short = np.minimum(1, norm / norms)
    return {p: np.tensordot(short, a, 1) / len(messages) for p, a in arrays.items()}


@pytest.mark.parametrize(("name", "clients"), chequered(STRATEGIES, [5, 6]))
def test_means_are_those_of_numpy_whatever_the_counts(name, clients):
    strategy, state = begun(STRATEGIES[name])
    messages = messages_of(strategy, state, clients)
    arrays = stacked(messages)
    want = {
        fed.trimmed_mean(2): {p: np.sort(a, 0)[2:-2].mean(0) for p, a in arrays.items()},
        fed.median(): {p: np.median(a, 0) for p, a in arrays.items()},
        fed.bounded_mean(3.0): bounded(messages, 3.0),
    }
    for mean, expected in want.items():
        step, log = fed.aggregate(strategy, state, messages, mean=mean)
        assert log.accepted == tuple(range(clients))
        got = numbers(step)
        for path, array in expected.items():
            np.testing.assert_allclose(got[path], array, atol=2e-6)


@pytest.mark.parametrize(
    ("mean", "clients", "withstands"),
    [
        (fed.trimmed_mean(1), 7, 1),
        (fed.trimmed_mean(3), 7, 3),
        (fed.median(), 7, 3),
        (fed.median(), 6, 2),
    ],
)
def test_forged_clients_take_the_mean_above_the_breakdown_point_alone(
    mean, clients, withstands
):
    strategy, state = begun()
    honest = messages_of(strategy, state, clients)

    def stays(number, size):
        """Whether every number lies between those of honest clients."""
        sent = [*honest[number:], *(forged(one, size) for one in honest[:number])]
        step, log = fed.aggregate(strategy, state, sent, mean=mean)
        assert len(log.accepted) == clients
        between = [
            (array >= honest_of[p].min(0) - 1e-6) & (array <= honest_of[p].max(0) + 1e-6)
            for honest_of in [stacked(honest[number:])]
            for p, array in numbers(step).items()
        ]
        return all(one.all() for one in between)

    assert all(stays(number, 1e6) for number in range(withstands + 1))
    assert stays(withstands, -3e38)
    assert not stays(withstands + 1, 1e6)


@pytest.mark.parametrize("size", [1e6, -3.4e38, 1e-25])
def test_a_bounded_mean_moves_by_its_bound_at_most(size):
    strategy, state = begun()
    honest, norm = messages_of(strategy, state, 8), 0.5 if size != 1e-25 else 1e-26

    def flat(sent):
        step, _ = fed.aggregate(strategy, state, sent, mean=fed.bounded_mean(norm))
        return np.concatenate([array.ravel() for array in numbers(step).values()])

    clean = flat(honest)
    for number in (1, 3, 8):
        taken = flat([*(forged(m, size) for m in honest[:number]), *honest[number:]])
        assert np.linalg.norm(taken) <= norm * (1 + 1e-6)
        assert np.linalg.norm(taken - clean) <= 2 * number * norm / 8 + 1e-6 * norm
    # All of them forged: as far as it goes.
    np.testing.assert_allclose(np.linalg.norm(taken), norm, rtol=1e-5)


def test_a_bounded_mean_starts_where_the_clients_did():
    """FFA-LoRA and FedIT go on from factors that are not zero."""
    for make in (fed.ffa_lora, fed.fedit):
        strategy, state = begun(make)
        step, _ = fed.aggregate(strategy, state, messages_of(strategy, state, 3))
        state, _, _ = fed.server_step(strategy, state, step)
        start = fed.Trained(state.factors, state.chain.sketches if strategy.pair else {})
        sent = [
            dataclasses.replace(
                m, round=1, trained=jax.tree.map(lambda a: np.asarray(a) + 0.01, start)
            )
            for m in messages_of(strategy, state, 3)
        ]
        step, _ = fed.aggregate(strategy, state, sent, mean=fed.bounded_mean(1e3))
        jax.tree.map(
            lambda got, begun: np.testing.assert_allclose(got, begun + 0.01, rtol=1e-5),
            step.trained,
            start,
        )


def test_too_few_messages_skip_the_round():
    strategy, state = begun()
    sent = messages_of(strategy, state, 5)
    sent[4] = dataclasses.replace(sent[4], count=0)
    step, log = fed.aggregate(strategy, state, sent, mean=fed.trimmed_mean(2))
    assert (step, log.accepted, log.counts) == (None, (), {"few": 5})
    assert "4 messages left, trimmed_mean needs 5" in log.dropped[0].line
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *sent)
    still = fed.combine(strategy, state, stack, mean=fed.trimmed_mean(2))
    assert not numbers(still)["kernel"].any()


@pytest.mark.parametrize(
    "mean", [fed.trimmed_mean(1), fed.median(), fed.bounded_mean(2.0)]
)
def test_simulated_clients_are_combined_alike(mean):
    """Under jit, one of weight zero and one that is not finite left out."""
    strategy, state = begun()
    sent = messages_of(strategy, state, 6)
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *sent)
    stack.trained.factors["bias"][1, 2] = np.nan
    weights = jnp.array([1.0, 2.0, 5.0, 0.0, 1.0, 9.0])
    run = jax.jit(
        lambda state, stack, weights: fed.combine(
            strategy, state, stack, weights=weights, mean=mean
        )
    )
    got = numbers(run(state, stack, weights))
    left = [sent[client] for client in (0, 2, 4, 5)]
    want = numbers(fed.aggregate(strategy, state, left, mean=mean)[0])
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, atol=1e-6)


def test_medians_of_pairs_are_refused_for_a_reason():
    """One client of three turns the product of honest ones round."""
    pairs = np.array([(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)])
    assert (pairs[:2].prod(1) == 1).all()
    assert np.median(pairs, 0).prod() == -1
    for make in (fed.fedit, fed.fedex, fed.flexlora):
        strategy, state = begun(make)
        for mean in (fed.trimmed_mean(1), fed.median()):
            words = f"{mean.name} is not defined for {strategy.name}"
            with pytest.raises(ValueError, match=words):
                fed.aggregate(strategy, state, [], mean=mean)
    for make in (fed.fedex, fed.flexlora):
        strategy, state = begun(make)
        with pytest.raises(ValueError, match="sends down more than a mean of factors"):
            fed.combine(strategy, state, [], mean=fed.bounded_mean(1.0))


def test_bad_means_are_refused_by_name():
    strategy, state = begun()
    privacy = fed.Privacy(clip=1.0, noise_multiplier=1.0, take=5, key=0)
    for mean in (fed.trimmed_mean(1), fed.median(), fed.bounded_mean(1.0)):
        with pytest.raises(ValueError, match=f"{mean.name} does not go with privacy"):
            fed.aggregate(strategy, state, [], mean=mean, privacy=privacy)
    with pytest.raises(TypeError, match="mean must be trimmed_mean"):
        fed.aggregate(strategy, state, [], mean=fed.median)
    for forged_, error in ((0, ValueError), (0.2, TypeError), (True, TypeError)):
        with pytest.raises(error, match="trimmed_mean: forged"):
            fed.trimmed_mean(forged_)
    for norm, error in ((0.0, ValueError), (np.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="bounded_mean: norm"):
            fed.bounded_mean(norm)
    with pytest.raises(ValueError, match="clip must be positive and finite, got inf"):
        fed.Privacy(clip=np.inf, noise_multiplier=1.0, take=5, key=0)
