"""Stacks cut into the parts of many leaves, and states of many leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optax_contract import compilations

import raclora_jax as rl
from raclora_jax._core.parts import cut


@pytest.mark.parametrize("sizes", [(3,), (1, 1, 1), (2, 4, 1), (5, 1, 2, 2)])
def test_parts_are_consecutive(sizes):
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(sum(sizes), 2, 3)))
    want = np.split(np.asarray(stack), np.cumsum(sizes)[:-1])
    never = jnp.asarray(False)

    def parts(stack, never):
        return cut(stack, sizes, never)

    both = jax.vmap(parts, (0, None))(jnp.stack([stack, 2 * stack]), never)
    for got in (parts(stack, never), jax.jit(parts)(stack, never), [b[0] for b in both]):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other)


def test_keys_are_parts_too():
    keys = jax.random.split(jax.random.key(0), 4)
    for index, part in enumerate(cut(keys, [1, 1, 1, 1], jnp.asarray(False))):
        assert part.shape == (1,)
        np.testing.assert_array_equal(
            jax.random.key_data(part[0]), jax.random.key_data(keys[index])
        )


def test_on_a_cpu_slices_are_one_kernel():
    """Places that a program cannot see: its slices differ in nothing."""
    stack = jax.ShapeDtypeStruct((6, 2, 3), "float32")
    never = jax.ShapeDtypeStruct((), "bool")
    lowered = jax.jit(lambda stack, never: cut(stack, [1] * 6, never)).lower(stack, never)
    text = lowered.compile().as_text()
    assert text.count(" conditional(") == 1
    assert "slice={[" not in text


def test_a_state_of_many_leaves_compiles_no_program():
    """What one leaf needs is compiled; a tree of forty needs nothing more."""

    def tree(count):
        return {f"layer{i}": {"kernel": jnp.ones((11, 7))} for i in range(count)}

    tx = rl.raclora(0.1, 2, key=0)
    tx.init(tree(1))
    with compilations() as heard:
        state = tx.init(tree(40))
    assert not heard
    assert len(state.sketches.values) == 40
