"""Where state and factors live: beside their leaves, and said so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from helpers import compiled_once
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import raclora_jax as rl
from raclora_jax._core.sharding import auto_axes, sharding_of
from raclora_jax.flax import to_tree
from raclora_jax.sharding import factor_shardings, state_shardings

KINDS = [AxisType.Auto, AxisType.Explicit]
SPEC = rl.Spec(2, resample_every=3, rules=[rl.Rule("stack", batch=0)])


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), (kind,) * 2)


def params_on(mesh):
    specs = {
        "both": ((16, 32), P("fsdp", "tp")),
        "rows": ((32, 16), P("fsdp", None)),
        "pair": ((32, 16), P(("fsdp", "tp"), None)),
        "stack": ((4, 8, 16), P("fsdp", None, "tp")),
        "bias": ((16,), P("tp")),
    }
    return {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        for name, (shape, spec) in specs.items()
    }


def entries(sharding, ndim):
    return (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))


def every_axis(spec):
    return {n for e in spec if e for n in ((e,) if isinstance(e, str) else e)}


TXS = {
    "alone": rl.raclora(0.1, SPEC, key=0),
    "chain": optax.chain(
        optax.trace(0.9),
        rl.raclora(
            0.1,
            SPEC,
            inner=optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation(),
            key=0,
        ),
    ),
    "orthogonal": rl.scale_by_raclora(
        SPEC, inner=rl.orthogonal(momentum=0.9, second_moment=True, memory=0.5), key=0
    ),
    "orthogonal in blocks": rl.scale_by_raclora(
        SPEC, inner=rl.orthogonal(memory=0.5, block_size=2), key=0
    ),
}


def test_results_of_constants_are_whole():
    """On explicit axes, beside results whose sharding a type says."""
    mesh = mesh_of(AxisType.Explicit)
    x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("fsdp", None)))

    @auto_axes(lambda x, scale: {"x": sharding_of(x), "scale": sharding_of(scale)})
    def scaled(x, scale):
        return {"x": x * scale, "scale": scale + 1}

    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: scaled(x, jnp.full((), 2.0)))(x)
        constant = jax.jit(lambda x: scaled(x, jnp.zeros(())))(x)
    assert found["x"].sharding.spec == P("fsdp", None)
    for one, value in ((found, 3.0), (constant, 1.0)):
        assert one["scale"].sharding.is_fully_replicated
        assert one["scale"] == value


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", TXS)
def test_state_is_born_where_its_leaves_are(name, kind):
    tx, mesh = TXS[name], mesh_of(kind)
    params = params_on(mesh)
    found = state_shardings(tx, params)
    with jax.set_mesh(mesh):
        states = [tx.init(params), jax.jit(tx.init, out_shardings=found)(params)]
        if kind == AxisType.Explicit:
            states.append(jax.jit(tx.init)(params))
    for state in states:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        for (keypath, leaf), want in zip(leaves, jax.tree.leaves(found), strict=True):
            where = jax.tree_util.keystr(keypath)
            got = entries(leaf.sharding, leaf.ndim)
            assert got == entries(want, leaf.ndim), where
            owner = next((name for name in params if f"'{name}'" in where), None)
            if owner is not None and leaf.ndim:
                spec = params[owner].sharding.spec
                if ".gram" in where or ".unit" in where:  # of one matrix each
                    spec = spec[:1] if owner == "stack" else ()
                assert every_axis(got) == every_axis(spec), where


def test_what_a_factor_inherits():
    found = factor_shardings(params_on(mesh_of()), SPEC)
    specs = {name: found[name].spec for name in found}
    assert specs == {
        "both": P(None, ("tp", "fsdp")),  # the axis it lost joins the one it has
        "rows": P(None, "fsdp"),
        "pair": P(None, ("fsdp", "tp")),
        "stack": P("fsdp", None, "tp"),
        "bias": P("tp"),
    }


def test_part_of_a_tuple_where_the_whole_does_not_fit():
    mesh = mesh_of()
    place = NamedSharding(mesh, P(("fsdp", "tp"), None))
    W = jax.ShapeDtypeStruct((16, 12), "float32", sharding=place)
    with pytest.warns(UserWarning, match=r"factor of 'w' \(2, 12\) along tp;?"):
        found = factor_shardings({"w": W}, rl.Spec(2, side="left"))
    assert found["w"].spec == P(None, "fsdp")


def test_says_what_divides_nothing():
    mesh = mesh_of()
    W = jax.device_put(jnp.ones((16, 7)), NamedSharding(mesh, P("fsdp", None)))
    tx = rl.raclora(0.1, rl.Spec(2, side="left"), key=0)
    with pytest.warns(UserWarning, match=r"the factor of 'w' \(2, 7\) along fsdp"):
        state = tx.init({"w": W})
    assert state.inner_state.lowrank.mu["w"].sharding.is_fully_replicated
    assert state.sketches.values["w"].sharding.spec == P(None, "fsdp")


def test_refuses_what_it_cannot_place():
    other = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    params = params_on(mesh_of())
    params["rows"] = jax.device_put(params["rows"], NamedSharding(other, P("x")))
    tx = TXS["alone"]
    for call in (tx.init, lambda p: state_shardings(tx, p)):
        with pytest.raises(
            ValueError, match=r"different meshes: leaf 'bias'.*leaf 'rows'"
        ):
            call(params)
    for call in (
        lambda p: state_shardings(tx, p),
        lambda p: factor_shardings(p, SPEC),
    ):
        with pytest.raises(ValueError, match=r"none of the 5 leaves has a NamedShard"):
            call(jax.tree.map(np.asarray, params))


@pytest.mark.smoke
def test_one_compile_and_the_state_stays():
    params = params_on(mesh_of())
    tx = TXS["alone"]
    state = tx.init(params)
    born = jax.tree.map(lambda leaf: leaf.sharding, (params, state))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda w: 0.3 * w + 0.1, params)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state

    for _ in range(7):
        params, state = step(params, state)
    now = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    ndims = jax.tree.map(jnp.ndim, (params, state))
    assert jax.tree.map(entries, now, ndims) == jax.tree.map(entries, born, ndims)


def test_map_params_hands_our_shardings_on():
    params = params_on(mesh_of())
    found = state_shardings(TXS["chain"], params)
    own = jax.tree.map(lambda leaf: leaf.sharding, params)
    mapped = optax.tree.map_params(TXS["chain"], lambda _, one: one, found, own)
    assert mapped[1] == found[1]


# Flax: axis names in boxes.

NAMES = (("embed", "fsdp"), ("mlp", "tp"))
X = jnp.sin(jnp.arange(8.0 * 16)).reshape(8, 16)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()

        def dense(size, name, *axes):
            kernel = nn.with_logical_partitioning(init, axes)
            return nn.Dense(size, name=name, kernel_init=kernel)

        x = jnp.tanh(dense(32, "first", "embed", "mlp")(x))
        return dense(16, "second", "mlp", "embed")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs, boxed=True):
        def kernel(*axes):
            init = nnx.initializers.lecun_normal()
            return nnx.with_partitioning(init, axes) if boxed else init

        def dense(size, out, *axes):
            return nnx.Linear(size, out, kernel_init=kernel(*axes), rngs=rngs)

        self.first = dense(16, 32, "fsdp", "tp")
        self.second = dense(32, 16, "tp", "fsdp")

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def square(out):
    return jnp.mean((out - 1) ** 2)


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@pytest.mark.smoke
@pytest.mark.parametrize("form", ["dense", "factor"])
def test_linen_boxes_carry_through(form):
    """As MaxText derives them: partition specs of the state, logical rules, a mesh."""
    net, spec = Linen(), rl.Spec(2, side="smaller", resample_every=3)
    tx = rl.raclora(0.02, spec, key=0)

    def create(key):
        params = net.init(key, X)["params"]
        fields = {"apply_fn": net.apply, "params": params, "tx": tx}
        if form == "factor":
            return rl.flax.TrainState.create(**fields)
        return TrainState.create(**fields)

    def loss(params, x):
        return square(net.apply({"params": params}, x))

    def step(state, x):
        grads = jax.grad(loss)(state.params, x)
        if form == "factor":
            grads = rl.grad(loss, spec)(state.params, state.opt_state, x)
        return state.apply_gradients(grads=grads)

    logical = nn.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
    inner = logical.opt_state.inner_state.lowrank
    assert inner.mu["first/kernel"] == inner.nu["first/kernel"] == P(None, "mlp")
    assert logical.opt_state.sketches.values["second/kernel"] == P(None, "embed")
    shardings = nn.logical_to_mesh_sharding(logical, mesh_of(), NAMES)
    spread = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    one = nn.unbox(create(jax.random.key(0)))
    run = compiled_once(jax.jit(step, out_shardings=shardings))
    alone = jax.jit(step)
    for _ in range(10):
        spread, one = run(spread, X), alone(one, X)
    kept = nn.unbox(spread.opt_state.sketches.values["first/kernel"])
    assert kept.sharding.spec == P(None, "fsdp")
    close(jax.device_get(nn.unbox(spread.params)), one.params)


@pytest.mark.smoke
def test_nnx_metadata_carries_through():
    spec = rl.Spec(2, resample_every=3)
    tx = rl.raclora(0.02, spec, key=0)

    @nnx.jit
    def dense_step(model, optimizer, x):
        grads = nnx.grad(lambda model, x: square(model(x)))(model, x)
        optimizer.update(model, grads)

    @nnx.jit
    def step(model, state, x):
        grad_fn = rl.flax.value_and_grad(lambda model, x: square(model(x)), spec)
        _, grads = grad_fn(model, state, x)
        updates, state = tx.update(grads, state, to_tree(model)[0])
        rl.flax.apply_updates(model, updates)
        return state

    alone = Nnx(nnx.Rngs(0), boxed=False)
    plain = nnx.Optimizer(alone, tx, wrt=nnx.Param)
    for _ in range(10):
        dense_step(alone, plain, X)
    with jax.set_mesh(mesh_of()):
        model, other = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        specs = nnx.get_partition_spec(nnx.state(optimizer))["opt_state"]
        spread = P(None, ("tp", "fsdp"))
        assert specs["inner_state"]["lowrank"]["mu"]["first/kernel"] == spread
        kept = specs["sketches"]["values"]["first/kernel"]
        assert kept == P(None, ("fsdp", "tp"))
        state = tx.init(to_tree(other)[0])
        for _ in range(10):
            dense_step(model, optimizer, X)
            state = step(other, state, X)
    for trained in (model, other):
        close(*(jax.device_get(to_tree(one)[0]) for one in (trained, alone)))


@pytest.mark.filterwarnings("ignore:'sharding_names' is deprecated")
def test_what_says_the_axes_of_a_leaf_once_more_is_left_with_it():
    """MaxText's parameters name their axes twice, and the axis of their scan."""
    with jax.set_mesh(mesh_of()):
        model = Nnx(nnx.Rngs(0))
        names = model.first.kernel.get_metadata()["out_sharding"]
        model.first.kernel.set_metadata(sharding_names=names, param_scan_axis=0)
        optimizer = nnx.Optimizer(model, rl.raclora(0.02, 2, key=0), wrt=nnx.Param)
        moment = optimizer.opt_state.inner_state.lowrank.mu["first/kernel"]
    assert moment.get_metadata()["out_sharding"] == (None, ("tp", "fsdp"))
    assert not moment.has_metadata("sharding_names")
    assert not moment.has_metadata("param_scan_axis")
