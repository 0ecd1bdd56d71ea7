"""One object for a run takes the steps of the parts it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import assert_same
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl

LAYERS, DIM = 3, 8
# Blocks compile in half the time of the default law, which one case has.
RUN = {"rank": 2, "learning_rate": 0.05, "key": 3, "resample_every": 2, "sketch": "block"}


def weights(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "layers": jax.random.normal(keys[0], (LAYERS, DIM, DIM)) / 3,
        "head": jax.random.normal(keys[1], (DIM, 5)) / 3,
        "bias": jax.random.normal(keys[2], (5,)) / 3,
    }


def loss_fn(params, x, y):
    x, _ = lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, params["layers"])
    return jnp.mean((x @ params["head"] + params["bias"] - y) ** 2)


def batch(seed=5):
    first, second = jax.random.split(jax.random.key(seed))
    return jax.random.normal(first, (4, DIM)), jax.random.normal(second, (4, 5))


def by_parts(params, args, steps, **options):
    """The same run, from what it is made of."""
    of_raclora = {"inner", "clip_norm", "weight_decay"} & options.keys()
    rest = {name: options.pop(name) for name in of_raclora}
    key, rate = options.pop("key"), options.pop("learning_rate")
    spec = rl.trace_spec(loss_fn, params, *args, **options)
    tx = rl.raclora(rate, spec, key=key, **rest)
    grad_fn, state = rl.value_and_grad(loss_fn, spec), tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = grad_fn(params, state, *args)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, loss = step(params, state)
    return params, state, loss


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"sketch": "orthonormal"}, True),
        ({"inner": rl.orthogonal(), "weight_decay": 0.1}, True),
        ({"clip_norm": 0.1}, False),
        ({"inner": optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9))}, False),
    ],
)
def test_the_steps_of_its_parts(options, fused):
    args, options = batch(), RUN | options
    trainer = rl.Trainer(loss_fn, weights(), *args, **options)
    assert trainer.fused == fused
    params = weights()
    state = trainer.init(params)
    for _ in range(5):
        params, state, loss = trainer.step(params, state, *args)
    assert_same((params, state, loss), by_parts(weights(), args, 5, **options), 1e-6)


def test_what_a_step_is_given_is_given_away():
    params, args = weights(), batch()
    trainer = rl.Trainer(loss_fn, params, *args, **RUN)
    state = trainer.init(params)
    trainer.step(params, state, *args)
    assert params["layers"].is_deleted()
    assert not args[0].is_deleted()


def test_aux_and_abstract_arrays():
    params, args = weights(), batch()

    def with_aux(params, x, y):
        return loss_fn(params, x, y), {"rows": len(x)}

    shapes = jax.eval_shape(lambda: (params, args))
    trainer = rl.Trainer(with_aux, shapes[0], *shapes[1], **RUN, has_aux=True)
    want = loss_fn(params, *args)
    _, _, (loss, aux) = trainer.step(params, trainer.init(params), *args)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert int(aux["rows"]) == 4


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_its_summary_says_what_moves_where(clip_norm):
    trainer = rl.Trainer(loss_fn, weights(), *batch(), **RUN, clip_norm=clip_norm)
    found = trainer.summary()
    plain = rl.summary(weights(), trainer.spec, loss_fn, *batch())
    assert found.rows == plain.rows
    if clip_norm is None:
        assert found.in_backward == ("layers",)
        assert "in a scan: 1 of 2 leaves; each as one: 'head'" in str(found)
    else:
        assert found.in_backward is None
        assert "moves too: clip_norm needs" in str(found)
    assert found.peak_bytes > 4 * sum(leaf.size for leaf in weights().values())


def test_what_it_does_not_know():
    with pytest.raises(TypeError, match="no option 'lerning_rate'; it has alpha, "):
        rl.Trainer(loss_fn, weights(), *batch(), **RUN, lerning_rate=1)
    with pytest.raises(ValueError, match="must return one real number"):
        rl.Trainer(lambda params, x, y: x @ params["head"], weights(), *batch(), **RUN)
    with pytest.raises(ValueError, match="rank must be"):
        rl.Trainer(loss_fn, weights(), *batch(), **RUN | {"rank": 0})


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_weights_and_state_stay_where_they_are(axis_type):
    mesh = jax.make_mesh((2,), ("fsdp",), (axis_type,))

    def place(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    places = {"layers": place(None, "fsdp"), "head": place("fsdp"), "bias": place()}
    with jax.set_mesh(mesh):
        args = jax.device_put(batch(), place("fsdp"))
        params = jax.device_put(weights(), places)

        trainer = rl.Trainer(loss_fn, params, *args, **RUN)
        state = trainer.init(params)
        for _ in range(3):
            params, state, loss = trainer.step(params, state, *args)
    want = by_parts(weights(), batch(), 3, **RUN)
    assert_same((params, loss), (want[0], want[2]), 1e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == places


def test_a_leaf_that_is_on_no_mesh():
    """As ``jit`` takes it, where it is not committed to a device."""
    mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,))
    params = weights()
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    params["layers"] = jax.device_put(params["layers"], place)
    trainer = rl.Trainer(loss_fn, params, *batch(), **RUN)
    params, _, loss = trainer.step(params, trainer.init(params), *batch())
    want = by_parts(weights(), batch(), 1, **RUN)
    assert_same((params, loss), (want[0], want[2]), 1e-6)
    assert params["layers"].sharding == place


def test_an_array_that_is_given_twice():
    one = jnp.ones((DIM, DIM)) / 4

    def loss(params, x):
        return jnp.mean((x @ params["a"] @ params["b"]) ** 2)

    params, (x, _) = {"a": one, "b": one}, batch()
    trainer = rl.Trainer(loss, params, x, **RUN)
    with pytest.raises(ValueError, match=r"params\['a'\] and params\['b'\] are one"):
        trainer.step(params, trainer.init(params), x)
    params = weights()
    trainer = rl.Trainer(
        lambda p, x, y, old: loss_fn(p, x, y), params, *batch(), params, **RUN
    )
    with pytest.raises(ValueError, match=r"params\['bias'\] and args\[2\]\['bias'\]"):
        trainer.step(params, trainer.init(params), *batch(), params)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(jnp.tanh(nn.Dense(7)(x)))


@pytest.mark.smoke
def test_a_train_state_steps_by_a_trainer():
    (x, y), model = batch(), Linen()

    def fresh():
        return model.init(jax.random.key(0), x)["params"]

    def loss(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    trainer = rl.Trainer(loss, fresh(), x, y, **RUN)
    state = rl.flax.TrainState.create(apply_fn=model.apply, params=fresh(), tx=trainer.tx)
    parts = rl.flax.TrainState.create(apply_fn=model.apply, params=fresh(), tx=trainer.tx)
    grad_fn = jax.jit(rl.value_and_grad(loss, trainer.spec))
    for _ in range(5):
        state, value = state.train_step(trainer, x, y)
        want, grads = grad_fn(parts.params, parts.opt_state, x, y)
        parts = parts.apply_gradients(grads=grads)
        np.testing.assert_allclose(value, want, rtol=1e-5)
    assert int(state.step) == 5
    assert_same(state.params, parts.params, 1e-6)
    other = rl.Trainer(loss, fresh(), x, y, **RUN)
    with pytest.raises(ValueError, match=r"create it with tx=trainer\.tx"):
        state.train_step(other, x, y)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


class Net(nnx.Module):
    """Layers in a scan, then what has a state besides parameters."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def layers(rngs):
            return Layer(rngs)

        self.layers = layers(rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(DIM, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )
        return self.head(self.dropout(self.norm(x)))


def net_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@pytest.mark.smoke
@pytest.mark.parametrize("clip_norm", [None, 1e3])
def test_a_module_in_place(clip_norm):
    """Fused and not: the steps of the parts, statistics and random streams too."""
    args, model, other = batch(), Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    rule = {"inner": optax.scale_by_adam(eps=0.1)}  # no quotient of rounding errors
    trainer = rl.flax.Trainer(net_loss, model, *args, **RUN, **rule, clip_norm=clip_norm)
    assert trainer.fused == (clip_norm is None)
    if trainer.fused:
        assert trainer.summary().in_backward == ("layers/linear/kernel",)
    optimizer = trainer.init(model)
    parts = rl.flax.Optimizer(other, trainer.tx)
    grad_fn = rl.flax.value_and_grad(net_loss, trainer.spec)

    @nnx.jit
    def step(model, optimizer, *args):
        loss, grads = grad_fn(model, optimizer, *args)
        optimizer.update(model, grads)
        return loss

    for _ in range(5):
        value = trainer.step(model, optimizer, *args)
        np.testing.assert_allclose(value, step(other, parts, *args), rtol=1e-5)
    assert int(optimizer.step[...]) == 5
    got, want = (nnx.to_pure_dict(nnx.state(one)) for one in (model, other))
    plain = [
        jax.tree.map(
            lambda leaf: np.asarray(leaf),
            nnx.to_pure_dict(nnx.state(one, nnx.Not(nnx.RngState))),
        )
        for one in (model, other)
    ]
    assert_same(*plain, 1e-5)
    assert got["dropout"]["rngs"]["count"] == want["dropout"]["rngs"]["count"] == 5
    trainer.summary()  # of shapes: the first step gave the module's arrays away


def test_a_module_whose_loss_is_not_finite_stays_as_it_is():
    (x, y), model = batch(), Net(nnx.Rngs(0))
    trainer = rl.flax.Trainer(net_loss, model, x, y, **RUN)
    optimizer = trainer.init(model)
    trainer.step(model, optimizer, x, y)
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    assert np.isnan(trainer.step(model, optimizer, x * jnp.nan, y))
    after = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    assert_same(after, before, 0)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_module_on_a_mesh_stays_where_it_is(clip_norm):
    mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,))
    model = nnx.Linear(DIM, 6, rngs=nnx.Rngs(0))
    places = {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()}
    for name, place in places.items():
        leaf = getattr(model, name)
        leaf.set_value(jax.device_put(leaf[...], NamedSharding(mesh, place)))
    args = batch()[0], jnp.ones((4, 6))
    trainer = rl.flax.Trainer(net_loss, model, *args, **RUN, clip_norm=clip_norm)
    optimizer = trainer.init(model)
    for _ in range(3):
        trainer.step(model, optimizer, *args)
    for name, place in places.items():
        assert getattr(model, name)[...].sharding.spec == place


def test_what_a_loss_stores_may_change_its_shape():
    class Storing(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(DIM, 5, rngs=nnx.Rngs(0))
            self.last = nnx.Variable(jnp.zeros((4, 5)))

        def __call__(self, x):
            self.last.set_value(self.linear(x))
            return self.last[...]

    (x, y), model = batch(), Storing()
    trainer = rl.flax.Trainer(net_loss, model, x, y, **RUN)
    optimizer = trainer.init(model)
    trainer.step(model, optimizer, x, y)
    trainer.step(model, optimizer, x[:2], y[:2])
    assert model.last[...].shape == (2, 5)


def test_what_a_fused_step_of_a_module_refuses():
    model, tx = Layer(nnx.Rngs(0)), rl.raclora(0.1, 2, key=0)
    step = rl.flax.fused_step(net_loss, tx)
    with pytest.raises(TypeError, match=r"takes a raclora_jax\.flax\.Optimizer"):
        step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), *batch())
    with pytest.raises(ValueError, match="make both with one tx"):
        step(model, rl.flax.Optimizer(model, rl.raclora(0.1, 2, key=0)), *batch())
    layer_args = batch()[0], jnp.ones((4, DIM))
    one, other = (
        rl.flax.Trainer(net_loss, model, *layer_args, **RUN, clip_norm=1.0)
        for _ in range(2)
    )
    with pytest.raises(ValueError, match="make both with one tx"):
        one.step(model, other.init(model), *layer_args)
    with pytest.raises(TypeError, match="nothing may stand around it"):
        rl.flax.fused_step(net_loss, optax.chain(tx))
    with pytest.raises(TypeError, match=r"flax\.Trainer takes an nnx\.Module"):
        rl.flax.Trainer(loss_fn, weights(), *batch(), **RUN)
