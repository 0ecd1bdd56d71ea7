"""One canonical path, and so one sketch, for every Flax view of one model."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import raclora_jax as rl
from raclora_jax import paths
from raclora_jax.flax import to_tree

SPEC = rl.Spec(2, resample_every=2)


class LinenNet(nn.Module):
    """Names as the nnx net below has them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(7, name="first")(x))
        return nn.Dense(5, name="second")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 7, rngs=rngs)
        self.norm = nnx.BatchNorm(7, use_scale=False, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def linen_variables():
    return LinenNet().init(jax.random.key(0), jnp.ones((1, 6)))


def nnx_net():
    """The nnx net with the weights of the linen one."""
    net = NnxNet(nnx.Rngs(0))
    _, restore = to_tree(net)
    return restore(to_tree(linen_variables())[0])


def boxed(variables):
    def box(leaf):
        return nn.Partitioned(leaf, names=(None,) * leaf.ndim)

    return jax.tree.map(box, variables)


VIEWS = {
    "params": lambda: linen_variables()["params"],
    "frozen params": lambda: flax.core.freeze(linen_variables()["params"]),
    "boxed params": lambda: boxed(linen_variables()["params"]),
    "nnx.State": lambda: nnx.state(nnx_net(), nnx.Param),
    "nnx pure dict": lambda: nnx.to_pure_dict(nnx.state(nnx_net(), nnx.Param)),
}
WHOLE_VIEWS = {
    **VIEWS,
    "variables": linen_variables,
    "frozen variables": lambda: flax.core.freeze(linen_variables()),
    "boxed variables": lambda: boxed(linen_variables()),
    "nnx.Module": nnx_net,
    "nnx.State with statistics": lambda: nnx.state(nnx_net()),
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_the_same_paths_and_sketches(view):
    plain = linen_variables()["params"]
    names = ["first/bias", "first/kernel", "second/bias", "second/kernel"]
    leaves, _ = paths.flatten(VIEWS[view]())
    assert sorted(leaves) == names
    drawn, _ = paths.flatten(rl.sample_sketch(VIEWS[view](), SPEC, key=3, link=4))
    expected, _ = paths.flatten(rl.sample_sketch(plain, SPEC, key=3, link=4))
    assert drawn.keys() == expected.keys() == {"first/kernel", "second/kernel"}
    for path, sketch in expected.items():
        np.testing.assert_array_equal(drawn[path], sketch)


@pytest.mark.parametrize("view", WHOLE_VIEWS)
def test_to_tree_gives_one_plain_tree_and_the_way_back(view):
    model = WHOLE_VIEWS[view]()
    tree, restore = to_tree(model)
    expected = linen_variables()["params"]
    assert type(tree) is dict
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    moved = restore(jax.tree.map(lambda leaf: leaf + 1, tree))
    assert type(moved) is type(model)
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, old + 1),
        to_tree(moved)[0],
        expected,
    )
    # What came in is not touched, and what is no parameter comes back.
    jax.tree.map(np.testing.assert_array_equal, to_tree(model)[0], expected)
    if view == "nnx.Module":
        np.testing.assert_array_equal(moved.norm.mean[...], model.norm.mean[...])
    if view.startswith("boxed"):
        kernel = dict(dict(moved).get("params", moved))["first"]["kernel"]
        assert kernel.names == (None, None)


def test_to_tree_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"TrainState pass \.params"):
        to_tree(3.0)
    _, restore = to_tree({"first": {"kernel": jnp.zeros((6, 7))}})
    with pytest.raises(ValueError, match=r"'first/kernel'.*\(6, 7\).*\(7, 6\)"):
        restore({"first": {"kernel": jnp.zeros((7, 6))}})
    with pytest.raises(ValueError, match=r"'second'.*expected no leaf"):
        restore({"first": {"kernel": jnp.zeros((6, 7))}, "second": jnp.zeros(3)})


def loss_of(apply):
    x = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6)
    y = jnp.cos(jnp.arange(20.0)).reshape(4, 5)
    return lambda params: jnp.mean((apply(params, x) - y) ** 2)


def test_train_state_and_nnx_optimizer_take_the_same_steps():
    variables = linen_variables()
    tx = rl.raclora(0.05, SPEC, key=7)
    loss = loss_of(lambda params, x: LinenNet().apply({"params": params}, x))

    linen = TrainState.create(apply_fn=None, params=variables["params"], tx=tx)
    plain, plain_state = variables["params"], tx.init(variables["params"])
    frozen = flax.core.freeze(variables["params"])
    frozen_state = tx.init(frozen)
    net = nnx_net()
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    nnx_loss = loss_of(lambda net, x: net(x))
    for _ in range(5):  # two link changes
        grads = jax.grad(loss)(plain)
        updates, plain_state = tx.update(grads, plain_state, plain)
        updates_frozen, frozen_state = tx.update(
            flax.core.freeze(grads), frozen_state, frozen
        )
        plain = optax.apply_updates(plain, updates)
        frozen = optax.apply_updates(frozen, updates_frozen)
        linen = linen.apply_gradients(grads=jax.grad(loss)(linen.params))
        optimizer.update(net, nnx.grad(nnx_loss)(net))
    assert loss(plain) < loss(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, linen.params, plain)
    jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(frozen), plain)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5
        ),
        to_tree(net)[0],
        plain,
    )


def test_nnx_lists_and_indices():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs) for _ in range(2)])

    tree, restore = to_tree(Stack(nnx.Rngs(0)))
    leaves, _ = paths.flatten(tree)
    assert "layers/1/kernel" in leaves
    assert restore(tree).layers[1].kernel.shape == (6, 5)
