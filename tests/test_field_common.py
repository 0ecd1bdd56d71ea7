"""The common suite: every method of the field, and one as a newcomer would write it."""

import functools

import field
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import optax
import pytest

import raclora_jax as rl
from raclora_jax import methods


def toy(learning_rate, spec, *, key):
    """Sign descent on LoRA's pair, the drawn factor at a tenth of the gradient's sign."""

    def gradient(plan, gradients, pair):
        return gradients | {"drawn": 0.1 * gradients["drawn"]}

    pieces = methods.Pieces(inner=optax.scale_by_sign(), gradient=gradient)
    return methods.pair_method(learning_rate, spec, pieces, key=key)


# Drawing with threefry compiles longer than all the rest.

ROWS = field.ROWS | {
    "toy": field.Row(lambda rate, spec, key: toy(rate, spec, key=key), learning_rate=0.01)
}
run = functools.cache(lambda name: field.run(ROWS[name]))
every_method = pytest.mark.parametrize("name", ROWS)


def test_every_method_has_a_row():
    assert set(methods.__all__) - field.PARTS <= set(ROWS)


MATRICES = {"up": jnp.ones((7, 9)), "down": jnp.ones((9, 5))}


def shapes_made(name):
    """Shapes of all that a step computes, wherever in its program."""

    def loss_fn(params):
        return jnp.mean(
            (jnp.tanh(jnp.ones((16, 7)) @ params["up"]) @ params["down"]) ** 2
        )

    row = ROWS[name]
    method = row.make(0.1, rl.Spec(2), jax.random.key(0))
    state = jax.eval_shape(method.init, MATRICES)
    program = jax.make_jaxpr(lambda state: method.step(state, loss_fn))(state)

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            inside = list(jex.jaxprs_in_params(equation.params))
            for one in inside:
                yield from walk(one)
            if not inside:
                yield from (var.aval.shape for var in equation.outvars)

    return set(walk(program.jaxpr))


@every_method
def test_loss_falls(name):
    field.check_loss_falls(run(name), ROWS[name])


@every_method
def test_what_is_trained(name):
    field.check_what_is_trained(run(name), ROWS[name])


@every_method
def test_params(name):
    field.check_params(run(name), ROWS[name])


@every_method
def test_state(name):
    field.check_state(run(name), ROWS[name])


@every_method
def test_same_key_same_bits(name):
    field.check_same_key_same_bits(run(name), ROWS[name])


@pytest.mark.parametrize("name", ["lora", "lora_fa", "sora", "lora_rite", "allora"])
def test_the_pair_stays_beside_the_weight(name):
    """No array of a weight's shape is made in a step, so none of its gradient."""
    made = shapes_made(name)
    assert all(leaf.shape not in made for leaf in MATRICES.values())


@pytest.mark.parametrize("name", ["dora", "lora_pro", "full"])
def test_these_form_the_weight(name):
    made = shapes_made(name)
    assert all(leaf.shape in made for leaf in MATRICES.values())
