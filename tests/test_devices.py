"""Sketches and steps do not depend on how many devices hold the weights."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import chequered, repeat
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from raclora_jax._core import rounding

SPEC = rl.Spec(3, resample_every=2, rules=[rl.Rule("stack", batch=0)])
STEPS = 5
SPECS = {
    "kernel": PartitionSpec("rows", None),
    "stack": PartitionSpec(None, None, "rows"),
    "bias": PartitionSpec("rows"),
}


def params_on(devices: int, dtype=jnp.float32):
    """The weights, sharded over some devices."""
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("rows",), auto, devices=jax.devices()[:devices])
    tree = {
        "kernel": jnp.sin(jnp.arange(16.0 * 24)).reshape(16, 24),
        "stack": jnp.cos(jnp.arange(2.0 * 12 * 8)).reshape(2, 12, 8),
        "bias": jnp.arange(8.0) / 8,
    }
    return {
        name: jax.device_put(leaf.astype(dtype), NamedSharding(mesh, SPECS[name]))
        for name, leaf in tree.items()
    }


def stepped(params, spec=SPEC, inner=None):
    """A few steps of a quadratic, with a change of link among them."""
    tx = rl.raclora(0.05, spec, inner=inner, weight_decay=0.1, key=3)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda w: 0.3 * w + 0.1, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def test_there_are_eight():
    assert jax.device_count() == 8


@pytest.mark.parametrize("devices", [repeat(2), 8])
def test_same_sketches(devices):
    def drawn(params):
        draw = jax.jit(lambda params: rl.sample_sketch(params, SPEC, key=3, link=1))
        return jax.device_get(draw(params))

    chex.assert_trees_all_equal(drawn(params_on(devices)), drawn(params_on(1)))


INNERS = {"adam": None, "orthogonal": rl.orthogonal()}


@pytest.mark.parametrize(
    ("inner", "law"),
    chequered(INNERS, ["block", "orthonormal"]),
)
def test_same_steps(inner, law):
    spec, inner = dataclasses.replace(SPEC, sketch=law), INNERS[inner]
    alone, alone_state = stepped(params_on(1), spec, inner)
    spread, spread_state = stepped(params_on(8), spec, inner)
    assert not spread["kernel"].sharding.is_fully_replicated
    for path, sketch in alone_state.sketches.values.items():
        np.testing.assert_array_equal(spread_state.sketches.values[path], sketch)
    chex.assert_trees_all_close(jax.device_get(spread), jax.device_get(alone), atol=2e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_sharded_leaves_share_a_draw_and_nothing_else(rank):
    """Three leaves of one kind under three shardings: nothing is sent for a sketch."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    shardings = {
        "rows": PartitionSpec("x", None),
        "cols": PartitionSpec(None, "x"),
        "stack": PartitionSpec("x", None, None),
    }
    spec = rl.Spec(rank, resample_every=2, rules=[rl.Rule("stack", batch=0)])
    shapes = {"rows": (32, 48), "cols": (32, 48), "stack": (8, 32, 48)}
    params = {
        name: jax.device_put(jnp.ones(shapes[name]), NamedSharding(mesh, sharding))
        for name, sharding in shardings.items()
    }
    sketches = rl.sample_sketch(params, spec, key=0)
    grads = rl.project(jax.tree.map(jnp.zeros_like, params), sketches, spec)
    tx = rl.raclora(0.1, spec, key=0)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state

    # Gradients replicated: what is sent is sent for the sketches.
    everywhere = NamedSharding(mesh, PartitionSpec())
    grads = jax.device_put(jax.device_get(grads), everywhere)
    # Inside jit nothing is known of where params live, so no array of the state is spread
    # over mesh axes that only its leaf has, and none is gathered.
    state = jax.jit(tx.init)(params)
    text = step.lower(params, state, grads).compile().as_text()
    sent = re.findall(r" (all-\w+|collective-permute|reduce-scatter)\(", text)
    assert not sent, sent


@pytest.mark.parametrize("devices", [2, 8])
def test_rounding_draws_the_same(devices):
    def rounded(weight):
        key = jax.random.key(5)
        return jax.jit(lambda x: rounding.stochastic(x, jnp.bfloat16, key))(weight)

    spread, alone = (rounded(params_on(count)["kernel"]) for count in (devices, 1))
    np.testing.assert_array_equal(np.asarray(spread), np.asarray(alone))
    assert np.any(np.asarray(alone) != np.asarray(params_on(1)["kernel"]))
