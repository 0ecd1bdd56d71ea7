"""Forged and damaged messages: dropped by name, and the mean is that of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raclora_jax as rl
from raclora_jax import federated as fed

PARAMS = {"kernel": np.full((6, 5), 0.5, np.float32), "bias": np.zeros(5, np.float32)}
COUNTS = [3, 8, 5]


def begun(make=fed.raclora, **spec):
    strategy = make(rl.Spec(2, side="left", **spec))
    return strategy, fed.init(strategy, PARAMS, key=0)


def messages_of(strategy, state, counts=COUNTS):
    """Messages of random content, as they come off a wire."""
    like = fed.Trained(state.factors, state.chain.sketches if strategy.pair else {})
    stamp, rng = fed.stamp_of(strategy, PARAMS), np.random.default_rng(1)

    def draw(array):
        return rng.normal(size=array.shape).astype(array.dtype)

    return [
        fed.Message(jax.tree.map(draw, like), client, 0, count, stamp)
        for client, count in enumerate(counts)
    ]


def mean(messages, path="kernel"):
    """Of the factors by the counts, in float64."""
    counts = np.array([float(message.count) for message in messages])
    stacked = np.stack([message.trained.factors[path] for message in messages])
    return np.tensordot(counts / counts.sum(), stacked.astype(np.float64), 1)


def forged(message, **factors):
    return dataclasses.replace(
        message,
        client=9,
        trained=message.trained._replace(factors=message.trained.factors | factors),
    )


class Hostile:
    def __array__(self, *args, **options):
        raise RuntimeError("no\narray")

    def __repr__(self):
        raise RuntimeError


HUGE = 10**5000  # more digits than Python prints


NO_WEIGHTS = [
    *(1e39, np.float32(3e38), np.float64(-1e-300), np.nan),
    *(2**31, 2**32 - 50, 2**64, HUGE),
    *(1j, np.complex64(3), "5", [1, [2]], True, Hostile(), None),
]


@pytest.mark.parametrize("count", NO_WEIGHTS, ids=lambda count: type(count).__name__)
def test_a_forged_count_is_dropped_by_name(count):
    strategy, state = begun()
    good = messages_of(strategy, state)
    bad = dataclasses.replace(good[0], client=9, count=count)
    step, log = fed.aggregate(strategy, state, [bad, *good])
    assert log.counts == {"weight": 1}
    assert "must be a number from 0 to 2147483647" in log.dropped[0].line
    np.testing.assert_allclose(step.trained.factors["kernel"], mean(good), atol=1e-6)


@pytest.mark.parametrize(
    "counts",
    [
        [2**31 - 1, 2**31 - 1, np.int64(2**31 - 1)],  # whose sum is no int32
        [1e-300, 3e-300, 2e-300],  # which are zero in float32
        [np.uint8(200), np.uint8(100), jnp.int32(7)],
        [2.5, np.float16(0.5), jnp.asarray(4, jnp.bfloat16)],
    ],
)
def test_counts_that_fit_weigh_what_they_say(counts):
    strategy, state = begun()
    good = messages_of(strategy, state, counts)
    step, log = fed.aggregate(strategy, state, good)
    assert log.accepted == (0, 1, 2)
    np.testing.assert_allclose(step.trained.factors["kernel"], mean(good), atol=1e-6)


ODD = {
    "complex": ({"kernel": np.zeros((2, 5), complex)}, "shape"),
    "ragged": ({"kernel": [[1.0, 2.0], [3.0]]}, "shape"),
    "text": ({"kernel": "kernel"}, "shape"),
    "an object": ({"kernel": Hostile()}, "shape"),
    "keys of two types": ({7: np.zeros(3)}, "shape"),
    "a key that cannot be printed": ({HUGE: np.zeros(3)}, "shape"),
    "finite in float64": ({"bias": np.full(5, 1e300)}, "not finite"),
}


@pytest.mark.parametrize("privacy", [None, fed.Privacy(1e3, 0.0, take=3, key=0)])
@pytest.mark.parametrize("name", ODD)
def test_a_forged_factor_ends_no_round(name, privacy):
    factors, reason = ODD[name]
    strategy, state = begun()
    good = messages_of(strategy, state, [5, 5, 5])
    sent = [*good, forged(good[0])]
    sent[-1].trained.factors.update(factors)
    step, log = fed.aggregate(strategy, state, sent, privacy=privacy)
    assert [(drop.client, drop.reason) for drop in log.dropped] == [(9, reason)]
    assert "\n" not in log.dropped[0].line
    np.testing.assert_allclose(step.trained.factors["kernel"], mean(good), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"client": HUGE},
        {"client": Hostile()},
        {"client": [1, [2]]},
        {"client": 1j},
        {"round": Hostile()},
        {"round": 2**64},
        {"stamp": np.zeros(3)},
        {"stamp": "x\n" * 1000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_forged_numbers_and_stamps_end_no_round(changes):
    strategy, state = begun()
    good = messages_of(strategy, state)
    bad = dataclasses.replace(good[0], **{"client": 9} | changes)
    _, log = fed.aggregate(strategy, state, [bad, *good])
    assert (log.accepted, len(log.dropped)) == ((0, 1, 2), 1)
    assert len(str(log).splitlines()) == 2
    assert len(log.dropped[0].line) < 200


def test_a_pair_of_two_ranks_is_dropped():
    strategy, state = begun(fed.flexlora)
    good = messages_of(strategy, state)
    bad = forged(good[0], kernel=good[0].trained.factors["kernel"][:1])
    _, log = fed.aggregate(strategy, state, [*good, bad])
    assert "'kernel' as a pair of ranks 1 and 2" in log.dropped[0].line


@pytest.mark.parametrize(
    ("make", "spec", "size"),
    [
        (fed.raclora, {"alpha": "dim"}, 3.3e38),
        (fed.flexlora, {}, 3e38),
        (fed.fedex, {}, 3e38),
        (fed.ffa_lora, {"alpha": 1e6}, 3e38),
    ],
)
def test_who_pushes_the_weights_out_of_range_is_dropped(make, spec, size):
    strategy, state = begun(make, **spec)
    good = messages_of(strategy, state)
    bad = forged(good[0])
    trained = jax.tree.map(lambda a: np.full(a.shape, size, np.float32), bad.trained)
    bad = dataclasses.replace(bad, trained=trained, count=2**31 - 1)
    want, _ = fed.aggregate(strategy, state, good)
    step, log = fed.aggregate(strategy, state, [bad, *good])
    assert log.counts == {"not finite": 1}
    assert "client 9 sent numbers that leave weights that are not" in str(log)
    jax.tree.map(np.testing.assert_array_equal, step, want)


def test_half_precision_weights_keep_their_range():
    """A factor that float32 holds and that float16 weights do not."""
    params = {"kernel": jnp.ones((6, 5), jnp.float16)}
    strategy = fed.raclora(rl.Spec(2, side="left"))
    state = fed.init(strategy, params, key=0)
    stamp = fed.stamp_of(strategy, params)

    def message(client, size):
        factors = {p: np.full(f.shape, size) for p, f in state.factors.items()}
        return fed.Message(fed.Trained(factors, {}), client, 0, 1, stamp)

    sent = [message(0, 0.5), message(1, 6e5), message(2, 0.25)]
    tall = dataclasses.replace(sent[1], count=10**6)
    step, log = fed.aggregate(strategy, state, [sent[0], tall, sent[2]])
    after = fed.params_of(strategy, fed.server_step(strategy, state, step)[0])
    assert np.isfinite(np.asarray(after["kernel"], np.float32)).all()
    assert (log.accepted, log.counts) == ((0, 2), {"not finite": 1})


def test_a_private_mean_clips_numbers_whose_squares_are_infinite():
    strategy, state = begun()
    good = messages_of(strategy, state)[:2]
    trained = jax.tree.map(lambda a: np.full(a.shape, 3e38, np.float32), good[0].trained)
    bad = dataclasses.replace(good[0], client=9, trained=trained)
    privacy = fed.Privacy(clip=2.0, noise_multiplier=0.0, take=3, key=0)
    step, log = fed.aggregate(strategy, state, [*good, bad], privacy=privacy)
    assert log.accepted == (0, 1, 9)
    clipped = 0.0
    for one in (*good, bad):
        kernel, bias = (np.float64(one.trained.factors[p]) for p in ("kernel", "bias"))
        norm = np.sqrt((kernel**2).sum() + (bias**2).sum())
        clipped = clipped + kernel * min(1, 2 / norm) / 3
    np.testing.assert_allclose(step.trained.factors["kernel"], clipped, atol=1e-6)


def test_combine_gives_no_weight_to_what_is_no_weight():
    strategy, state = begun()
    good = messages_of(strategy, state)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *good, good[0])
    for weight in (-1.0, np.inf, np.nan, 3e38):
        weights = jnp.array([*COUNTS, weight])
        step = fed.combine(strategy, state, stacked, weights=weights)
        np.testing.assert_allclose(step.trained.factors["kernel"], mean(good), atol=1e-6)


def damaged(step, **changes):
    return dataclasses.replace(step, **changes)


def with_kernel(step, kernel):
    factors = step.trained.factors | {"kernel": kernel}
    return damaged(step, trained=fed.Trained(factors, {}))


STEPS = {
    "NaN or infinity in '0/factors/kernel'": lambda s: with_kernel(
        s, np.full((2, 5), np.nan)
    ),
    "'kernel' of shape": lambda s: with_kernel(s, np.zeros((5, 2))),
    "'kernel' no array": lambda s: with_kernel(s, [[1.0], []]),
    "nothing for 'bias'": lambda s: damaged(
        s, trained=fed.Trained({"kernel": s.trained.factors["kernel"]}, {})
    ),
    "no Trained": lambda s: damaged(s, trained=3),
    "ends round 'x'": lambda s: damaged(s, round="x"),
    "stamp None": lambda s: damaged(s, stamp=None),
    "residual that is no dict": lambda s: damaged(s, residual=None),
    "residual of 'more'": lambda s: damaged(s, residual={"more": np.zeros(3)}),
    "residual of 'bias'": lambda s: damaged(s, residual={"bias": np.zeros(5)}),
    "residual of 'kernel' of shapes": lambda s: damaged(
        s, residual={"kernel": np.zeros(5)}
    ),
    "residual of 'kernel' that is no": lambda s: damaged(
        s, residual={"kernel": (1, "x")}
    ),
    "leaves weights that are not finite": lambda s: with_kernel(
        s, np.full((2, 5), 3.3e38, np.float32)
    ),
}


@pytest.mark.parametrize("words", STEPS)
def test_a_damaged_step_moves_neither_server_nor_client(words):
    strategy, state = begun(alpha=1e3)
    step, _ = fed.aggregate(strategy, state, messages_of(strategy, state))
    bad = STEPS[words](step)
    with pytest.raises(ValueError, match=words):
        fed.server_step(strategy, state, bad)
    with pytest.raises(ValueError, match=words):
        fed.replay(strategy, state, [bad])


def test_what_is_no_step_and_no_list_is_refused_by_name():
    strategy, state = begun()
    with pytest.raises(TypeError, match=r"expected a Step, .* got a tuple"):
        fed.replay(strategy, state, [(1, 2)])
    with pytest.raises(TypeError, match="use combine for the stacked messages"):
        fed.aggregate(strategy, state, messages_of(strategy, state)[0])


def test_server_step_takes_concrete_steps_inside_a_trace():
    """Checks of values must not turn into checks of tracers."""
    strategy, state = begun()
    step, _ = fed.aggregate(strategy, state, messages_of(strategy, state))
    want, _, _ = fed.server_step(strategy, state, step)
    after = jax.jit(lambda: fed.server_step(strategy, state, step)[0])()
    jax.tree.map(np.testing.assert_array_equal, after.base_params, want.base_params)
