"""Wrong input is refused before any compute: what, where, and one way out.

Each message names the leaf or the argument, the value that came, and what to write
instead. Here: pieces that must stand in the message, in any order.
"""

import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import raclora_jax as rl

PARAMS = {"body": {"kernel": jnp.ones((9, 7))}, "bias": jnp.ones(7)}
LOW = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)


def params_with(**leaves):
    return PARAMS | leaves


def transformation(spec=2, **fields):
    tx = rl.raclora(0.1, spec, key=0, **fields)
    return tx, tx.init(PARAMS)


def factor(*shape):
    return rl.Factor(jnp.ones(shape), jnp.zeros(()))


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ({"rank": 0}, ["Spec", "rank", "at least 1", "got 0"]),
        ({"rank": -3}, ["Spec", "rank", "at least 1", "got -3"]),
        ({"rank": True}, ["Spec", "rank", "an int", "True"]),
        ({"rank": 2.0}, ["Spec", "rank", "an int", "2.0", "rank=8"]),
        ({"rank": "2"}, ["Spec", "rank", "an int", "'2'", "rank=8"]),
        ({"rank": None}, ["Spec", "rank", "an int", "None"]),
        ({"rank": np.ones(2, int)}, ["Spec", "rank", "an int", "rank=8"]),
        ({"sketch": "gauss"}, ["sketch", "'gauss'", "'gaussian_raw'", "'orthonormal'"]),
        ({"side": "up"}, ["side", "'up'", "'left'", "'auto'"]),
        ({"rounding": "even"}, ["rounding", "'even'", "'stochastic'", "'master'"]),
        ({"rest": "lowrank"}, ["rest", "'lowrank'", "'dense'", "'frozen'"]),
        ({"resample_every": 0}, ["resample_every", "at least 1", "got 0"]),
        ({"resample_every": 1.5}, ["resample_every", "an int", "1.5"]),
        ({"resample_every": False}, ["resample_every", "an int", "False"]),
        (
            {"resample_every": 10**10},
            ["resample_every", "at most 2147483647", "10000000000"],
        ),
        ({"alpha": 0.0}, ["alpha", "positive", "got 0.0"]),
        ({"alpha": float("nan")}, ["alpha", "finite", "nan"]),
        ({"alpha": "8"}, ["alpha", "a number", "None for scaling 1", "'8'"]),
        ({"alpha": True}, ["alpha", "a number", "True"]),
        ({"cache": 1}, ["cache", "bool", "1"]),
        ({"rules": rl.Rule("x")}, ["rules", "a sequence of Rule", "[Rule(...)]"]),
        ({"rules": ["x"]}, ["rules", "Rule", "'x'"]),
        ({"rules": 3}, ["rules", "sequence", "3", "[Rule(...)]"]),
    ],
)
def test_spec_fields(fields, pieces):
    refuses(lambda: rl.Spec(**({"rank": 2} | fields)), *pieces)


@pytest.mark.parametrize(
    ("path", "fields", "pieces"),
    [
        ("x", {"rank": 0}, ["Rule('x')", "rank", "at least 1", "got 0"]),
        ("x", {"rank": 1.5}, ["Rule('x')", "rank", "an int", "1.5"]),
        ("x", {"alpha": -1}, ["Rule('x')", "alpha", "positive", "got -1.0"]),
        ("x", {"mode": "lora"}, ["Rule('x')", "mode", "'lora'", "'lowrank'"]),
        ("x", {"side": "top"}, ["Rule('x')", "side", "'top'", "'right'"]),
        ("x", {"sketch": "svd"}, ["Rule('x')", "sketch", "'svd'", "'coordinate'"]),
        ("x", {"rows": 0.0}, ["Rule('x')", "rows", "tuple of ints", "0.0"]),
        ("x", {"batch": (0, True)}, ["Rule('x')", "batch", "tuple of ints", "True"]),
        ("x", {"rows": "0"}, ["Rule('x')", "rows", "tuple of ints", "'0'"]),
        ("(x", {}, ["Rule('(x')", "regular expression", "re.escape"]),
        ("*", {}, ["Rule('*')", "regular expression", "re.escape"]),
        (3, {}, ["Rule(3)", "path", "str", "3 of type int"]),
    ],
)
def test_rule_fields(path, fields, pieces):
    refuses(lambda: rl.Rule(path, **fields), *pieces)


def test_a_traced_rank():
    traced = "traced|Traced|Tracer"
    for call in (
        lambda rank: rl.Spec(rank).rank,
        lambda rank: rl.Rule("x", rank=rank).rank,
        lambda rank: rl.sample_sketch(PARAMS, rank, key=0),
        lambda rank: rl.raclora(0.1, rank, key=0).init(PARAMS),
    ):
        with pytest.raises(TypeError, match=traced):
            jax.jit(call)(3)
    # optax makes an array of every number it is given, and a tracer of it under jit.
    tx = optax.inject_hyperparams(rl.raclora)(0.1, 3, key=0)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(tx.update)(PARAMS, state, PARAMS)


@pytest.mark.parametrize("spec", [2.0, "2", None, True, [2], {"rank": 2}])
def test_what_is_no_spec(spec):
    refuses(lambda: rl.raclora(0.1, spec, key=0), "Spec", repr(spec), "rank=8")
    refuses(lambda: rl.init_adapter(PARAMS, spec, key=0), "Spec", repr(spec), "rank=8")


KERNEL = rl.Rule("body/kernel", rank=7)
TREES = {
    "rank not below the side, named by a rule": (
        rl.Spec(2, rules=[KERNEL]),
        params_with(other=jnp.ones((9, 8))),
        ["'body/kernel'", "(9, 7)", "rank 7", "7 (right)", "lower", "mode='dense'"],
    ),
    "rank not below the side, the rest frozen": (
        rl.Spec(7, rest="frozen"),
        params_with(other=jnp.ones((9, 8))),
        ["'body/kernel'", "(9, 7)", "rank 7", "7 (right)", "lower", "mode='dense'"],
    ),
    "rank not below the side, no leaf left": (
        rl.Spec(7),
        PARAMS,
        ["'body/kernel'", "(9, 7)", "rank 7 >= sketched side 7", "lower the rank"],
    ),
    "a rule that wins no leaf": (
        rl.Spec(2, rules=[rl.Rule("kernel", mode="dense")]),
        PARAMS,
        ["Rule('kernel')", "no leaf", "whole path", "'body/kernel'", "'bias'"],
    ),
    "a rule in the shadow of another": (
        rl.Spec(2, rules=[rl.Rule(".*kernel"), rl.Rule("body/kernel", rank=3)]),
        PARAMS,
        ["Rule('body/kernel')", "no leaf", "earlier rule", "'body/kernel'"],
    ),
    "no view": (
        rl.Spec(2),
        params_with(query=jnp.ones((9, 2, 4))),
        ["'query'", "(9, 2, 4)", "3 axes", "rows=", "trace_spec", "mode='dense'"],
    ),
    "a stack that leaves three axes": (
        rl.Spec(2, rules=[rl.Rule("query", batch=0)]),
        params_with(query=jnp.ones((3, 9, 2, 4))),
        ["'query'", "(3, 9, 2, 4)", "rows=", "trace_spec", "mode='dense'"],
    ),
    "overlapping axes": (
        rl.Spec(2, rules=[rl.Rule("query", rows=(0, 1), batch=-3)]),
        params_with(query=jnp.ones((9, 2, 4))),
        ["'query'", "rows=(0, 1)", "batch=(0,)", "share"],
    ),
    "one axis twice": (
        rl.Spec(2, rules=[rl.Rule("query", rows=(1, -2))]),
        params_with(query=jnp.ones((9, 2, 4))),
        ["'query'", "rows=(1, -2)", "distinct axes", "-3 and 2"],
    ),
    "an axis out of range": (
        rl.Spec(2, rules=[rl.Rule("query", rows=0, batch=3)]),
        params_with(query=jnp.ones((9, 2, 4))),
        ["'query'", "batch=(3,)", "between -3 and 2"],
    ),
    "no columns": (
        rl.Spec(2, rules=[rl.Rule("body/kernel", rows=(0, 1))]),
        PARAMS,
        ["'body/kernel'", "rows=(0, 1)", "at least one"],
    ),
    "no rows": (
        rl.Spec(2, rules=[rl.Rule("body/kernel", rows=())]),
        PARAMS,
        ["'body/kernel'", "rows=()", "at least one"],
    ),
    "a view of a vector": (
        rl.Spec(2, rules=[rl.Rule("bias", rows=0)]),
        PARAMS,
        ["'bias'", "(7,)", "at least one"],
    ),
    "integers": (
        rl.Spec(2),
        params_with(ids=jnp.ones((9, 8), jnp.int32)),
        ["'ids'", "int32", "mode='frozen'"],
    ),
    "a key": (
        rl.Spec(2),
        params_with(dropout=jax.random.key(0)),
        ["'dropout'", "key<fry>", "mode='frozen'"],
    ),
    "complex numbers": (
        rl.Spec(2),
        params_with(fourier=jnp.ones((9, 8), jnp.complex64)),
        ["'fourier'", "complex64", "real", "mode='dense'"],
    ),
    "a string": (rl.Spec(2), params_with(name="float32"), ["'name'", "'float32'"]),
    "two leaves, one path": (
        rl.Spec(2),
        {"a/b": jnp.ones((9, 7)), "a": {"b": jnp.ones((9, 7))}},
        ["'a/b'", "two leaves", "rename"],
    ),
    "two leaves, one path, by type": (
        rl.Spec(2),
        collections.OrderedDict([(1, jnp.ones((9, 7))), ("1", jnp.ones((9, 7)))]),
        ["'1'", "two leaves", "rename"],
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name):
    """At every door that sees whole params, also with abstract ones."""
    spec, params, pieces = TREES[name]
    refuses(lambda: rl.raclora(0.1, spec, key=0).init(params), *pieces)
    refuses(lambda: rl.init_adapter(params, spec, key=0), *pieces)
    refuses(lambda: rl.sample_sketch(params, spec, key=0), *pieces)
    if name not in ("a string", "a key"):
        tx = rl.scale_by_raclora(spec, key=0)
        refuses(lambda: jax.eval_shape(tx.init, params), *pieces)


@pytest.mark.parametrize(
    ("key", "pieces"),
    [
        (None, ["None", "jax.random.key(0)"]),
        (True, ["True", "jax.random.key(0)"]),
        (1.5, ["1.5 of type float", "jax.random.key(0)"]),
        ("seed", ["'seed'", "jax.random.key(0)"]),
        (-1, ["between 0 and 2**32 - 1", "got -1", "jax.random.key(seed)"]),
        (2**32, ["4294967296", "between 0 and 2**32 - 1", "jax.random.key(seed)"]),
        (np.int64(-1), ["-1", "0 and 2**32 - 1"]),
        (jnp.float32(1.0), ["float32", "jax.random.key(0)"]),
        (jnp.zeros(4, jnp.uint32), ["uint32 of shape (4,)", "jax.random.key(0)"]),
        (jnp.zeros((3, 2), jnp.uint32), ["shape (3, 2)", "jax.random.key(0)"]),
        (jax.random.key(0, impl="rbg"), ["rbg", "impl='threefry2x32'"]),
        (jax.random.split(jax.random.key(0)), ["shape (2,)", "one threefry2x32"]),
    ],
)
def test_keys(key, pieces):
    for call in (
        lambda: rl.raclora(0.1, 2, key=key),
        lambda: rl.init_adapter(PARAMS, 2, key=key),
        lambda: rl.sample_sketch(PARAMS, 2, key=key),
    ):
        refuses(call, "key must be", *pieces)


def test_a_key_has_no_default():
    for call in (lambda: rl.raclora(0.1, 2), lambda: rl.init_adapter(PARAMS, 2)):
        with pytest.raises(TypeError, match="key"):
            call()


@pytest.mark.parametrize(
    ("inner", "pieces"),
    [
        (optax.adamw(1e-3), ["params", "scale_by_adam", "weight_decay"]),
        (
            optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
            ["params", "scale_by_adam", "weight_decay"],
        ),
        (optax.adam(1e-3), ["negative", "learning rate", "scale_by_adam"]),
        (optax.sgd(0.1, momentum=0.9), ["negative", "learning rate", "learning_rate"]),
        (optax.adam(optax.linear_schedule(0.0, 1.0, 100)), ["negative", "learning_rate"]),
        (optax.scale_by_adam, ["inner", "optax transformation", "scale_by_adam()"]),
        ("adam", ["inner", "optax transformation", "scale_by_adam()"]),
    ],
)
def test_inner_rules(inner, pieces):
    refuses(lambda: rl.raclora(0.1, 2, inner=inner, key=0), *pieces)
    refuses(lambda: rl.scale_by_raclora(2, inner=inner, key=0), *pieces)


def test_moments():
    refuses(
        lambda: rl.raclora(0.1, 2, moments="rest", key=0), "moments", "'rest'", "'reset'"
    )


def state_of(params, spec=2, **fields):
    return rl.raclora(0.1, spec, key=0, **fields).init(params)


WIDER = {"body": {"kernel": jnp.ones((9, 8))}, "bias": jnp.ones(7)}
RENAMED = {"head": {"kernel": jnp.ones((9, 7))}, "bias": jnp.ones(7)}
MASTER = rl.Spec(2, rounding="master")
STATES = {
    "another width": (2, PARAMS, lambda: state_of(WIDER), ["body/kernel", "9", "8"]),
    "another name": (
        2,
        PARAMS,
        lambda: state_of(RENAMED),
        ["body/kernel", "(2, 9)", "nothing"],
    ),
    "another rank": (3, PARAMS, lambda: state_of(PARAMS), ["(3, 9)", "(2, 9)"]),
    "another side": (
        rl.Spec(2, side="left"),
        PARAMS,
        lambda: state_of(PARAMS),
        ["body/kernel", "(2, 7)", "(2, 9)"],
    ),
    "another rule inside": (
        2,
        PARAMS,
        lambda: state_of(PARAMS, inner=optax.trace(0.9)),
        ["inner_state", "nothing"],
    ),
    "without the cache": (
        rl.Spec(2, cache=False),
        PARAMS,
        lambda: state_of(PARAMS),
        ["sketches", "body/kernel", "nothing", "(2, 7)"],
    ),
    "no master": (
        MASTER,
        LOW,
        lambda: state_of(LOW),
        ["master", "'bias'", "(7,)", "nothing"],
    ),
    "a master": (
        2,
        LOW,
        lambda: state_of(LOW, MASTER),
        ["master", "'bias'", "(7,)", "nothing"],
    ),
    "a leaf without a gradient": (
        2,
        {"bias": PARAMS["bias"]},
        lambda: state_of(PARAMS),
        ["body/kernel", "nothing", "(2, 9)"],
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_model_or_spec(name):
    spec, params, make, pieces = STATES[name]
    tx, state = rl.raclora(0.1, spec, key=0), make()
    for call in (
        lambda: tx.update(params, state, params),
        lambda: jax.eval_shape(tx.update, params, state, params),
    ):
        refuses(call, *pieces, "tx.init(params)")


def test_another_side_at_resume():
    """Of a square leaf only the saved spec can tell; it is kept beside the checkpoint."""
    refuses(
        lambda: rl.Spec(2, side="left").check_resumes(rl.Spec(2, side="right")),
        "side='left'",
        "side='right'",
        "saved spec",
    )


GRADIENTS = {
    "a factor of another rank": (
        {"body": {"kernel": factor(3, 9)}},
        PARAMS,
        ["'body/kernel'", "(2, 9)", "(3, 9)", "spec"],
    ),
    "a factor of a dense leaf": (
        {"bias": factor(2, 7)},
        PARAMS,
        ["'bias'", "dense", "Factor", "spec"],
    ),
    "a factor without params": (
        {"body": {"kernel": factor(2, 9)}},
        None,
        ["'body/kernel'", "params", "tx.update(grads, state, params)"],
    ),
    "a gradient of another shape": (
        {"body": {"kernel": jnp.ones((7, 9))}},
        PARAMS,
        ["'body/kernel'", "(9, 7)", "(7, 9)"],
    ),
    "a gradient of no leaf": (
        {"extra": jnp.ones(3)},
        PARAMS,
        ["'extra'", "params", "tx.init"],
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    change, params, pieces = GRADIENTS[name]
    tx, state = transformation()
    refuses(lambda: tx.update(PARAMS | change, state, params), *pieces)


def test_what_needs_params():
    tx, state = transformation(weight_decay=0.1)
    call = "tx.update(grads, state, params)"
    refuses(lambda: tx.update(PARAMS, state), "params", "weight_decay", call)
    tx = rl.raclora(0.1, 2, key=0)
    state = tx.init(LOW)
    refuses(lambda: tx.update(LOW, state), "params", "'bias'", call)


def test_params_that_lack_a_leaf():
    """Whether it is adapted or trained in full, before the loss looks for it."""
    whole = PARAMS | {"head": jnp.ones((5, 4))}
    state = rl.raclora(0.1, 2, key=0).init(whole)
    for path, missing in (("'bias'", "bias"), ("'head'", "head")):
        params = {name: leaf for name, leaf in whole.items() if name != missing}
        grad_fn = rl.value_and_grad(lambda p: jnp.sum(p["bias"]) + jnp.sum(p["head"]), 2)
        refuses(lambda: grad_fn(params, state), path, "params", "tx.init")  # noqa: B023


def functions_of(params, spec):
    """Every function that plans a tree."""

    def loss(params):
        return jnp.sum(jnp.ones(9) @ params["body"]["kernel"])

    def steps():
        tx = rl.raclora(0.1, spec, key=0)
        state = tx.init(params)
        _, grads = rl.value_and_grad(loss, spec)(params, state)
        return rl.apply_updates(params, tx.update(grads, state, params)[0])

    def links():
        factors, chain = rl.init_adapter(params, spec, key=0)
        rl.adapted(loss, spec)(factors, params, chain)
        return rl.next_link(params, factors, chain, spec)[0]

    def traced():
        return rl.trace_spec(loss, params, rank=2, rules=spec.rules)

    return steps, links, traced, lambda: rl.summary(params, spec)


LEAVES = {
    "key": jax.random.key(0),
    "float0": np.zeros(3, jax.dtypes.float0),
    "int": jnp.arange(3),
    "str": np.array(["a"]),
}


@pytest.mark.parametrize("kind", LEAVES)
def test_leaves_that_are_no_plain_numbers(kind):
    """Named in the error of every function, and passed by where they are frozen."""
    params = PARAMS | {"odd": LEAVES[kind]}
    for call in functions_of(params, rl.Spec(2)):
        refuses(call, "'odd'")
    if kind == "str":
        return
    spec = rl.Spec(2, rules=[rl.Rule("odd", mode="frozen")])
    for call in functions_of(params, spec)[:2]:
        assert call()["odd"] is LEAVES[kind]
    for call in functions_of(params, spec)[2:]:
        call()


@pytest.mark.parametrize("clip_norm", [0, -1.0, "1", True, float("nan")])
def test_clip_norms(clip_norm):
    for make in (rl.scale_by_raclora, lambda *a, **k: rl.raclora(0.1, *a, **k)):
        refuses(lambda: make(2, clip_norm=clip_norm, key=0), "clip_norm")  # noqa: B023


@pytest.mark.parametrize("count", [0, 2])
def test_opt_states_without_one_state(count):
    _, state = transformation()
    opt_state = (optax.EmptyState(), [state] * count)
    refuses(
        lambda: rl.value_and_grad(jnp.sum, 2)(PARAMS, opt_state),
        f"found {count}",
        "one RacLoraState",
        "tx.init",
    )


def update_for(*shape):
    """A factor update of one leaf of the given shape."""
    leaf = {"w": jnp.ones(shape)}
    tx = rl.raclora(0.1, 2, key=0)
    state = tx.init(leaf)
    _, grads = rl.value_and_grad(lambda p: jnp.sum((jnp.ones(9) @ p["w"]) ** 2), 2)(
        leaf, state
    )
    return grads["w"], tx.update(grads, state, leaf)[0]["w"]


APPLIED = {
    "a factor made by hand": (
        {"body": {"kernel": factor(2, 9)}},
        ["'body/kernel'", "by hand", "tx.update"],
    ),
    "a factor of another leaf": (
        {"body": {"kernel": update_for(9, 5)[1]}},
        ["'body/kernel'", "(9, 5)", "(9, 7)"],
    ),
    "a factor of a vector": ({"bias": update_for(9, 7)[1]}, ["'bias'", "(7,)"]),
    "a gradient in factor form": (
        {"body": {"kernel": update_for(9, 7)[0]}},
        ["'body/kernel'", "gradient", "tx.update"],
    ),
    "an update of another shape": (
        {"body": {"kernel": jnp.ones((1, 7))}},
        ["'body/kernel'", "(9, 7)", "(1, 7)"],
    ),
    "an update of no leaf": ({"extra": jnp.ones(3)}, ["'extra'", "params"]),
}


@pytest.mark.parametrize("name", APPLIED)
def test_updates(name):
    change, pieces = APPLIED[name]
    refuses(lambda: rl.apply_updates(PARAMS, PARAMS | change), *pieces)


def test_a_master_of_abstract_weights():
    tx = rl.raclora(0.1, MASTER, key=0)
    abstract = jax.eval_shape(lambda: LOW)
    refuses(lambda: tx.init(abstract), "'bias'", "abstract", "master", "jax.eval_shape")
    jax.eval_shape(tx.init, LOW)  # the way out


def test_a_master_in_the_adapter_form():
    pieces = ["'bias'", "master", "adapter form", "rounding='stochastic'", "float32"]
    refuses(lambda: rl.init_adapter(LOW, MASTER, key=0), *pieces)
    factors, chain = rl.init_adapter(LOW, 2, key=0)
    refuses(lambda: rl.merge(LOW, factors, chain, MASTER), *pieces)
    rl.init_adapter(PARAMS, MASTER, key=0)  # float32 weights need no copy


@pytest.mark.parametrize(
    "mask", [{"body": True}, lambda params: {"bias": False}, {"body": {"other": True}}]
)
def test_a_mask_that_misses_a_leaf(mask):
    tx, state = transformation(weight_decay=0.1, mask=mask)
    missed = "'bias'" if mask == {"body": True} else ""
    refuses(lambda: tx.update(PARAMS, state, PARAMS), "mask", missed, "prefix")


def zeros_like_factors(**changes):
    factors, _ = rl.init_adapter(PARAMS, 2, key=0)
    return factors | changes


ADAPTERS = {
    "a missing factor": (
        {"bias": jnp.zeros(7)},
        ["'body/kernel'", "lowrank", "factors", "init_adapter"],
    ),
    "a factor of another rank": (
        zeros_like_factors(body={"kernel": jnp.zeros((3, 9))}),
        ["'body/kernel'", "(2, 9)", "(3, 9)", "spec"],
    ),
    "a difference that would broadcast": (
        zeros_like_factors(bias=jnp.zeros(1)),
        ["'bias'", "(7,)", "(1,)", "init_adapter"],
    ),
    "a factor of no leaf": (
        zeros_like_factors(extra=jnp.zeros(1)),
        ["'extra'", "no leaf", "init_adapter"],
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_of_the_adapter_form(name):
    factors, pieces = ADAPTERS[name]
    _, chain = rl.init_adapter(PARAMS, 2, key=0)
    loss = rl.adapted(lambda params: jnp.sum(params["bias"]), 2)
    for call in (
        lambda: rl.merge(PARAMS, factors, chain, 2),
        lambda: rl.effective_params(PARAMS, factors, chain, 2),
        lambda: rl.next_link(PARAMS, factors, chain, 2),
        lambda: jax.grad(loss)(factors, PARAMS, chain),
    ):
        refuses(call, *pieces)


def test_a_chain_of_another_spec():
    factors, _ = rl.init_adapter(PARAMS, 2, key=0)
    _, chain = rl.init_adapter(PARAMS, 3, key=0)
    pieces = ["'body/kernel'", "this chain", "rank=3", "rank=2", "spec"]
    refuses(lambda: rl.merge(PARAMS, factors, chain, 2), *pieces)
    bare = chain._replace(stamps=type(chain.stamps)())
    pieces = ["'body/kernel'", "sketch", "(2, 7)", "(3, 7)", "spec"]
    refuses(lambda: rl.merge(PARAMS, factors, bare, 2), *pieces)
    frozen = rl.Spec(2, rest="frozen")
    _, chain = rl.init_adapter(PARAMS, 2, key=0)
    refuses(lambda: rl.merge(PARAMS, factors, chain, frozen), "'bias'", "frozen", "spec")


def test_sketches_of_another_tree():
    sketches = rl.sample_sketch(PARAMS, 3, key=0)
    pieces = ["'body/kernel'", "(2, 7)", "(3, 7)", "sample_sketch"]
    refuses(lambda: rl.project(PARAMS, sketches, 2), *pieces)
    sketches = rl.sample_sketch(PARAMS, 2, key=0)
    refuses(lambda: rl.project(PARAMS, {}, 2), "'body/kernel'", "none", "sample_sketch")
    refuses(lambda: rl.lift({"x": jnp.ones(3)}, sketches, PARAMS, 2), "'x'", "params")


def test_a_gradient_that_is_not_finite_never_reaches_a_sketch():
    """The next finite step finds the sketches it would have found, and NaN nowhere."""
    spec = rl.Spec(2, resample_every=2)
    tx = rl.raclora(0.1, spec, inner=optax.identity(), key=0)
    clean = broken = tx.init(PARAMS)
    nans = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), PARAMS)
    for step in range(4):
        _, broken = tx.update(nans, broken, PARAMS)
        _, clean = tx.update(PARAMS, clean, PARAMS)
        found = broken.sketches.values["body/kernel"]
        np.testing.assert_array_equal(found, clean.sketches.values["body/kernel"])
        assert np.isfinite(found).all(), step
    updates, _ = tx.update(PARAMS, broken, PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_good_input_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx, state = transformation()
        tx.update(PARAMS, state, PARAMS)
