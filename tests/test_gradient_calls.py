"""What stands around a gradient in factor coordinates: transforms, arguments, errors.

Which uses of a weight give the right gradient is the matter of ``test_gradient.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import (
    KEY,
    RULES,
    assert_reported,
    assert_same,
    fallbacks,
    gradient,
    network,
    oracle,
    plain,
    squares,
)
from cases import CASES
from helpers import refuses
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import raclora_jax as rl

pytestmark = pytest.mark.smoke


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
def test_one_leaf_is_a_tree():
    W, x, _ = network()[0]["head"], *network()[1:]
    spec = rl.Spec(2)

    def loss(W, x):
        return jnp.sum(jnp.sin(x @ W))

    value, grads = gradient(loss, W, spec, x[:, :6])
    assert_same((value, grads), oracle(loss, W, spec, x[:, :6]), 1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [
        "dot, two layers",
        "embedding tied to the head",
        "scan over layers",
        "cond, the leaf in both branches",
        "remat that saves names",
        "two leaves concatenated",
    ],
)
def test_without_jit(name):
    case = CASES[name]
    params, args = case.inputs()
    spec = case.spec(2, "left")
    ours, messages = fallbacks(gradient, case.loss, params, spec, *args)
    assert_same(ours, oracle(case.loss, params, spec, *args), 1e-13)
    assert_reported(case, messages)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_warning_points_at_the_line_that_asks(wrap):
    """Under ``jit`` too, where frames of JAX are in between."""
    params, x = {"w": jnp.ones((8, 6))}, jnp.ones((3, 8))
    spec = rl.Spec(2)

    def loss(params, x):
        return jnp.sum(x @ jnp.sin(params["w"]))

    state = rl.raclora(0.1, spec, key=KEY).init(params)
    factors, chain = rl.init_adapter(params, spec, key=KEY)
    calls = {
        rl.value_and_grad(loss, spec): (params, state, x),
        rl.grad(loss, spec): (params, state, x),
        jax.grad(rl.adapted(loss, spec)): (factors, params, chain, x),
    }
    for function, args in calls.items():
        with pytest.warns(UserWarning, match="'w' by sin") as caught:
            wrap(function)(*args)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.usefixtures("float64")
def test_grad_is_the_second_half():
    case = CASES["aux"]
    params, args = case.inputs()
    spec = case.spec(2, "right")
    state = rl.raclora(0.1, spec, key=KEY).init(params)
    settings = {"has_aux": True}
    (_, aux), both = jax.jit(rl.value_and_grad(case.loss, spec, **settings))(
        params, state, *args
    )
    grads, same_aux = jax.jit(rl.grad(case.loss, spec, **settings))(params, state, *args)
    assert_same(grads, both, 0)
    assert_same(same_aux, aux, 0)
    only = jax.jit(rl.grad(lambda p, x: case.loss(p, x)[0], spec))(params, state, *args)
    assert_same(only, both, 1e-13)


@pytest.mark.usefixtures("float64")
def test_the_loss_takes_what_it_likes():
    """Words, flags, functions and trees among the arguments; keywords too."""
    spec = rl.Spec(2, rules=RULES)
    params, x, y = network()

    def loss(params, batch, activation, *, mode, weights=(1.0, 2.0)):
        assert mode == "train"
        return squares(params, activation(batch["x"]), batch["y"]) * weights[1]

    batch = {"x": x, "y": y, "note": "no array"}
    state = rl.raclora(0.1, spec, key=KEY).init(params)
    ours = rl.value_and_grad(loss, spec)(params, state, batch, jnp.sin, mode="train")
    expected = plain(
        params, spec, x, y, loss_fn=lambda p, x, y: 2 * squares(p, jnp.sin(x), y)
    )
    assert_same(ours, expected, 1e-13)


@pytest.mark.usefixtures("float64")
def test_a_gradient_per_example():
    spec = rl.Spec(2, rules=RULES)
    params, x, y = network()
    state = rl.raclora(0.1, spec, key=KEY).init(params)
    ours = jax.vmap(rl.value_and_grad(squares, spec), in_axes=(None, None, 0, 0))
    value, grads = jax.jit(ours)(params, state, x[:, None], y[:, None])
    mean_value, mean_grads = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), (value, grads))
    assert grads["head"].value.shape[0] == len(x)
    assert_same((mean_value, mean_grads), plain(params, spec, x, y), 1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("how", ["unchecked", "weights vary", "weights do not vary"])
def test_inside_shard_map(how):
    """Data parallel by hand: the whole call on each shard, gradients averaged after.

    Where JAX knows that the weights are the same on every shard, it sums their gradient
    itself; a factor must be treated as its leaf is.
    """
    spec = rl.Spec(2, rules=RULES)
    params, x, y = network()
    x, y = jnp.concatenate([x, -x])[:8], jnp.concatenate([y, y])[:8]
    state = rl.raclora(0.1, spec, key=KEY).init(params)
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
    whole, rows = PartitionSpec(), PartitionSpec("d")

    def body(params, state, x, y):
        if how == "weights vary":
            params, state = jax.tree.map(
                lambda leaf: lax.pcast(leaf, "d", to="varying"), (params, state)
            )
        value, grads = rl.value_and_grad(squares, spec)(params, state, x, y)
        if how == "weights do not vary":
            return lax.pmean(value, "d"), jax.tree.map(lambda g: g / 4, grads)
        return lax.pmean((value, grads), "d")

    ours = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(whole, whole, rows, rows),
        out_specs=whole,
        check_vma=how != "unchecked",
    )
    assert_same(jax.jit(ours)(params, state, x, y), plain(params, spec, x, y), 1e-13)


@pytest.mark.usefixtures("float64")
def test_effects_happen_as_often():
    """A callback in the forward pass runs once, with and without remat or a scan."""
    seen = []

    def loss(params, x, y):
        def layer(h):
            h = jnp.tanh(h @ params["body"]["kernel"])
            jax.debug.callback(lambda h: seen.append(float(h)), h[0, 0])
            return h

        h = layer(x)
        h = lax.scan(
            lambda h, _: (layer(jnp.pad(h, ((0, 0), (0, 2)))), None), h, None, 3
        )[0]
        return jnp.mean((h @ params["head"] - y) ** 2) + 0 * params["body"]["bias"][0]

    params, x, y = network()
    del params["steps"]
    jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(params, x, y))
    jax.effects_barrier()
    expected, seen[:] = sorted(seen), []
    jax.block_until_ready(
        jax.jit(lambda *a: gradient(loss, a[0], rl.Spec(2), *a[1:]))(params, x, y)
    )
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), expected, rtol=1e-6)


# --- Bad input --------------------------------------------------------------------------


def call_with(loss_fn=squares, spec=None, params=None, state=None, **settings):
    """The call on the small network, one thing changed."""
    spec = rl.Spec(2, rules=RULES) if spec is None else spec
    good, x, y = network()
    params = good if params is None else params
    if state is None:
        state = rl.raclora(0.1, spec, key=KEY).init(params)
    return jax.jit(rl.value_and_grad(loss_fn, spec, **settings))(params, state, x, y)


@pytest.mark.parametrize(
    ("loss_fn", "settings", "pieces"),
    [
        (lambda p, x, y: squares(p, x, y)[None], {}, ["(1,)", "jnp.mean"]),
        (lambda p, x, y: x @ p["body"]["kernel"], {}, ["(7, 6)", "jnp.mean"]),
        (lambda p, x, y: squares(p, x, y).astype(int), {}, ["int32"]),
        (lambda p, x, y: squares(p, x, y) + 0j, {}, ["complex64"]),
        (lambda p, x, y: (squares(p, x, y), y), {}, ["has_aux=True"]),
        (lambda p, x, y: {"loss": squares(p, x, y)}, {}, ["dict"]),
        (lambda p, x, y: None, {}, ["None"]),
        (squares, {"has_aux": True}, ["has_aux=True", "(loss, aux)"]),
        (
            lambda p, x, y: (squares(p, x, y),) * 3,
            {"has_aux": True},
            ["has_aux=True", "(loss, aux)"],
        ),
        (
            lambda p, x, y: (y, squares(p, x, y)),
            {"has_aux": True},
            ["(7, 5)"],
        ),
    ],
)
def test_what_is_no_loss(loss_fn, settings, pieces):
    refuses(lambda: call_with(loss_fn, **settings), *pieces)


def test_a_leaf_the_loss_never_uses():
    def forgetful(params, x, y):
        return squares(params | {"head": jnp.ones((6, 5))}, x, y)

    refuses(lambda: call_with(forgetful), "'head'", "never uses", "mode='frozen'")
    # Nor one that is handed to a function which drops it.
    drops = jax.jit(lambda used, unused: used)

    def wasteful(params, x, y):
        return forgetful(params | {"bias": drops(y, params["head"])}, x, y)

    refuses(lambda: call_with(wasteful), "'head'", "never uses")
    # A dense one has a gradient of zero, as in JAX.
    rules = (*RULES, rl.Rule("head", mode="dense"))
    _, grads = call_with(forgetful, rl.Spec(2, rules=rules))
    assert not grads["head"].any()
    # So has one whose gradient was stopped: it is used.
    _, grads = call_with(lambda p, x, y: squares(lax.stop_gradient(p), x, y))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_leaves_that_cannot_be_trained():
    params = network()[0]
    refuses(lambda: call_with(spec=rl.Spec(2)), "'steps'", "int32", "mode='frozen'")
    integers = params | {"head": jnp.ones((6, 5), jnp.int32)}
    refuses(lambda: call_with(params=integers), "'head'", "int32", "mode='frozen'")
    complexes = params | {"head": jnp.ones((6, 5), jnp.complex64)}
    refuses(lambda: call_with(params=complexes), "'head'", "complex64", "mode='dense'")


def test_a_spec_for_other_shapes():
    state = rl.raclora(0.1, rl.Spec(2, rules=RULES), key=KEY).init(network()[0])
    other = rl.Spec(2, rules=(*RULES, rl.Rule("head", rows=(0, 1, 2))))
    refuses(lambda: call_with(spec=other, state=state), "'head'", "(0, 1, 2)")
    other = rl.Spec(2, rules=(*RULES, rl.Rule("tail", rank=3)))
    refuses(lambda: call_with(spec=other, state=state), "'tail'", "wins no leaf")
    other = rl.Spec(2, rules=(*RULES, rl.Rule("head", rank=5)))
    refuses(lambda: call_with(spec=other, state=state), "'head'", "rank 5")


def test_a_state_of_another_run():
    params = network()[0]
    for spec in (rl.Spec(3, rules=RULES), rl.Spec(2, side="right", rules=RULES)):
        state = rl.raclora(0.1, spec, key=KEY).init(params)
        other = rl.Spec(2, side="left", rules=RULES)
        refuses(lambda s=state, o=other: call_with(spec=o, state=s), "tx.init", "spec")
    smaller = params | {"head": jnp.ones((6, 4))}
    state = rl.raclora(0.1, rl.Spec(2, rules=RULES), key=KEY).init(smaller)
    refuses(lambda: call_with(state=state), "tx.init")
    more = params | {"tail": jnp.ones((6, 4))}
    state = rl.raclora(0.1, rl.Spec(2, rules=RULES), key=KEY).init(more)
    refuses(lambda: call_with(state=state), "'tail'", "tx.init")
    # A cache that a checkpoint left out comes from a fresh tx.init.
    state = rl.raclora(0.1, rl.Spec(2, rules=RULES), key=KEY).init(params)
    bare = state._replace(sketches=state.sketches._replace(values={}))
    refuses(lambda: call_with(state=bare), "tx.init")
    # A spec with other rules that agree on every leaf is the same run.
    same = rl.Spec(2, rules=(*RULES, rl.Rule("head", mode="lowrank")))
    _, grads = call_with(spec=same, state=state)
    assert_same(grads, call_with(state=state)[1], 0)


def test_a_state_that_is_missing_or_there_twice():
    params, x, y = network()
    spec = rl.Spec(2, rules=RULES)
    tx = rl.raclora(0.1, spec, key=KEY)
    weights = {name: leaf for name, leaf in params.items() if name != "steps"}
    adam = optax.adam(0.1).init(weights)
    refuses(lambda: call_with(state=adam), "RacLoraState", "found 0", "tx.init")
    refuses(lambda: call_with(state=(tx.init(params),) * 2), "found 2", "tx.init")
    # The batch in the place of the state.
    grad_fn = rl.value_and_grad(squares, spec)
    refuses(lambda: grad_fn(params, x, y), "RacLoraState", "found 0", "tx.init")
    refuses(lambda: rl.value_and_grad(squares, 2.0), "Spec", "2.0")
    nested = {"one": optax.EmptyState(), "two": [adam, (tx.init(params),)]}
    assert_same(call_with(state=nested), call_with(), 0)
