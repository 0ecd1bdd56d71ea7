"""Sharding in types: the same run as on automatic axes and as on one device."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import assert_close, compiled_once, repeat
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import raclora_jax as rl

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
LAYERS, DIM, HIDDEN, VOCAB = 2, 16, 32, 8
STEPS = 20
# A large epsilon: Adam's quotient of two small numbers would blow rounding up.
RULE = optax.scale_by_adam(eps=0.1)
LAYOUTS = {
    "fsdp": {
        "up": P(None, "a", None),
        "down": P(None, None, "a"),
        "query": P("a", None, None),
        "head": P("a", None),
    },
    "tp": {
        "up": P(None, None, "b"),
        "down": P(None, "b", None),
        "query": P(None, None, "b"),
        "head": P(None, "b"),
        "bias": P("b"),
    },
    "both": {
        "up": P(None, "a", "b"),
        "down": P(None, "b", "a"),
        "query": P("a", None, "b"),
        "head": P("a", "b"),
        "bias": P("b"),
    },
    "data": {},
}


def spec_of(side="left", **more):
    """Five links in ``STEPS``."""
    views = [rl.Rule("up|down", batch=0, rows=1), rl.Rule("query", rows=0)]
    return rl.Spec(3, side=side, resample_every=4, rules=views, **more)


def weights(dtype=jnp.float32):
    shapes = {
        "up": (LAYERS, DIM, HIDDEN),
        "down": (LAYERS, HIDDEN, DIM),
        "query": (DIM, 4, 8),
        "head": (DIM, VOCAB),
        "bias": (VOCAB,),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: (0.3 * jax.random.normal(key, shape)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def placed(kind, shape, layout, dtype=jnp.float32):
    """Weights and a batch on a mesh; as they are where there is none."""
    params, x = weights(dtype), jax.random.normal(jax.random.key(9), (8, 4, DIM), dtype)
    if kind is None:
        return params, x, contextlib.nullcontext()
    names = ("a", "b", "c")[: len(shape)]
    mesh = jax.make_mesh(shape, names, (kind,) * len(shape))

    def place(name, leaf):
        spec = LAYOUTS[layout].get(name, P(*(None,) * leaf.ndim))
        spec = P(*(axis if axis in names else None for axis in spec))
        if kind == AUTO:  # as compiled programs spell it: nothing after the last axis
            used = [i for i, axis in enumerate(spec) if axis]
            spec = P(*spec[: max(used, default=-1) + 1])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = {name: place(name, leaf) for name, leaf in params.items()}
    x = jax.device_put(x, NamedSharding(mesh, P("a")))
    return params, x, jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext()


def loss_fn(params, x):
    """A scanned model that says where its products live, if its types do."""
    explicit = not jax.sharding.get_abstract_mesh().empty
    sharded = jax.typeof(params["up"]).sharding.spec if explicit else ()
    hidden = "b" if "b" in sharded else None

    def product(equation, x, w, last):
        if not explicit:
            return jnp.einsum(equation, x, w)
        out = P("a", *(None,) * (len(equation.split("->")[1]) - 2), last)
        return jnp.einsum(equation, x, w, out_sharding=out)

    def layer(x, w):
        h = jnp.tanh(product("btd,dh->bth", x, w["up"], hidden))
        return x + product("bth,hd->btd", h, w["down"], None), None

    x, _ = lax.scan(layer, x, {name: params[name] for name in ("up", "down")})
    q = product("btd,dhk->bthk", x, params["query"], hidden)
    y = product("btd,dv->btv", x, params["head"], hidden) + params["bias"]
    return jnp.mean((y - 1) ** 2) + jnp.mean(q**2)


def step_of(tx, spec, form):
    fused = rl.fused_step(loss_fn, tx) if form == "fused" else None

    def step(params, state, x):
        if fused is not None:
            return fused(params, state, x)[:2]
        if form == "factor":
            _, grads = rl.value_and_grad(loss_fn, spec)(params, state, x)
            updates, state = tx.update(grads, state, params)
            return rl.apply_updates(params, updates), state
        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def optimized(place, form, spec, *, inner=RULE, steps=STEPS, scanned=False, **more):
    """The weights after some steps."""
    params, x, mesh = placed(*place, **more)
    tx = rl.raclora(0.01, spec, weight_decay=0.1, inner=inner, key=3)
    step = step_of(tx, spec, form)
    with mesh:
        state = tx.init(params)
        if scanned:

            def many(carry, _):
                return step(*carry, x), None

            run = jax.jit(lambda carry: lax.scan(many, carry, None, length=steps)[0])
            return jax.device_get(run((params, state))[0])
        compiled = compiled_once(jax.jit(step))
        for _ in range(steps):
            params, state = compiled(params, state, x)
    return jax.device_get(params)


def adapted(place, spec, **more):
    """The base after two links of the adapter form."""
    params, x, mesh = placed(*place, **more)
    rule = optax.chain(RULE, optax.scale(-0.01))
    loss = rl.adapted(loss_fn, spec)

    @jax.jit
    def step(factors, state, params, chain, x):
        grads = jax.grad(loss)(factors, params, chain, x)
        updates, state = rule.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state

    with mesh:
        factors, chain = rl.init_adapter(params, spec, key=3)
        for _ in range(2):
            state = rule.init(factors)
            for _ in range(3):
                factors, state = step(factors, state, params, chain, x)
            end = jax.jit(lambda *args: rl.next_link(*args, spec))
            params, factors, chain = end(params, factors, chain)
    return jax.device_get(params)


@pytest.fixture(scope="module")
def alone():
    """The same runs on one device."""
    found = {}

    def run(side):
        if side not in found:
            found[side] = optimized((None, None, None), "dense", spec_of(side))
        return found[side]

    return run


QUICK = [
    pytest.param(EXPLICIT, (4, 2), "both", "factor", "left", marks=pytest.mark.smoke),
    repeat(EXPLICIT, (2, 2, 2), "both", "dense", "right"),
    repeat(EXPLICIT, (8,), "fsdp", "factor", "right"),
    repeat(EXPLICIT, (8,), "data", "factor", "left"),
    (AUTO, (4, 2), "both", "factor", "left"),
    pytest.param(EXPLICIT, (4, 2), "both", "fused", "left", marks=pytest.mark.smoke),
    (AUTO, (4, 2), "both", "fused", "right"),
]
PLACES = [
    *((shape, layout) for shape in ((4, 2), (2, 2, 2)) for layout in LAYOUTS),
    ((8,), "fsdp"),
    ((8,), "data"),
]
ALL = [
    (kind, *place, form, side)
    for kind, place, form, side in itertools.product(
        (EXPLICIT, AUTO), PLACES, ("dense", "factor", "fused"), ("left", "right")
    )
]


@pytest.mark.parametrize(("kind", "shape", "layout", "form", "side"), QUICK)
def test_explicit_is_automatic_is_one_device(alone, kind, shape, layout, form, side):
    got = optimized((kind, shape, layout), form, spec_of(side))
    assert_close(got, alone(side), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape", "layout", "form", "side"), ALL)
def test_every_mesh(alone, kind, shape, layout, form, side):
    got = optimized((kind, shape, layout), form, spec_of(side))
    assert_close(got, alone(side), 1e-6)


HERE = (None, None, None)
THERE = (EXPLICIT, (4, 2), "both")


def test_adapter_form():
    spec = spec_of()
    assert_close(adapted(THERE, spec), adapted(HERE, spec), 1e-6)


def test_scan_and_accumulation():
    inner = optax.MultiSteps(RULE, 2).gradient_transformation()
    runs = [
        optimized(place, "factor", spec_of(), inner=inner, steps=9, scanned=True)
        for place in (HERE, THERE)
    ]
    assert_close(*runs, 1e-6)


OTHERS = {
    "orthogonal": {"inner": rl.orthogonal(momentum=0.9, second_moment=True, memory=0.5)},
    "orthogonal in blocks": {"inner": rl.orthogonal(memory=0.5, block_size=2)},
    "block": {"spec": {"sketch": "block"}},
    "coordinate": {"spec": {"sketch": "coordinate"}},
    "drawn side": {"spec": {"side": 0.5}},
    "no cache": {"spec": {"cache": False}},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "factor", "fused"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_rules_and_laws(name, form):
    settings = dict(OTHERS[name])
    spec = dataclasses.replace(spec_of(), **settings.pop("spec", {}))
    runs = [optimized(place, form, spec, steps=9, **settings) for place in (HERE, THERE)]
    assert_close(*runs, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "factor", "fused"])
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_low_precision(form, rounding):
    """Rounding draws by place: a weight may land one step of the grid away."""
    spec = spec_of(rounding=rounding)
    runs = [
        optimized(place, form, spec, steps=5, dtype=jnp.bfloat16)
        for place in (HERE, THERE)
    ]
    assert_close(*runs, 2**-7)


def test_draws_send_gram_matrices_only():
    params, _, mesh = placed(*THERE)
    spec = spec_of()
    tx = rl.raclora(0.1, spec, key=0)
    with mesh:
        draw = jax.jit(lambda params: rl.sample_sketch(params, spec, key=1))
        text = draw.lower(params).compile().as_text()
        state = tx.init(params)
    grams = {line.split(" all-reduce(")[0].split()[-1] for line in text.splitlines()
             if " all-reduce(" in line}  # fmt: skip
    assert grams
    assert all("3,3]" in shape for shape in grams), grams
    for other in ("all-gather(", "collective-permute(", "all-to-all("):
        assert other not in text
    for sketch in state.sketches.values.values():
        assert not sketch.sharding.is_fully_replicated
