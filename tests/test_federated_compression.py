"""Compressed gradients: what is sent, what the server makes of it, and the floors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raclora_jax as rl
from raclora_jax import federated as fed

ALL = {
    "qgd": fed.qgd(0.1),
    "marina": fed.marina(0.1, probability=0.1),
    "ef21": fed.ef21(0.1),
}
CLIENTS = 10


@pytest.fixture(autouse=True)
def _float64():
    """Gaps far below float32's resolution; the flag is restored after."""
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def message_of(compression, grads, memory, round=1, client=0, full=False):
    return fed.compress(
        compression, grads, memory, full=full, client=client, round=round, key=3
    )


def test_top_k_sends_the_largest_of_what_is_missing():
    grads, memory = draw(7, 5), draw(7, 5, seed=1)
    sent, after = message_of(fed.ef21(0.2), jnp.asarray(grads), jnp.asarray(memory))
    missing = (grads - memory).ravel()
    largest = np.argsort(-np.abs(missing))[:7]
    assert set(np.asarray(sent.indices)) == set(largest)
    want = memory.ravel().copy()
    want[largest] = grads.ravel()[largest]
    np.testing.assert_allclose(np.asarray(after).ravel(), want, rtol=1e-14)


def test_rand_k_is_right_on_average():
    grads = jnp.asarray(draw(6, 4))
    run = jax.jit(lambda round: message_of(fed.qgd(0.25), grads, grads, round)[0])
    count, total, square = 2000, 0.0, 0.0
    for sent in [run(round) for round in range(count)]:
        assert len(set(np.asarray(sent.indices).tolist())) == 6
        whole = np.zeros(24)
        whole[np.asarray(sent.indices)] = np.asarray(sent.values)
        total, square = total + whole, square + whole**2
    deviation = np.sqrt((square / count - (total / count) ** 2) / count)
    np.testing.assert_array_less(np.abs(total / count - np.ravel(grads)), 4.5 * deviation)
    # E |C(x)|^2 = (omega + 1) |x|^2 with omega + 1 = size / k.
    assert abs(square.sum() / count / (4 * float((grads**2).sum())) - 1) < 0.1


def test_estimates_follow_their_recursions():
    grads = [draw(CLIENTS, 6, 4, seed=seed) for seed in range(3)]
    for name, compression in ALL.items():
        memory = known = jnp.zeros((CLIENTS, 6, 4))
        server = jnp.zeros((6, 4))
        for round, now in enumerate(grads):
            full = bool(fed.is_full(compression, round=round, key=3))
            sent, after = jax.vmap(
                lambda g, m, c, full=full, round=round, how=compression: fed.compress(
                    how, g, m, full=full, client=c, round=round, key=3
                )
            )(jnp.asarray(now), memory, jnp.arange(CLIENTS))
            parts = (
                np.asarray(sent)
                if full
                else np.stack(
                    [whole(s, c) for c, s in ((c, sent) for c in range(CLIENTS))]
                )
            )
            server = fed.estimate(compression, server, sent, full=full)
            fresh = full or name == "qgd"
            known = parts if fresh else known + parts
            np.testing.assert_allclose(server, known.mean(axis=0), atol=1e-13)
            memory = after
        if name == "ef21":
            np.testing.assert_allclose(memory, known, atol=1e-13)


def whole(sent, client):
    flat = np.zeros(24)
    flat[np.asarray(sent.indices[client])] = np.asarray(sent.values[client])
    return flat.reshape(6, 4)


def test_clients_draw_apart_and_the_coin_is_shared():
    grads = jnp.asarray(draw(6, 4))
    own = [
        np.asarray(message_of(ALL["qgd"], grads, grads, client=c)[0].indices)
        for c in range(8)
    ]
    assert len({tuple(indices) for indices in own}) > 4
    how = fed.marina(0.1, probability=0.3)
    coins = [bool(fed.is_full(how, round=r, key=3)) for r in range(1, 400)]
    assert abs(np.mean(coins) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 399)
    assert not fed.is_full(fed.ef21(0.1), round=1, key=3)


def test_bytes_of_a_compressed_message():
    grads = jnp.zeros((20, 10), jnp.float32)
    sent, _ = message_of(fed.ef21(0.1), grads, grads)
    assert fed.nbytes(sent) == 20 * (4 + 4)
    assert fed.nbytes(message_of(fed.ef21(0.1), grads, grads, full=True)[0]) == 800


@functools.cache
def final_gap(name):
    """Least squares on ten clients that disagree: the gap after 4000 links of rank 2."""
    compression = ALL[name]
    x = jnp.asarray(draw(CLIENTS, 20, 16))
    y = jnp.asarray(draw(CLIENTS, 20, 8, seed=1) + np.arange(CLIENTS)[:, None, None])
    hessian = jnp.einsum("jni,jnk->ik", x, x) / (CLIENTS * 20)
    best = jnp.linalg.solve(hessian, jnp.einsum("jni,jno->io", x, y) / (CLIENTS * 20))
    rate = 0.2 / jnp.linalg.eigvalsh(hessian)[-1]
    spec = rl.Spec(2, side="left")
    ids = jnp.arange(CLIENTS)

    def gap(W):
        return jnp.sum((W - best) * (hessian @ (W - best))) / 2

    def link(carry, round):
        W, memory, known = carry
        grads = jnp.einsum("jni,jno->jio", x, x @ W - y) / 20

        def exchange(full):
            def send(grad, memory, client):
                return fed.compress(
                    compression,
                    grad,
                    memory,
                    full=full,
                    client=client,
                    round=round,
                    key=3,
                )

            sent, after = jax.vmap(send)(grads, memory, ids)
            return after, fed.estimate(compression, known, sent, full=full)

        full = fed.is_full(compression, round=round, key=3)
        memory, known = jax.lax.cond(
            full, lambda: exchange(True), lambda: exchange(False)
        )
        sketch = rl.sample_sketch(W, spec, key=5, link=round)
        step = rl.lift(rl.project(known, sketch, spec), sketch, W, spec)
        return (W - rate * step, memory, known), None

    start = jnp.zeros((16, 8)), jnp.zeros((CLIENTS, 16, 8)), jnp.zeros((16, 8))
    run = jax.jit(lambda start: jax.lax.scan(link, start, jnp.arange(4000))[0][0])
    return float(gap(run(start)) / gap(start[0]))


@pytest.mark.slow
def test_marina_and_ef21_have_no_floor():
    assert final_gap("marina") < 1e-10
    assert final_gap("ef21") < 1e-10
    assert final_gap("qgd") > 1e-6


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_shares_are_checked(share):
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        fed.qgd(share)
    with pytest.raises(ValueError, match="probability must be above 0 and at most 1"):
        fed.marina(0.1, probability=share)


def stacked_of(compression, full=False):
    grads = jnp.asarray(draw(3, 6, 4))
    return jax.vmap(
        lambda grad, client: message_of(
            compression, {"kernel": grad}, {"kernel": 0 * grad}, client=client, full=full
        )[0]
    )(grads, jnp.arange(3))


def test_what_no_client_can_have_sent_is_refused_by_name():
    known = {"kernel": jnp.zeros((6, 4))}
    sent = stacked_of(ALL["ef21"])
    values, indices = map(np.array, sent["kernel"])
    for place in (-1, 24, 2**31 - 1):
        wrong = indices.copy()
        wrong[2, 1] = place
        with pytest.raises(ValueError, match="'kernel': message 2 of the stack"):
            fed.estimate(
                ALL["ef21"], known, {"kernel": fed.Sparse(values, wrong)}, full=False
            )
    values[1, 0] = np.nan
    with pytest.raises(ValueError, match="'kernel': message 1 of the stack"):
        fed.estimate(
            ALL["qgd"], known, {"kernel": fed.Sparse(values, indices)}, full=False
        )
    with pytest.raises(ValueError, match=r"expected \(clients, k\) of both"):
        fed.estimate(
            ALL["qgd"], known, {"kernel": fed.Sparse(indices[0], indices)}, full=False
        )
    for full in (True, False):
        with pytest.raises(ValueError, match=f"full={not full} and the messages are"):
            fed.estimate(ALL["ef21"], known, stacked_of(ALL["ef21"], full), full=not full)
    with pytest.raises(ValueError, match="differ in 'bias'"):
        fed.estimate(ALL["qgd"], known | {"bias": jnp.zeros(3)}, sent, full=False)
