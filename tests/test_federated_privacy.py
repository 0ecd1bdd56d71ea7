"""Clip and noise on the clients' factors, and what a run of it spends."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from raclora_jax import federated as fed


def test_privacy_clips_each_client_and_adds_noise():
    strategy = fed.raclora(2)
    state = fed.init(strategy, {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}, key=0)
    stamp, rng = fed.stamp_of(strategy, state.base_params), np.random.default_rng(0)

    def message(client):
        draw = jax.tree.map(lambda a: rng.normal(size=a.shape), state.factors)
        return fed.Message(fed.Trained(draw, {}), client, 0, 1 + client, stamp)

    messages = [message(client) for client in range(5)]
    flat = [np.asarray(ravel_pytree(m.trained)[0]) for m in messages]
    clipped = [v * min(1, 2.0 / np.linalg.norm(v)) for v in flat]
    assert any(np.linalg.norm(v) > 2.0 for v in flat)

    def mean(noise, key=0, take=8):
        privacy = fed.Privacy(clip=2.0, noise_multiplier=noise, take=take, key=key)
        step, _ = fed.aggregate(strategy, state, messages, privacy=privacy)
        return np.asarray(ravel_pytree(step.trained)[0])

    quiet = mean(0.0)
    # Sums in float32, of numbers of size 1.
    eps = float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(quiet, sum(clipped) / 8, atol=4 * eps)
    noise = np.concatenate([mean(1.5, key) - quiet for key in range(40)])
    want = 1.5 * 2.0 / 8
    assert abs(noise.std() / want - 1) < 4 / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 4 * want / np.sqrt(noise.size)


def test_epsilon_of_the_gaussian_mechanism():
    """All clients in one round: between the exact value and the classical bound."""
    privacy = fed.Privacy(clip=1.0, noise_multiplier=8.0, take=50, key=0)
    spent = fed.epsilon(privacy, clients=50, rounds=1, delta=1e-5)
    sigma = 8.0 / 2
    assert 0.8 < spent < np.sqrt(2 * np.log(1.25e5)) / sigma * 1.3
    sampled = fed.epsilon(privacy, clients=5000, rounds=1, delta=1e-5)
    assert sampled < spent / 5
