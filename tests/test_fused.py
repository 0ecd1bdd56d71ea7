"""The update inside the backward pass takes the steps of the factor form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import KEY, assert_same
from cases import CASES
from helpers import repeat, with_repeats
from jax import lax

import raclora_jax as rl
from raclora_jax._autodiff.reads import scanned_once
from raclora_jax._autodiff.stage import stage

LAYERS, DIM, HIDDEN, OUT = 3, 10, 14, 6
RULES = {
    "identity": optax.identity(),
    "adam": optax.scale_by_adam(eps=0.1),
    "trace": optax.trace(0.9),
    "orthogonal": rl.orthogonal(),
    "orthogonal with momentum": rl.orthogonal(
        momentum=0.9, second_moment=True, memory=0.5
    ),
    "orthogonal in blocks": rl.orthogonal(memory=0.5, block_size=2),
}


def weights(dtype=jnp.float32, seed=0):
    shapes = {
        "embedding": (7, DIM),
        "head": (DIM, OUT),
        "up": (LAYERS, DIM, HIDDEN),
        "down": (LAYERS, DIM, HIDDEN),  # stored turned
        "scale": (LAYERS, DIM),
        "bias": (OUT,),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: (jax.random.normal(key, shape) / 3).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss_of(model):
    """Two matrices a layer, one of them used twice, under a scan or layer after layer."""

    def layer(x, own):
        hidden = jnp.tanh((x * (1 + own["scale"])) @ own["up"])
        x = x + hidden @ own["down"].T
        return x + jnp.sin(x) @ own["up"] @ own["down"].T / 10, jnp.mean(hidden)

    def loss(params, tokens, targets):
        x = params["embedding"][tokens]
        stack = {name: params[name] for name in ("up", "down", "scale")}
        if model == "unrolled":
            means = []
            for index in range(LAYERS):
                x, mean = layer(x, jax.tree.map(lambda a: a[index], stack))  # noqa: B023
                means.append(mean)
            means = jnp.stack(means)
        else:
            one = jax.checkpoint(layer) if model == "remat" else layer
            x, means = lax.scan(one, x, stack)
        y = x @ params["head"] + params["bias"]
        return jnp.mean((y - targets) ** 2) + jnp.sum(means**2) / 10

    return loss


def batch(seed=5):
    first, second = jax.random.split(jax.random.key(seed))
    return jax.random.randint(first, (8,), 0, 7), jax.random.normal(second, (8, OUT))


def forms(loss, tx, spec, has_aux=False):
    """The step of the fused form and of the factor form, compiled."""
    grad_fn = rl.value_and_grad(loss, spec, has_aux=has_aux)

    def by_parts(params, state, *args):
        value, grads = grad_fn(params, state, *args)
        updates, state = tx.update(grads, state, params)
        return rl.apply_updates(params, updates), state, value

    return jax.jit(rl.fused_step(loss, tx, has_aux=has_aux)), jax.jit(by_parts)


def go_on(step, params, state, steps, *args):
    for _ in range(steps):
        params, state, value = step(params, state, *args)
    return params, state, value


def both(model, tx, spec, steps, dtype=jnp.float32):
    params, args = weights(dtype), batch()
    state = tx.init(params)
    return [
        go_on(step, params, state, steps, *args)
        for step in forms(loss_of(model), tx, spec)
    ]


def moved_in_scans(loss, params, *args):
    """The leaves that a scan updates."""
    leaves = sorted(params)  # as trees are flattened
    found = scanned_once(stage(lambda p: loss(p, *args), params).jaxpr)
    return {leaves[place] for place in found}


CELLS = [
    ("block", "left", "orthogonal", "scan"),
    ("block", "smaller", "identity", "remat"),
    ("coordinate", "right", "adam", "scan"),
    ("orthonormal", "left", "orthogonal with momentum", "remat"),
    ("orthonormal", "smaller", "trace", "unrolled"),
    ("block", "right", "orthogonal with momentum", "unrolled"),
]
LAWS = ("block", "coordinate", "orthonormal")
PRODUCT = [
    repeat(law, side, rule, model)
    for law in LAWS
    for side in ("left", "right", "smaller")
    for rule in RULES
    for model in ("unrolled", "scan", "remat")
    if (law, side, rule, model) not in CELLS
]


@pytest.mark.parametrize(("law", "side", "rule", "model"), [*CELLS, *PRODUCT])
def test_fifty_steps_over_links(law, side, rule, model):
    params, args = weights(), batch()
    spec = rl.trace_spec(
        loss_of(model), params, *args, rank=3, side=side, sketch=law, resample_every=20
    )
    tx = rl.raclora(
        optax.linear_schedule(2e-2, 1e-3, 50),
        spec,
        inner=RULES[rule],
        weight_decay=0.1,
        mask={"head": False, **dict.fromkeys(params.keys() - {"head"}, True)},
        key=KEY,
    )
    fused, parts = both(model, tx, spec, 50)
    assert_same(fused, parts, 1e-6)
    assert int(fused[1].link) == 2


ROUNDINGS = ("stochastic", "nearest", "master")


# A rank that divides the rows moves slices of the carried leaf, where nothing decays.
@pytest.mark.parametrize(
    ("rounding", "rule", "rank", "decay"),
    [
        ("stochastic", "identity", 2, 0.0),
        ("stochastic", "adam", 3, 0.1),
        ("nearest", "identity", 2, 0.0),
        repeat("nearest", "adam", 3, 0.1),
        repeat("master", "identity", 2, 0.0),
        ("master", "adam", 3, 0.1),
        *(repeat(rounding, "identity", 3, 0.1) for rounding in ROUNDINGS),
        *(repeat(rounding, "adam", 2, 0.0) for rounding in ROUNDINGS),
    ],
)
def test_sixteen_bits_are_the_same_bits(rounding, rule, rank, decay):
    params, args = weights(jnp.bfloat16), batch()
    spec = rl.trace_spec(
        loss_of("remat"), params, *args, rank=rank, rounding=rounding, resample_every=7,
        sketch="block",
    )  # fmt: skip
    tx = rl.raclora(1e-2, spec, inner=RULES[rule], weight_decay=decay, key=KEY)
    fused, parts = both("remat", tx, spec, 20, jnp.bfloat16)
    for name in ("up", "down"):
        np.testing.assert_array_equal(fused[0][name], parts[0][name])


@pytest.mark.parametrize("model", ["unrolled", "remat"])
def test_gradients_in_the_dtype_of_their_weights(model):
    """The program holds no gradient of a factor in float32, and its step is the same
    to the rounding of a gradient; for float32 weights it is the same program."""
    loss, args = loss_of(model), batch()
    params = weights(jnp.bfloat16)
    spec = rl.trace_spec(
        loss, params, *args, rank=3, side="right", rounding="nearest", sketch="block"
    )
    tx = rl.raclora(0.1, spec, inner=optax.identity(), key=KEY)
    wide = rl.fused_step(loss, tx)
    low = rl.fused_step(loss, tx, low_gradients=True)
    state = tx.init(params)
    programs = [jax.jit(one).trace(params, state, *args) for one in (wide, low)]
    # By a factor's own shape: no other product gives (rank, rows).
    products = [str(program.jaxpr).count("f32[3,7]") for program in programs]
    assert products[0] > products[1]
    moved = [one.lower().compile()(params, state, *args)[0] for one in programs]
    for name, start in params.items():
        one, other = (np.float32(new[name]) for new in moved)
        step = np.max(np.abs(one - np.float32(start)))
        assert step > 0
        ulp = np.max(np.abs(np.float32(start))) * 2.0**-8
        assert np.max(np.abs(one - other)) <= 2.0**-6 * step + ulp
    params = weights()
    tx = rl.raclora(0.1, dataclasses.replace(spec, rounding="auto"), key=KEY)
    start = params, tx.init(params), *args
    same = [
        str(jax.make_jaxpr(rl.fused_step(loss, tx, low_gradients=low))(*start))
        for low in (False, True)
    ]
    assert same[0] == same[1]


def test_a_run_changes_form_in_the_middle_of_a_link():
    params, args = weights(), batch()
    spec = rl.trace_spec(
        loss_of("scan"), params, *args, rank=3, resample_every=6, sketch="block"
    )
    tx = rl.raclora(1e-2, spec, inner=RULES["orthogonal with momentum"], key=KEY)
    fused, parts = forms(loss_of("scan"), tx, spec)
    start = params, tx.init(params)
    mixed = start
    for step in (parts, fused, parts):
        mixed = go_on(step, *mixed[:2], 4, *args)
    assert_same(mixed, go_on(parts, *start, 12, *args), 1e-6)


@pytest.mark.smoke
def test_only_what_one_scan_reads_moves_in_it():
    params, args = weights(), batch()
    for model in ("scan", "remat"):
        moved = moved_in_scans(loss_of(model), params, *args)
        assert moved == {"up", "down", "scale"}
    assert not moved_in_scans(loss_of("unrolled"), params, *args)

    def twice(params, *args):
        return loss_of("scan")(params, *args) + jnp.sum(params["up"] ** 2)

    assert moved_in_scans(twice, params, *args) == {"down", "scale"}


SCANNED = [
    name
    for name, case in CASES.items()
    if re.search("scan(?!.*policy)|policy none|loop|switch", name) and not case.has_aux
]


@pytest.mark.filterwarnings("ignore:these uses of adapted leaves")
@pytest.mark.parametrize("name", with_repeats(CASES, *CASES.keys() - SCANNED))
def test_cases(name):
    """One step of every way to use a weight, in float64."""
    with jax.enable_x64(True):
        case = CASES[name]
        params, args = case.inputs()
        index = list(CASES).index(name)
        law = ("orthonormal", "block")[index // 2 % 2]
        spec = case.spec(2, ("left", "right")[index % 2], law)
        tx = rl.raclora(0.1, spec, inner=RULES["trace"], key=KEY)
        fused, parts = forms(case.loss, tx, spec, case.has_aux)
        state = tx.init(params)
        got, want = fused(params, state, *args), parts(params, state, *args)
        assert_same(got, want, max(1e-13, case.tolerance))
        pairs = zip(jax.tree.leaves(want[0]), jax.tree.leaves(params), strict=True)
        # A block may be of rows that the loss does not read.
        assert law == "block" or any(np.any(new != old) for new, old in pairs)


@pytest.mark.smoke
def test_no_gradient_of_a_layer_outlives_it():
    """No array in the program has the shape of all the factors of a stacked leaf."""
    params, args = weights(), batch()
    spec = rl.trace_spec(
        loss_of("scan"), params, *args, rank=3, side="left", sketch="block"
    )
    tx = rl.raclora(1e-2, spec, inner=rl.orthogonal(), key=KEY)
    fused, parts = forms(loss_of("scan"), tx, spec)
    state = tx.init(params)
    stacked = f"f32[{LAYERS},3,{HIDDEN}]"
    texts = [
        step.lower(params, state, *args).compile().as_text() for step in (fused, parts)
    ]
    assert stacked not in texts[0]
    assert stacked in texts[1]


@pytest.mark.smoke
@pytest.mark.parametrize("model", ["scan", "remat", "unrolled"])
def test_no_weight_stands_twice(model):
    """What a step holds beside the weights, all rows moving, is less than the weights."""
    layers, width = 8, 64
    shapes = dict.fromkeys(("up", "down"), (layers, width, width))
    if model == "unrolled":
        shapes = {f"{n}{i}": (width, width) for n in shapes for i in range(layers)}
    params = {n: jax.ShapeDtypeStruct(shape, "float32") for n, shape in shapes.items()}

    def layer(x, own):
        up, down = own
        return x + jnp.tanh(x @ up) @ down, None

    def loss(params, x):
        one = jax.checkpoint(layer) if model == "remat" else layer
        if model == "unrolled":
            for index in range(layers):
                x, _ = one(x, (params[f"up{index}"], params[f"down{index}"]))
        else:
            x, _ = lax.scan(one, x, (params["up"], params["down"]))
        return jnp.mean(x**2)

    x = jax.ShapeDtypeStruct((4, width), "float32")
    rules = [rl.Rule(".*", mode="full")]
    spec = rl.trace_spec(loss, params, x, rank=2, rules=rules, side="left")
    tx = rl.raclora(1e-2, spec, inner=optax.identity(), key=KEY)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(rl.fused_step(loss, tx), donate_argnums=(0, 1))
    memory = step.lower(params, state, x).compile().memory_analysis()
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def test_what_is_made_of_a_weight_is_made_again():
    """A scan would keep what each layer casts, for all layers: the weights once more."""
    params = {"up": jnp.ones((LAYERS, DIM, DIM), jnp.bfloat16)}

    def loss(params, x):
        def layer(x, up):
            return jnp.tanh(x @ up.astype(jnp.float32)), None

        return jnp.mean(lax.scan(layer, x, params["up"])[0] ** 2)

    x = jnp.ones((4, DIM))
    spec = rl.trace_spec(loss, params, x, rank=3, sketch="block")
    tx = rl.raclora(1e-2, spec, key=KEY)
    fused, parts = forms(loss, tx, spec)
    state = tx.init(params)
    texts = [str(jax.make_jaxpr(step)(params, state, x)) for step in (fused, parts)]
    wide = f"f32[{LAYERS},{DIM},{DIM}]"
    assert wide not in texts[0]
    assert wide in texts[1]
    assert_same(fused(params, state, x), parts(params, state, x), 1e-6)


@pytest.mark.parametrize("rule", with_repeats(RULES, "trace", "orthogonal"))
def test_whole_matrices(rule):
    """All rows at once: the plain step of the rule on the whole gradient."""
    params, args = weights(), batch()
    loss = loss_of("remat")
    spec = rl.trace_spec(loss, params, *args, rank=2, rules=[rl.Rule(".*", mode="full")])
    tx = rl.raclora(1e-2, spec, inner=RULES[rule], key=KEY)
    fused, parts = both("remat", tx, spec, 12)
    assert_same(fused, parts, 1e-6)
    if rule == "identity":
        dense, gradient = params, jax.jit(jax.grad(loss))
        for _ in range(12):
            grads = gradient(dense, *args)
            dense = jax.tree.map(lambda w, g: w - 1e-2 * g, dense, grads)
        assert_same(fused[0], dense, 1e-6)


@pytest.mark.smoke
def test_outside_of_jit_it_says_what_two_copies_take():
    params, x = {"up": weights()["up"][:, :, :DIM]}, jnp.ones((4, DIM))

    def loss(params, x):
        x, _ = lax.scan(lambda x, up: (jnp.tanh(x @ up), None), x, params["up"])
        return jnp.mean(x**2)

    spec = rl.trace_spec(loss, params, x, rank=3)
    tx = rl.raclora(1e-2, spec, inner=optax.identity(), key=KEY)
    step, state = rl.fused_step(loss, tx), tx.init(params)
    with pytest.warns(UserWarning, match=r"0\.0 MiB more.*donate_argnums"):
        eager = step(params, state, x)
    assert_same(eager, jax.jit(step)(params, state, x), 1e-6)


def test_a_clip_of_each_matrix():
    params, args = weights(), batch()
    spec = rl.trace_spec(loss_of("scan"), params, *args, rank=3, sketch="block")
    largest = 0.02
    tx = rl.raclora(1.0, spec, inner=rl.clip_by_matrix_norm(largest), key=KEY)
    fused, parts = (
        go_on(step, params, tx.init(params), 1, *args)
        for step in forms(loss_of("scan"), tx, spec)
    )
    assert_same(fused, parts, 1e-6)
    grad_fn = jax.jit(rl.grad(loss_of("scan"), spec))
    grads = grad_fn(params, tx.init(params), *args)
    for name in ("up", "down", "head"):
        factor = np.asarray(grads[name].value, np.float64)
        before = np.linalg.norm(factor, axis=(-2, -1))
        moved = np.asarray(params[name] - fused[0][name], np.float64)
        after = np.linalg.norm(moved, axis=(-2, -1))
        # Rows of a sketch are orthonormal: a factor is as long as its lift.
        np.testing.assert_allclose(after, np.minimum(before, largest), rtol=1e-4)
    assert np.any(before > largest)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), True, "1"])
def test_clips_that_are_none(norm):
    error = TypeError if isinstance(norm, bool | str) else ValueError
    with pytest.raises(error, match="max_norm must be"):
        rl.clip_by_matrix_norm(norm)


# What is not finite --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing():
    params, args = weights(jnp.bfloat16), batch()
    spec = rl.trace_spec(loss_of("scan"), params, *args, rank=3, sketch="block")

    def loss(params, tokens, targets, size, beside):
        return loss_of("scan")(params, tokens, targets) * size + beside

    tx = rl.raclora(1e-2, spec, weight_decay=0.1, key=KEY)
    step = jax.jit(rl.fused_step(loss, tx))
    params, state, _ = step(params, tx.init(params), *args, 1.0, 0.0)
    # In the last two the gradients are finite.
    for bad in ((jnp.nan, 0.0), (jnp.inf, 0.0), (1.0, jnp.nan), (1.0, -jnp.inf)):
        new, after, value = step(params, state, *args, *bad)
        assert not np.isfinite(value)
        assert_same(new, params, 0)
        # Two leaves of three matrices each, embedding, head, scale and bias.
        assert int(after.skipped) == int(state.skipped) + 2 * LAYERS + 4
        assert_same(after._replace(skipped=state.skipped), state, 0)


@pytest.mark.smoke
def test_a_gradient_that_is_not_finite_leaves_its_matrix():
    """The cotangent of one layer is NaN: it and those below stay, those above move."""
    params, args = weights(), batch()

    @jax.custom_vjp
    def spoiled(x, bad):
        return x

    spoiled.defvjp(
        lambda x, bad: (x, bad), lambda bad, ct: (jnp.where(bad, jnp.nan, ct), None)
    )

    def loss(params, tokens, targets, bad):
        def layer(x, own):
            index, up, down = own
            x = x + jnp.tanh(x @ up) @ down.T
            return spoiled(x, index == bad), None

        stack = jnp.arange(LAYERS), params["up"], params["down"]
        x, _ = lax.scan(layer, params["embedding"][tokens], stack)
        return jnp.mean((x @ params["head"] + params["bias"] - targets) ** 2)

    del params["scale"]
    spec = rl.trace_spec(loss, params, *args, 0, rank=3, sketch="block")
    tx = rl.raclora(1e-2, spec, weight_decay=0.1, key=KEY)
    step, start = jax.jit(rl.fused_step(loss, tx)), tx.init(params)
    for bad in range(LAYERS):
        new, state, _ = step(params, start, *args, bad)
        for name in ("up", "down"):
            same = [
                np.array_equal(a, b) for a, b in zip(new[name], params[name], strict=True)
            ]
            assert same == [layer <= bad for layer in range(LAYERS)]
            moments = np.asarray(state.inner_state.lowrank.mu[name])
            assert [not m.any() for m in moments] == same
        assert np.array_equal(new["embedding"], params["embedding"])
        assert not np.array_equal(new["head"], params["head"])
        assert int(state.skipped) == 2 * (bad + 1) + 1
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((new, state)))


# What is refused -----------------------------------------------------------------------


def unit(axes):
    """A rule that normalises matrices, or all that it is given."""

    def update(updates, state, params=None):
        def one(factor):
            size = jnp.linalg.norm(factor, axis=axes, keepdims=axes is not None)
            return factor / jnp.maximum(size, 1e-6)

        return jax.tree.map(one, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_a_rule_that_says_it_acts_on_each_matrix():
    params, args = weights(), batch()
    del params["bias"], params["scale"]
    full = weights()

    def loss(params, *args):
        return loss_of("scan")(full | params, *args)

    spec = rl.trace_spec(loss, params, *args, rank=3, sketch="block")
    rule = rl.per_matrix(unit((-2, -1)))
    tx = rl.raclora(1e-2, spec, inner=rule, key=KEY)
    state = tx.init(params)
    fused, parts = (
        go_on(step, params, state, 5, *args) for step in forms(loss, tx, spec)
    )
    assert_same(fused, parts, 1e-6)


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (unit((-2, -1)), "per_matrix"),
        (optax.clip_by_global_norm(1.0), "per_matrix"),
        (optax.clip_by_block_rms(1.0), "per_matrix"),
        (optax.add_noise(0.1, 0.5, 0), "per_matrix"),
        (optax.chain(optax.scale_by_adam(), optax.centralize()), "per_matrix"),
        (
            optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation(),
            "MultiSteps",
        ),
    ],
)
def test_rules_that_are_not_known_to_act_on_each_matrix(inner, said):
    tx = rl.raclora(1e-2, 3, inner=inner, key=KEY)
    with pytest.raises(ValueError, match=said):
        rl.fused_step(loss_of("scan"), tx)


@pytest.mark.parametrize(
    "inner",
    [
        None,
        optax.scale_by_lion(),
        optax.scale_by_rms(),
        optax.scale_by_sign(),
        optax.chain(
            optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.5, nesterov=True)
        ),
        optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8),
    ],
)
def test_rules_that_work_number_by_number(inner):
    rl.fused_step(loss_of("scan"), rl.raclora(1e-2, 3, inner=inner, key=KEY))


def test_what_stands_around_raclora():
    tx = rl.raclora(1e-2, 3, key=KEY)
    for around in (
        optax.chain(optax.clip_by_global_norm(1.0), tx),
        optax.apply_if_finite(tx, 3),
        optax.MultiSteps(tx, 2),
        rl.scale_by_raclora(3, key=KEY),
    ):
        with pytest.raises(TypeError, match=r"what raclora.* returned"):
            rl.fused_step(loss_of("scan"), around)
    with pytest.raises(ValueError, match="clip_norm"):
        rl.fused_step(loss_of("scan"), rl.raclora(1e-2, 3, clip_norm=1.0, key=KEY))


def test_states_of_other_transformations():
    params, args = weights(), batch()
    tx = rl.raclora(1e-2, rl.trace_spec(loss_of("scan"), params, *args, rank=3), key=KEY)
    step = rl.fused_step(loss_of("scan"), tx)
    alone = optax.chain(tx).init(params)
    assert isinstance(jax.eval_shape(step, params, alone, *args)[1], tuple)
    beside = optax.chain(tx, optax.ema(0.9)).init(params)
    with pytest.raises(ValueError, match="beside the state of raclora"):
        jax.eval_shape(step, params, beside, *args)


def test_a_per_matrix_rule_that_keeps_something_of_all_at_once():
    def init(params):
        return jax.tree.map(lambda leaf: jnp.zeros(2), params)

    rule = rl.per_matrix(optax.GradientTransformation(init, lambda g, s, p=None: (g, s)))
    params, args = weights(), batch()
    spec = rl.trace_spec(loss_of("scan"), params, *args, rank=3)
    tx = rl.raclora(1e-2, spec, inner=rule, key=KEY)
    with pytest.raises(ValueError, match=r"'down'.*does not act on each"):
        jax.eval_shape(rl.fused_step(loss_of("scan"), tx), params, tx.init(params), *args)


def test_a_rule_that_counts_for_each_matrix():
    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.int32), params)

    def update(grads, state, params=None):
        return grads, jax.tree.map(lambda count: count + 1, state)

    rule = rl.per_matrix(optax.GradientTransformation(init, update))
    params, args = weights(), batch()
    spec = rl.trace_spec(loss_of("scan"), params, *args, rank=3)
    tx = rl.raclora(1e-2, spec, inner=rule, key=KEY)
    with pytest.raises(ValueError, match="'down': inner keeps an array of int32"):
        jax.eval_shape(rl.fused_step(loss_of("scan"), tx), params, tx.init(params), *args)


@pytest.mark.parametrize("word", ["rank", "alpha", "sketch"])
def test_whole_matrices_have_no_sketch(word):
    value = {"rank": 3, "alpha": 2.0, "sketch": "block"}[word]
    with pytest.raises(ValueError, match=f"{word}=.*moves all rows"):
        rl.Rule("up", mode="full", **{word: value})
