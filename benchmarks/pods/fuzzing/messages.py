"""Forged and damaged messages of clients.

Three honest clients and one whose message has been forged take part in a round of each
strategy. What cannot be used must be dropped and leave the mean of the honest ones; what
can be used must weigh what it says. The means are computed anew in float64.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import raclora_jax as rl
from benchmarks.pods.fuzzing.case import Case
from raclora_jax import federated as fed

RANK, FORGED, CLIP = 2, 3, 4.0
PARAMS = {
    "kernel": np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5),
    "bias": np.zeros(5, np.float32),
}

# A forgery gives a message and whether it must be used; None where either will do.
Forgery = Callable[[random.Random, fed.Message], tuple[Any, bool | None]]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Way:
    """A strategy, how its server aggregates, and the same in NumPy."""

    strategy: fed.Strategy
    expected: Callable[[list[fed.Message]], Arrays]
    mean: fed.Robust | None = None
    privacy: fed.Privacy | None = None


def cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """Rounds in which one message of four has been forged.

    Args:
      seed: Of the forgeries.
      count: How many.
      folder: Not used: messages are no files.
    """
    draw, ways = random.Random(seed), _ways()
    states = [fed.init(way.strategy, PARAMS, key=0) for way in ways]
    for way, state in zip(ways, states, strict=True):
        # Compiled once, with all and with one left out, so that no case is timed with it.
        honest = _messages(draw, way.strategy, state)
        _round(way, state, honest)
        _round(way, state, honest[:-1])
    for index in range(count):
        way, state = ways[index % len(ways)], states[index % len(ways)]
        forgery = _FORGERIES[index // len(ways) % len(_FORGERIES)]
        *honest, last = _messages(draw, way.strategy, state)
        forged, usable = forgery(draw, last)
        sent = [*honest, forged]
        name = f"{index}: {forgery.__name__.strip('_')} in {way.strategy.name}"
        yield Case(
            name,
            lambda way=way, state=state, sent=sent: _round(way, state, sent),
            lambda found, way=way, sent=sent, usable=usable: _right(
                way, found, sent, usable
            ),
        )


def _ways() -> list[Way]:
    spec = rl.Spec(RANK, side="left")
    shared = fed.raclora(spec)
    privacy = fed.Privacy(clip=CLIP, noise_multiplier=0.0, take=4, key=0)
    return [
        Way(shared, _weighted),
        Way(shared, _median, mean=fed.median()),
        Way(shared, _private, privacy=privacy),
        Way(fed.ffa_lora(spec), _weighted),
        Way(fed.fedex(spec), _mean_product),
        Way(fed.flexlora(spec), _nearest_product),
    ]


def _messages(
    draw: random.Random, strategy: fed.Strategy, state: fed.State
) -> list[fed.Message]:
    rng = np.random.default_rng(draw.getrandbits(32))
    like = fed.Trained(state.factors, state.chain.sketches if strategy.pair else {})
    stamp = fed.stamp_of(strategy, PARAMS)

    def numbers(array: jax.Array) -> np.ndarray:
        return rng.normal(size=array.shape).astype(np.float32)

    return [
        fed.Message(
            jax.tree.map(numbers, like), client, 0, int(rng.integers(1, 99)), stamp
        )
        for client in range(FORGED + 1)
    ]


def _round(way: Way, state: fed.State, sent: list[Any]) -> Any:
    step, log = fed.aggregate(
        way.strategy, state, sent, mean=way.mean, privacy=way.privacy
    )
    after, _, step = fed.server_step(way.strategy, state, step)
    return step, log, fed.params_of(way.strategy, after)


def _right(way: Way, found: Any, sent: list[Any], usable: bool | None) -> bool:
    step, log, weights = found
    finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in weights.values())
    used = len(log.accepted) == len(sent)
    others = log.accepted[:FORGED] == tuple(range(FORGED))
    named = used or len(log.dropped) == 1
    if not (finite and others and named and usable in (None, used)):
        return False
    want = way.expected(sent if used else sent[:FORGED])
    got = _changes(weights) if way.strategy.name in _PAIRS else step.trained.factors
    return all(
        np.abs(got[path] - array).max() <= 1e-5 * max(1, np.abs(array).max())
        for path, array in want.items()
    )


_PAIRS = ("fedex", "flexlora")


def _changes(weights: Arrays) -> Arrays:
    return {p: np.float64(weights[p]) - PARAMS[p] for p in PARAMS}


def _stacked(messages: list[fed.Message], kind: str = "factors") -> Arrays:
    trained = [getattr(message.trained, kind) for message in messages]
    return {
        path: np.stack([np.asarray(one[path], np.float64) for one in trained])
        for path in trained[0]
    }


def _shares(messages: list[fed.Message]) -> np.ndarray:
    counts = np.array([float(message.count) for message in messages])
    return counts / counts.sum()


def _weighted(messages: list[fed.Message]) -> Arrays:
    shares = _shares(messages)
    return {p: np.tensordot(shares, a, 1) for p, a in _stacked(messages).items()}


def _median(messages: list[fed.Message]) -> Arrays:
    taking = [message for message in messages if float(message.count) > 0]
    return {p: np.median(a, 0) for p, a in _stacked(taking).items()}


def _private(messages: list[fed.Message]) -> Arrays:
    arrays = _stacked(messages)
    norms = np.sqrt(sum((a**2).reshape(len(a), -1).sum(1) for a in arrays.values()))
    short = np.minimum(1, CLIP / np.maximum(norms, CLIP / 2)) / 4
    return {p: np.tensordot(short, a, 1) for p, a in arrays.items()}


def _mean_product(messages: list[fed.Message]) -> Arrays:
    factors, sketches = (_stacked(messages, kind) for kind in ("factors", "sketches"))
    products = np.einsum("jrm,jrn->jmn", sketches["kernel"], factors["kernel"])
    shares = _shares(messages)
    return {
        "kernel": np.tensordot(shares, products, 1),
        "bias": np.tensordot(shares, factors["bias"], 1),
    }


def _nearest_product(messages: list[fed.Message]) -> Arrays:
    whole = _mean_product(messages)
    u, values, vt = np.linalg.svd(whole["kernel"], full_matrices=False)
    near = (u[:, :RANK] * values[:RANK]) @ vt[:RANK]
    return whole | {"kernel": near}


class _Hostile:
    """An object that is nothing a server knows."""

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("no\narray")

    def __repr__(self) -> str:
        raise RuntimeError


_NOT_NUMBERS = (None, "1", b"1", [1, [2]], {}, 1j, True, _Hostile(), 10**5000, np.nan)
_KEYS = (7, None, "more", "", b"kernel", ("kernel",), 10**5000, 1.5)
_ELSE = (None, 3, "message", b"", [], {}, (), fed.Message, _Hostile(), np.zeros(3))


def _with(message: fed.Message, path: str, array: Any) -> fed.Message:
    factors = message.trained.factors | {path: array}
    trained = message.trained._replace(factors=factors)
    return dataclasses.replace(message, trained=trained)


def _path(draw: random.Random) -> str:
    return draw.choice(sorted(PARAMS))


def _another_count(draw: random.Random, message: fed.Message) -> Any:
    good = (0, 2**31 - 1, 1e-300, 0.5, np.uint8(200), np.float16(2), jnp.int32(3))
    bad = (-1, -0.5, 2**31, 2**32 - 50, 1e39, np.float32(3e38), np.inf, -np.inf)
    usable = draw.random() < 0.5
    count = draw.choice(good if usable else (*bad, *_NOT_NUMBERS))
    return dataclasses.replace(message, count=count), usable


def _another_client(draw: random.Random, message: fed.Message) -> Any:
    good = (2**62, np.uint64(2**63 + 1), np.int8(9), 7.0)
    bad = (*_NOT_NUMBERS, 0.5, np.inf, 0, np.float32(1))
    usable = draw.random() < 0.3
    client = draw.choice(good if usable else bad)
    return dataclasses.replace(message, client=client), usable


def _another_round(draw: random.Random, message: fed.Message) -> Any:
    round = draw.choice((*_NOT_NUMBERS, 1, -1, 2**32, 0.5, np.inf))
    return dataclasses.replace(message, round=round), False


def _another_stamp(draw: random.Random, message: fed.Message) -> Any:
    stamp = draw.choice((None, 3, "", message.stamp[:-1], "x\n" * 999, np.zeros(2), b"x"))
    return dataclasses.replace(message, stamp=stamp), False


def _flipped_bits(draw: random.Random, message: fed.Message) -> Any:
    path = _path(draw)
    array = message.trained.factors[path]
    raw = bytearray(array.tobytes())
    for _ in range(draw.randint(1, 3)):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    flipped = np.frombuffer(raw, array.dtype).reshape(array.shape)
    return _with(message, path, flipped), None if np.isfinite(flipped).all() else False


def _one_number(draw: random.Random, message: fed.Message) -> Any:
    path = _path(draw)
    array = message.trained.factors[path].astype(np.float64)
    size = draw.choice((np.nan, np.inf, -np.inf, 1e39, 1e300, 1e-300, 1e-40, 1e6, -1e12))
    array[draw.choice([*np.ndindex(array.shape)])] = size
    return _with(message, path, array), bool(abs(size) < 1e38)


def _huge_numbers(draw: random.Random, message: fed.Message) -> Any:
    size = draw.choice((1e18, 1e19, 1e30, 3e38, -3.4e38))
    trained = jax.tree.map(lambda a: np.full(a.shape, size, np.float32), message.trained)
    return dataclasses.replace(message, trained=trained), None


def _another_dtype(draw: random.Random, message: fed.Message) -> Any:
    path = _path(draw)
    good = (np.float64, np.longdouble, ">f4", ">f8")
    bad = (np.int32, complex, bool, "S8", "U8", object, "M8[s]", [("x", "f4")])
    usable = draw.random() < 0.4
    zeros = np.zeros(message.trained.factors[path].shape)
    array = message.trained.factors[path] if usable else zeros.astype(int)
    return _with(
        message, path, array.astype(draw.choice(good if usable else bad))
    ), usable


def _another_shape(draw: random.Random, message: fed.Message) -> Any:
    path = _path(draw)
    array = message.trained.factors[path]
    other = draw.choice(
        (
            *(array[None], array[..., None], array.T[:-1], array[:0], array[..., :-1]),
            *(array.ravel()[:3], array.ravel()[0], np.zeros(0), np.zeros((1,) * 40)),
        )
    )
    return _with(message, path, other), False


def _no_array(draw: random.Random, message: fed.Message) -> Any:
    path = _path(draw)
    array = message.trained.factors[path]
    if draw.random() < 0.3:
        other = draw.choice((array.tolist(), jnp.asarray(array), np.ma.array(array)))
        return _with(message, path, other), True
    other = draw.choice((*_ELSE, [[1.0], [2.0, 3.0]], "kernel", fed.Message, {1: 2}))
    return _with(message, path, other), False


def _another_key(draw: random.Random, message: fed.Message) -> Any:
    return _with(message, draw.choice(_KEYS), np.zeros(3)), False


def _a_key_less(draw: random.Random, message: fed.Message) -> Any:
    factors = dict(message.trained.factors)
    del factors[_path(draw)]
    trained = message.trained._replace(factors=factors)
    return dataclasses.replace(message, trained=trained), False


def _other_sketches(draw: random.Random, message: fed.Message) -> Any:
    sketches = draw.choice(({"kernel": np.zeros((3, 3))}, {3: 1}, None, [], {"bias": 1}))
    trained = message.trained._replace(sketches=sketches)
    return dataclasses.replace(message, trained=trained), False


def _no_trained(draw: random.Random, message: fed.Message) -> Any:
    trained = draw.choice((*_ELSE, tuple(message.trained), message.trained.factors))
    return dataclasses.replace(message, trained=trained), False


def _no_message(draw: random.Random, message: fed.Message) -> Any:
    return draw.choice((*_ELSE, dataclasses.asdict, message.trained)), False


_FORGERIES: tuple[Forgery, ...] = (
    _another_count,
    _another_client,
    _another_round,
    _another_stamp,
    _flipped_bits,
    _one_number,
    _huge_numbers,
    _another_dtype,
    _another_shape,
    _no_array,
    _another_key,
    _a_key_less,
    _other_sketches,
    _no_trained,
    _no_message,
)
