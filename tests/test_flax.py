"""One canonical path, and so one sketch, for every Flax view of one model."""

import warnings

import chex
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
from raclora_jax._core import paths
from raclora_jax.flax import to_tree

pytestmark = pytest.mark.smoke

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


class Noisy(nnx.Module):
    """A module whose call changes statistics and a random stream."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 7, rngs=rngs)
        self.norm = nnx.BatchNorm(7, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.drop(self.norm(self.first(x))))


def noisy_loss(model, x):
    return jnp.mean(jnp.sin(model(x)))


def test_nnx_in_place_takes_the_same_steps():
    x = jax.random.normal(jax.random.key(1), (16, 6))
    # Not Adam: the bias before a norm has a gradient of rounding errors only.
    tx = rl.raclora(0.5, SPEC, inner=optax.identity(), key=0)
    ours, plain = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    ours_state = tx.init(to_tree(ours)[0])
    optimizer = nnx.Optimizer(plain, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, opt_state, x):
        grad_fn = rl.flax.value_and_grad(noisy_loss, SPEC)
        loss, grads = grad_fn(model, opt_state, x)
        updates, opt_state = tx.update(grads, opt_state, to_tree(model)[0])
        rl.flax.apply_updates(model, updates)
        return loss, opt_state

    @nnx.jit
    def dense_step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(noisy_loss)(model, x)
        optimizer.update(model, grads)
        return loss

    for _ in range(5):  # two links begin meanwhile
        loss, ours_state = step(ours, ours_state, x)
        expected = dense_step(plain, optimizer, x)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    mine, theirs = (jax.tree.leaves(nnx.state(net, nnx.Not(nnx.RngState)))
                    for net in (ours, plain))  # fmt: skip
    for got, want in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert ours.drop.rngs.count[...] == plain.drop.rngs.count[...] == 5


def test_nnx_in_place_returns_aux():
    model = Noisy(nnx.Rngs(0))
    state = rl.raclora(0.05, SPEC, key=0).init(to_tree(model)[0])

    def loss(model, x):
        y = model(x)
        return jnp.mean(y**2), {"shape": y.shape, "sum": y.sum()}

    grad_fn = rl.flax.value_and_grad(loss, SPEC, has_aux=True)
    (value, aux), grads = grad_fn(model, state, jnp.ones((4, 6)))
    assert aux["shape"] == (4, 5)
    assert jnp.isfinite(aux["sum"] + value)
    assert isinstance(grads["first"]["kernel"], rl.Factor)
    with pytest.raises(TypeError, match=r"nnx.Module, got dict"):
        grad_fn(to_tree(model)[0], state, jnp.ones((4, 6)))
    with pytest.raises(TypeError, match=r"raclora_jax.apply_updates"):
        rl.flax.apply_updates({}, {})


def test_linen_train_state_steps_in_factor_form():
    params, x = linen_variables()["params"], jnp.ones((4, 6))

    def loss(params, x):
        return jnp.mean(jnp.sin(LinenNet().apply({"params": params}, x)))

    tx = rl.raclora(0.05, SPEC, weight_decay=0.1, key=0)
    apply_fn = LinenNet().apply
    ours = rl.flax.TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    plain = TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    grad_fn = jax.jit(rl.value_and_grad(loss, SPEC))
    for _ in range(5):
        _, grads = grad_fn(ours.params, ours.opt_state, x)
        ours = ours.apply_gradients(grads=grads)
        plain = plain.apply_gradients(grads=jax.grad(loss)(plain.params, x))
    assert int(ours.step) == 5
    for got, want in zip(
        jax.tree.leaves(ours.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind", [TrainState, rl.flax.TrainState])
@pytest.mark.parametrize("box", [dict, flax.core.FrozenDict])
def test_a_train_state_hands_8_bit_scales_past_the_optimizer(kind, box):
    """Flax's own and ours: ``_overwrite_with_gradient`` becomes what comes for it."""
    params = linen_variables()["params"]
    scales = {"kernel_scale": jnp.full(1, 2.0)}
    whole = box({"params": params, "_overwrite_with_gradient": scales})
    tx = rl.raclora(0.05, SPEC, key=0)
    state = kind.create(apply_fn=None, params=whole, tx=tx)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    want = optax.apply_updates(params, updates)
    new = {"kernel_scale": jnp.full(1, 3.0)}
    state = state.apply_gradients(
        grads=box({"params": grads, "_overwrite_with_gradient": new})
    )
    chex.assert_trees_all_equal(
        flax.core.unfreeze(dict(state.params)),
        {"params": flax.core.unfreeze(want), "_overwrite_with_gradient": new},
    )
    assert int(state.step) == 1


class Headed(nnx.Module):
    """A body and a head of a variable type of its own."""

    class Head(nnx.Param):
        pass

    def __init__(self, rngs):
        self.body = nnx.Linear(6, 7, rngs=rngs)
        self.head = nnx.Linear(7, 5, rngs=rngs)
        self.head.kernel = self.Head(self.head.kernel[...])
        self.norm = nnx.BatchNorm(7, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(jnp.tanh(self.body(x))))


@pytest.mark.parametrize("wrt", [Headed.Head, nnx.PathContains("head")])
def test_the_optimizer_of_a_part(wrt):
    """As in dense form with ``nnx.DiffState``; the rest of the module stands still."""
    x = jax.random.normal(jax.random.key(1), (16, 6))
    models = [Headed(nnx.Rngs(0)) for _ in range(2)]
    optimizers = [
        rl.flax.Optimizer(m, rl.raclora(0.3, 2, key=3), wrt=wrt) for m in models
    ]
    body = jnp.array(models[0].body.kernel[...])
    grad_fn = rl.flax.value_and_grad(noisy_loss, 2)
    dense_fn = nnx.value_and_grad(noisy_loss, argnums=nnx.DiffState(0, wrt))
    for _ in range(3):
        loss, grads = grad_fn(models[0], optimizers[0], x)
        assert isinstance(grads["head"]["kernel"], rl.Factor)
        assert "body" not in grads
        optimizers[0].update(models[0], grads)
        expected, dense = dense_fn(models[1], x)
        optimizers[1].update(models[1], dense)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(models[0].body.kernel[...], body)
    for got, want in zip(*(jax.tree.leaves(nnx.state(m)) for m in models), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def steps_in_place(how):
    """Some steps of the noisy net by ``flax.Optimizer``, its losses and its weights."""
    model = Noisy(nnx.Rngs(0))
    # Not Adam: the bias before a norm has a gradient of rounding errors only.
    rule = rl.raclora(0.5, SPEC, inner=optax.identity(), weight_decay=0.1, key=3)
    optimizer = rl.flax.Optimizer(model, optax.chain(rule))
    grad_fn = {
        "factor": rl.flax.value_and_grad(noisy_loss, SPEC),
        "dense": lambda model, _, x: nnx.value_and_grad(noisy_loss)(model, x),
    }[how.split()[0]]

    def step(model, optimizer, x):
        loss, grads = grad_fn(model, optimizer, x)
        optimizer.update(model, grads)
        return loss

    x = jax.random.normal(jax.random.key(1), (16, 6))
    losses = []
    if how.endswith("cached"):
        run = nnx.cached_partial(nnx.jit(step), model, optimizer)
        losses = [float(run(x)) for _ in range(5)]
    elif how.endswith("split"):
        graph, state = nnx.split((model, optimizer))

        @jax.jit
        def pure(state, x):
            model, optimizer = nnx.merge(graph, state)
            loss = step(model, optimizer, x)
            return loss, nnx.state((model, optimizer))

        for _ in range(5):
            loss, state = pure(state, x)
            losses.append(float(loss))
        nnx.update((model, optimizer), state)
    else:
        run = nnx.jit(step)
        losses = [float(run(model, optimizer, x)) for _ in range(5)]
    assert int(optimizer.step[...]) == 5
    return losses, jax.device_get(to_tree(model)[0])


@pytest.mark.parametrize("how", ["dense", "factor cached", "factor split"])
def test_the_optimizer_takes_the_same_steps(how):
    losses, weights = steps_in_place(how)
    expected, expected_weights = steps_in_place("factor")
    assert losses[0] != losses[-1]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        weights,
        expected_weights,
    )


def test_the_optimizer_refuses():
    model = nnx_net()
    optimizer = rl.flax.Optimizer(model, rl.raclora(0.1, SPEC, key=0))
    with pytest.raises(ValueError, match="'first/bias' has no gradient"):
        optimizer.update(model, {"first": {"kernel": jnp.ones((6, 7))}})
    with pytest.raises(TypeError, match=r"flax\.Optimizer takes an nnx\.Module"):
        rl.flax.Optimizer(linen_variables(), rl.raclora(0.1, SPEC, key=0))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


def in_turn(blocks, x):
    for block in blocks:
        x = nnx.remat(lambda block, x: block(x))(block, x)
    return x


def stacked(blocks, x):
    scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return scan(nnx.remat(lambda x, block: block(x)))(x, blocks)


def blocks_in_turn():
    return nnx.List([Block(nnx.Rngs(seed)) for seed in range(2)])


def blocks_stacked():
    make = nnx.vmap(lambda key: Block(nnx.Rngs(key)), in_axes=0, out_axes=0)
    return make(jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize(
    ("blocks", "run"), [(blocks_in_turn, in_turn), (blocks_stacked, stacked)]
)
def test_remat_of_nnx_forms_no_gradient(blocks, run):
    """A module comes out of it with all its leaves, unchanged; no leaf is formed."""
    tree, restore = to_tree(blocks())

    def loss(params, x):
        return jnp.mean(run(restore(params), x) ** 2)

    x = jax.random.normal(jax.random.key(1), (4, 6))
    spec = rl.trace_spec(loss, tree, x, rank=2)
    assert {row.mode for row in rl.summary(tree, spec).rows} == {"lowrank", "dense"}
    state = rl.raclora(0.1, spec, key=0).init(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, grads = rl.value_and_grad(loss, spec)(tree, state, x)
    sketches = rl.sample_sketch(tree, spec, key=0)
    expected = rl.project(jax.grad(loss)(tree, x), sketches, spec)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)
