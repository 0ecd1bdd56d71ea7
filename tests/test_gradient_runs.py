"""Whole runs in factor form and in dense form are one run, link by link."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import (
    KEY,
    RULES,
    assert_same,
    fallbacks,
    gradient,
    network,
    plain,
    squares,
)
from jax import lax

import raclora_jax as rl


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("cache", [True, False])
def test_the_sketch_is_that_of_the_update(cache):
    """Link by link: before the first update, within a link, and after its last step."""
    spec = rl.Spec(2, alpha=3.0, resample_every=2, cache=cache, rules=RULES)
    params, x, y = network()
    tx = optax.chain(optax.identity(), rl.raclora(0.1, spec, key=KEY))

    @jax.jit
    def step(params, state):
        result = rl.value_and_grad(squares, spec)(params, state, x, y)
        updates, state = tx.update(result[1], state, params)
        return result, rl.apply_updates(params, updates), state

    state = tx.init(params)
    for count in range(5):
        expected = plain(params, spec, x, y, link=count // 2)
        result, params, state = step(params, state)
        assert_same(result, expected, 1e-13, f"step {count}")
        assert isinstance(result[1]["steps"], optax.MaskedNode)


def test_other_sketches_and_scalings():
    head = rl.Rule("head", rank=3, alpha=1.0, side="left", sketch="rademacher")
    spec = rl.Spec(2, alpha=3.0, sketch="coordinate", rules=(*RULES, head))
    params, x, y = network()
    ours = jax.jit(lambda *args: gradient(squares, args[0], spec, *args[1:]))(
        params, x, y
    )
    assert_same(ours, plain(params, spec, x, y), 1e-13)


VOCABULARY, WIDTH, HEADS, SIZE, LAYERS = 12, 8, 2, 4, 2
STEPS, EVERY = 300, 25
MODEL = {
    "table": (VOCABULARY, WIDTH),
    "positions": (6, WIDTH),
    "layers": {
        "norm": (LAYERS, WIDTH),
        "qkv": (LAYERS, WIDTH, 3, HEADS, SIZE),
        "out": (LAYERS, HEADS, SIZE, WIDTH),
        "up": (LAYERS, WIDTH, 2 * WIDTH),
        "bias": (LAYERS, 2 * WIDTH),
        "down": (LAYERS, 2 * WIDTH, WIDTH),
    },
    "norm": (WIDTH,),
}
MODEL_RULES = (
    rl.Rule("positions", mode="frozen"),
    rl.Rule("layers/(norm|bias)", mode="dense"),
    rl.Rule("layers/qkv", batch=0, rows=1),
    rl.Rule("layers/out", batch=0, rows=(1, 2)),
    rl.Rule("layers/(up|down)", batch=0),
)


def decoder(params, tokens):
    """Next-token loss of a small decoder: scanned, rematerialised, tied at both ends."""

    def rms(h, scale):
        return h * scale / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)

    def layer(h, p):
        z = rms(h, 1 + p["norm"])
        q, k, v = (jnp.einsum("td,dhk->thk", z, p["qkv"][:, i]) for i in range(3))
        scores = jnp.einsum("thk,shk->hts", q, k) / SIZE**0.5
        scores = jnp.where(np.tri(len(h), dtype=bool), scores, -1e9)
        mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(scores), v)
        h = h + jnp.einsum("thk,hkd->td", mixed, p["out"])
        hidden = jax.nn.gelu(rms(h, 1.0) @ p["up"] + p["bias"])
        return h + hidden @ p["down"], None

    def one(tokens):
        h = params["table"][tokens[:-1]] + params["positions"]
        h, _ = lax.scan(jax.checkpoint(layer), h, params["layers"])
        logits = rms(h, 1 + params["norm"]) @ params["table"].T
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=1)
        )

    return jnp.mean(jax.vmap(one)(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_three_hundred_steps_of_a_decoder(side):
    """Factor form and dense form end at the same weights, twelve links later."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(0.3 * rng.normal(size=shape)),
        MODEL,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    spec = rl.Spec(2, side=side, resample_every=EVERY, rules=MODEL_RULES)
    tx = optax.chain(rl.raclora(0.01, spec, weight_decay=0.01, key=KEY))
    start = rng.integers(0, VOCABULARY, (STEPS, 4, 1))
    # Sequences with a rule to learn: every token is the last one plus 5.
    tokens = jnp.asarray((start + 5 * np.arange(7)) % VOCABULARY)

    def factor_step(carry, batch):
        params, state = carry
        value, grads = rl.value_and_grad(decoder, spec)(params, state, batch)
        updates, state = tx.update(grads, state, params)
        return (rl.apply_updates(params, updates), state), value

    def dense_step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(decoder)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def scanned(step):
        carry = params, tx.init(params)
        return jax.jit(lambda carry: lax.scan(step, carry, tokens))(carry)

    ((ours, our_state), losses), messages = fallbacks(scanned, factor_step)
    (theirs, their_state), plain_losses = scanned(dense_step)
    assert messages == []
    assert losses[-1] < 0.5 * losses[0]
    assert int(our_state[0].count) == STEPS
    assert_same(losses, plain_losses, 1e-10)
    assert_same(ours, theirs, 1e-10)
    assert_same(our_state[0].inner_state, their_state[0].inner_state, 1e-8)
    assert_same(ours["positions"], params["positions"], 0)
