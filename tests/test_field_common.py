"""The common suite: every method of the field, and one as a newcomer would write it."""

import functools

import field
import optax
import pytest

from raclora_jax import methods
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces


def toy(learning_rate, spec, *, key):
    """Sign descent on LoRA's pair, the drawn factor at a tenth of the gradient's sign."""

    def gradient(plan, gradients, pair):
        return gradients | {"drawn": 0.1 * gradients["drawn"]}

    pieces = Pieces(inner=optax.scale_by_sign(), gradient=gradient)
    return pair_method(learning_rate, spec, pieces, key=key)


# Drawing with threefry compiles longer than all the rest.
pytestmark = pytest.mark.usefixtures("quick_draws")

ROWS = field.ROWS | {
    "toy": field.Row(lambda rate, spec, key: toy(rate, spec, key=key), learning_rate=0.01)
}
run = functools.cache(lambda name: field.run(ROWS[name]))
every_method = pytest.mark.parametrize("name", ROWS)


def test_every_method_has_a_row():
    assert set(methods.__all__) - {"Method"} <= set(ROWS)


@every_method
def test_loss_falls(name):
    field.check_loss_falls(run(name))


@every_method
def test_what_is_trained(name):
    field.check_what_is_trained(run(name), ROWS[name])


@every_method
def test_params(name):
    field.check_params(run(name))


@every_method
def test_state(name):
    field.check_state(run(name), ROWS[name])


@every_method
def test_same_key_same_bits(name):
    field.check_same_key_same_bits(run(name), ROWS[name])
