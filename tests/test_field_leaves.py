"""Methods that choose leaves, outputs or scales, and what every method refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import raclora_jax as rl
from raclora_jax import methods
from raclora_jax.methods import _heterolora

# Drawing with threefry compiles longer than all the rest.

SHAPES = {"a": (7, 5), "b": (9, 6), "c": (7, 5), "d": (7, 5)}


def params(shapes=None):
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(random.normal(size=shape), jnp.float32)
        for name, shape in (shapes or SHAPES).items()
    }


def quadratic(params, weights):
    """Each leaf its own least squares, as heavy as its weight."""
    terms = []
    for name, leaf in params.items():
        x = jnp.cos(jnp.arange(4.0 * leaf.shape[0])).reshape(4, -1)
        terms.append(weights[name] * jnp.mean((x @ leaf - 1) ** 2))
    return sum(terms)


EVEN = dict.fromkeys(SHAPES, 1.0)
# Two programs with equal sums have equal bits by it.
EQUAL_SUMS = (
    {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
)


def history(make, steps, weights, *, keys=(0,), start=None):
    """The weights before and after every step, for each key."""
    start = params() if start is None else start

    @functools.partial(jax.jit, compiler_options=EQUAL_SUMS)
    def step(key, state, weights):
        method = make(key)
        state, _ = method.step(state, quadratic, weights)
        return state, method.params(state)

    runs = []
    for key in map(jax.random.key, keys):
        state, shown = make(key).init(start), [start]
        for index in range(steps):
            given = weights(index) if callable(weights) else weights
            state, after = step(key, state, given)
            shown.append(after)
        runs.append([jax.tree.map(np.asarray, one) for one in shown])
    return runs


def who_moved(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


# rsLoRA


def test_rslora_is_flat_in_the_rank():
    """Change of the output in a first step of gradient descent, mean of 25 draws."""
    ranks, start = np.array([1, 32]), {"kernel": jnp.zeros((64, 6))}
    random = np.random.default_rng(2)
    x = jnp.asarray(random.normal(size=(1, 64)), jnp.float32)

    def loss(params):
        return jnp.sum((x @ params["kernel"] - 1) ** 2)

    def change(made, rank):
        own = rl.Spec(rank, side="left", alpha=16.0)
        method = made(1e-3, own, inner=optax.identity(), key=0)
        state = method.init(start)

        @jax.jit
        @jax.vmap
        def one(drawn):
            after, _ = method.step(state._replace(drawn={"kernel": drawn}), loss)
            return jnp.linalg.norm(x @ method.params(after)["kernel"])

        drawn = jnp.asarray(random.normal(size=(25, rank, 64)), jnp.float32)
        return float(jnp.mean(one(drawn)))

    def slope(made):
        sizes = [change(made, int(rank)) for rank in ranks]
        return np.polyfit(np.log(ranks), np.log(sizes), 1)[0]

    # x S S^T x^T / rank is a chi-square over its degrees of freedom: the mean of 25 at
    # rank 1 has a relative error of sqrt(2 / 25), the slope that over log 32.
    error = np.sqrt(2 / 25) / np.log(32)
    assert abs(slope(methods.rslora)) < 3 * error
    assert abs(slope(methods.lora) + 1) < 3 * error


def test_rslora_of_a_rule_takes_its_own_rank():
    own = rl.Spec(2, alpha=6.0, rules=[rl.Rule("b", rank=4), rl.Rule("d", alpha=3.0)])
    method = methods.rslora(1.0, own, key=0)
    state = method.init(params())
    ones = state._replace(zero={n: jnp.ones_like(z) for n, z in state.zero.items()})
    shown = method.params(ones)
    for name, alpha, rank in (("a", 6, 2), ("b", 6, 4), ("d", 3, 2)):
        change = np.array(shown[name] - params()[name])
        pair = np.max(np.abs(np.sum(state.drawn[name], axis=0)))
        np.testing.assert_allclose(
            np.abs(change).max(), alpha / np.sqrt(rank) * pair, rtol=1e-5
        )


# XGBLoRA


def test_xgblora_rank_is_how_often_a_leaf_was_drawn():
    def make(key):
        return methods.xgblora(0.1, 1, boosters=3, steps=9, leaves=2, key=key)

    with jax.enable_x64(True):
        start = {n: np.random.default_rng(0).normal(size=s) for n, s in SHAPES.items()}
        (weights,) = history(make, 9, EVEN, keys=(5,), start=start)
    drawn = [who_moved(weights[k], weights[k + 3]) for k in (0, 3, 6)]
    assert [len(names) for names in drawn] == [2, 2, 2]
    assert len({frozenset(names) for names in drawn}) > 1
    for booster in range(3):
        # Within a booster the leaves stay, and the others do not move by a bit.
        for step in range(3 * booster, 3 * booster + 3):
            assert who_moved(weights[step], weights[step + 1]) == drawn[booster]
    for name in SHAPES:
        times = sum(name in names for names in drawn)
        change = weights[-1][name] - weights[0][name]
        assert np.linalg.matrix_rank(change, tol=1e-9) == times


def test_xgblora_with_one_booster_on_all_leaves_is_lora_of_rank_one():
    def booster(key):
        return methods.xgblora(0.1, 1, boosters=1, steps=6, leaves=4, key=key)

    def lora(key):
        return methods.lora(0.1, 1, key=key)

    ends = [history(make, 6, EVEN)[0][-1] for make in (booster, lora)]
    for name in SHAPES:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])


# HeteroLoRA

PLANTED = EVEN | {"c": 30.0}


@pytest.mark.parametrize("score", ["grad_norm", "snip"])
def test_heterolora_gives_the_budget_to_the_planted_leaf(score):
    def make(key):
        return methods.heterolora(0.02, 2, score=score, search=4, key=key)

    (weights,) = history(make, 8, PLANTED)
    assert who_moved(weights[0], weights[4]) == set(SHAPES)
    assert all(who_moved(weights[k], weights[k + 1]) == {"c"} for k in range(4, 8))
    # The numbers of the planted leaf's pair are within what the method says it trains.
    assert 2 * (7 + 5) <= make(0).trained(params()) == 2 * (9 + 6)


def test_heterolora_constant_is_a_choice_at_random():
    def make(key):
        return methods.heterolora(0.02, 2, score="constant", search=1, key=key)

    runs = history(make, 2, PLANTED, keys=range(5))
    found = {frozenset(who_moved(*weights[1:])) for weights in runs}
    assert {len(names) for names in found} == {1}
    assert len(found) > 1


def test_heterolora_trap_at_the_start():
    """Where one factor is zero snip is 0 everywhere, and ties are settled by chance."""
    method = methods.lora(0.02, 2, key=0)

    @jax.jit
    def gradients(drawn, zero):
        def loss(drawn, zero):
            now = state._replace(drawn=drawn, zero=zero)
            return quadratic(method.params(now), PLANTED)

        return jax.grad(loss, (0, 1))(drawn, zero)

    state = method.init(params())
    brief = {name: jnp.full_like(zero, 0.01) for name, zero in state.zero.items()}
    for trained, zero in ((state, True), (state._replace(zero=brief), False)):
        pairs = trained.pairs
        moved = gradients(trained.drawn, trained.zero)
        moved = {p: {"drawn": moved[0][p], "zero": moved[1][p]} for p in pairs}
        snip = [float(_heterolora._snip(moved[p], pairs[p])) for p in pairs]
        assert (np.array(snip) == 0).all() == zero
        of_drawn = [np.any(np.asarray(g["drawn"])) for g in moved.values()]
        assert not any(of_drawn) if zero else all(of_drawn)
        keys = jax.random.split(jax.random.key(0), 16)
        best = {
            int(np.argmax(_heterolora.highest(jnp.array(snip), 1, key))) for key in keys
        }
        assert len(best) > 1 if zero else best == {list(pairs).index("c")}


def test_heterolora_dynamic_follows_what_matters_and_static_does_not():
    def weights_at(step):
        return PLANTED if step < 6 else EVEN | {"a": 30.0}

    def live(every):
        def make(key):
            return methods.heterolora(0.02, 2, search=3, every=every, key=key)

        (weights,) = history(make, 12, weights_at)
        return who_moved(*weights[4:6]), who_moved(*weights[11:13])

    assert live(None) == ({"c"}, {"c"})
    assert live(3) == ({"c"}, {"a"})


# ALLoRA


@pytest.mark.parametrize("side", ["left", "right"])
def test_allora_scales_the_outputs_in_both_gradients(side):
    eta, start = 4.0, params({"a": SHAPES["a"]})
    descent = {"inner": optax.identity(), "key": 0}
    lora = methods.lora(1.0, rl.Spec(2, side=side), **descent)
    allora = methods.allora(1.0, rl.Spec(2, side=side), eta=eta, **descent)
    state = allora.init(start)
    first = [m.step(state, quadratic, EVEN)[0].zero["a"] for m in (lora, allora)]
    np.testing.assert_allclose(first[1], eta * first[0], rtol=1e-5)
    # Later: with G = dL/dW, row norms of B A, and D over the outputs.
    random = np.random.default_rng(1)
    state = state._replace(
        drawn={"a": jnp.asarray(random.normal(size=state.drawn["a"].shape), jnp.float32)},
        zero={"a": jnp.asarray(random.normal(size=state.zero["a"].shape), jnp.float32)},
    )
    drawn, zero = (np.array(f["a"], np.float64) for f in (state.drawn, state.zero))
    inputs, outputs = (drawn, zero) if side == "left" else (zero, drawn)
    change = inputs.T @ outputs
    dense = jax.grad(quadratic)({"a": start["a"] + change}, EVEN)["a"]
    paced = np.array(dense) / np.sqrt(np.linalg.norm(change, axis=0) + 1 / eta**2)
    expected = outputs @ paced.T, inputs @ paced
    expected = expected if side == "left" else expected[::-1]
    after, loss = allora.step(state, quadratic, EVEN)
    # The forward pass is LoRA's.
    np.testing.assert_allclose(loss, lora.step(state, quadratic, EVEN)[1], rtol=1e-6)
    for name, gradient in zip(("drawn", "zero"), expected, strict=True):
        got = np.array(getattr(state, name)["a"] - getattr(after, name)["a"])
        np.testing.assert_allclose(got, gradient, rtol=2e-4, atol=1e-5)


def test_allora_leaves_the_gradient_of_the_input_alone():
    """A bias before the leaf has LoRA's gradient: zeros have joined its sums."""
    start = {"bias": jnp.arange(7.0) / 7, "a": params()["a"]}

    def loss(params):
        x = jnp.cos(jnp.arange(28.0)).reshape(4, 7) + params["bias"]
        return jnp.mean((x @ params["a"] - 1) ** 2)

    ends = []
    for name, options in (("lora", {}), ("allora", {"eta": 4.0})):
        method = getattr(methods, name)(1.0, 2, inner=optax.identity(), key=0, **options)
        state = method.init(start)
        state = state._replace(zero={"a": jnp.cos(jnp.arange(14.0)).reshape(2, 7)})
        # Operation by operation: two whole programs may join their sums otherwise.
        ends.append(method.step(state, loss)[0])
    biases = [np.asarray(end.dense["bias"]) for end in ends]
    np.testing.assert_array_max_ulp(*biases, maxulp=2)
    assert np.any(ends[0].zero["a"] != ends[1].zero["a"])


def test_adam_nearly_cancels_allora():
    start = params({"a": SHAPES["a"]})
    steps = []
    for method in (methods.lora(0.1, 2, key=0), methods.allora(0.1, 2, eta=4.0, key=0)):
        steps.append(method.step(method.init(start), quadratic, EVEN)[0].zero["a"])
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-3)


# What is refused


NARROW = {"narrow": jax.ShapeDtypeStruct((9, 2), "float32")}
LEFT = rl.Spec(3, side="left")
BAD_ARGUMENTS = {
    "threshold below zero": (
        lambda: methods.sora(0.1, 2, threshold=-0.1, key=0),
        ["threshold", "at least 0", "-0.1"],
    ),
    "decay below zero": (
        lambda: methods.sora(0.1, 2, weight_decay=-1.0, key=0),
        ["weight_decay", "at least 0"],
    ),
    "boosters that do not divide": (
        lambda: methods.xgblora(0.1, 1, boosters=3, steps=10, leaves=1, key=0),
        ["boosters=3", "steps=10"],
    ),
    "boosters of rank 2": (
        lambda: methods.xgblora(0.1, 2, boosters=2, steps=10, leaves=1, key=0),
        ["rank 1", "rank 2"],
    ),
    "no boosters": (
        lambda: methods.xgblora(0.1, 1, boosters=0, steps=10, leaves=1, key=0),
        ["boosters", "at least 1"],
    ),
    "half a leaf": (
        lambda: methods.xgblora(0.1, 1, boosters=2, steps=10, leaves=0.5, key=0),
        ["leaves", "int"],
    ),
    "budget above all": (
        lambda: methods.heterolora(0.1, 2, budget=2, key=0),
        ["budget", "at most 1"],
    ),
    "budget of nothing": (
        lambda: methods.heterolora(0.1, 2, budget=0.0, key=0),
        ["budget", "above 0"],
    ),
    "unknown score": (
        lambda: methods.heterolora(0.1, 2, score="synflow", key=0),
        ["score", "snip", "'synflow'"],
    ),
    "snip at the start": (
        lambda: methods.heterolora(0.1, 2, score="snip", search=1, key=0),
        ["search=1", "snip", "grad_norm"],
    ),
    "eta of zero": (
        lambda: methods.allora(0.1, 2, eta=0.0, key=0),
        ["eta", "positive"],
    ),
    "no alpha to root": (
        lambda: methods.rslora(0.1, 2, key=0),
        ["alpha=None", "Spec(2, alpha=16)"],
    ),
    "alpha of a side": (
        lambda: methods.rslora(0.1, rl.Spec(2, alpha="dim"), key=0),
        ["alpha='dim'"],
    ),
    "unknown form": (
        lambda: methods.lora_pro(0.1, 2, form="momentum", key=0),
        ["form", "'momentum'"],
    ),
}
BAD_LEAVES = {
    "lora_pro above a side": (
        methods.lora_pro(0.1, LEFT, key=0),
        NARROW,
        ["'narrow'", "rank 3", "side of 2"],
    ),
    "lora_pro sgd above a side": (
        methods.lora_pro(0.1, LEFT, form="sgd", key=0),
        NARROW,
        ["'narrow'", "rank 3"],
    ),
    "lora_rite above a side": (
        methods.lora_rite(0.1, LEFT, key=0),
        NARROW,
        ["'narrow'", "rank 3", "side of 2"],
    ),
    "above the sketched side": (
        methods.dora(0.1, rl.Spec(2, rules=[rl.Rule("narrow", rank=3)]), key=0),
        NARROW,
        ["'narrow'", "rank 3"],
    ),
    "scaled allora": (
        methods.allora(0.1, rl.Spec(2, alpha=4.0), eta=2.0, key=0),
        params(),
        ["'a'", "scaling 2"],
    ),
    "budget below one leaf": (
        methods.heterolora(0.1, 2, budget=0.2, key=0),
        params(),
        ["budget=0.2", "4 leaves", "0.25"],
    ),
    "more leaves than there are": (
        methods.xgblora(0.1, 1, boosters=2, steps=10, leaves=5, key=0),
        params(),
        ["leaves=5", "4 leaves"],
    ),
    "dense leaf handed to a pair": (
        methods.dora(0.1, rl.Spec(2, rules=[rl.Rule("a", mode="dense")]), key=0),
        {"a": jnp.ones((7, 5))},
        ["'a'", "dense", "pair"],
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    call, words = BAD_ARGUMENTS[case]
    assert "\n" not in refuses(call, *words)


@pytest.mark.parametrize("case", BAD_LEAVES)
def test_bad_leaves(case):
    """Before any compute: shapes are enough to refuse them."""
    method, given, words = BAD_LEAVES[case]
    assert "\n" not in refuses(lambda: jax.eval_shape(method.init, given), *words)
    assert "\n" not in refuses(lambda: method.trained(given), *words)
