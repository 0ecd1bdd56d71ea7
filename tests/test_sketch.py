"""Sketches: a pure function of key, path, link and stack index, with the right mean.

Statistical claims are judged by z-scores: the deviation from the claim over its standard
error, taken from the sample itself. 5 is above the largest of a few hundred correct ones.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import repeat, with_repeats
from jax import lax

import raclora_jax as rl
from raclora_jax._core import keys, select, sketch
from raclora_jax._core.cholesky import inverse_cholesky
from raclora_jax._core.spec import SKETCHES

PROJECTORS = tuple(name for name in SKETCHES if name != "gaussian_raw")
MAX_Z = 5.0
# What a float32 draw may differ by when the compiler orders its sums in another way.
COMPILED = 1e-5


def spec_of(name, rank=3, **fields):
    return rl.Spec(rank, sketch=name, **fields)


def tree():
    return {"head": jnp.zeros((9, 5)), "body": {"kernel": jnp.zeros((6, 11))}}


def z_scores(draws, expected):
    """Deviation of the mean over the first axis, in standard errors."""
    error = draws.std(axis=0) / np.sqrt(len(draws))
    return (draws.mean(axis=0) - expected) / np.maximum(error, 1e-9)


def projectors(sketches):
    """H = S^+ S of every sketch (n, rank, dim), in float64."""
    wide = np.asarray(sketches, np.float64)
    gram = np.einsum("nri,nsi->nrs", wide, wide)
    return np.einsum("nri,nrj->nij", wide, np.linalg.solve(gram, wide))


def explicit(sketches, spec, params):
    """The sketches as arrays, also where rows are picked."""
    plans = rl.plan(spec, params)
    return {path: reference.explicit(s, plans[path]) for path, s in sketches.items()}


def held(sketch):
    """The array that a sketch is, or keeps its picks in."""
    (array,) = jax.tree.leaves(sketch)
    return np.asarray(array)


def test_the_registries_have_exactly_the_named_laws():
    assert {*sketch._LAWS, *sketch._PICKING_LAWS} == {*SKETCHES}


@pytest.mark.parametrize("name", with_repeats(SKETCHES, "rademacher"))
def test_other_leaves_and_tree_order_do_not_enter(name):
    leaves = [("head", (9, 5)), ("body", (6, 11)), ("other", (4, 7)), ("bias", (11,))]

    def drawn(pairs):
        params = collections.OrderedDict((k, jnp.zeros(shape)) for k, shape in pairs)
        return rl.sample_sketch(params, spec_of(name), key=5)

    few, many, turned = drawn(leaves[:2]), drawn(leaves), drawn(leaves[::-1])
    assert list(many) != list(turned)
    for path in few:
        np.testing.assert_array_equal(held(few[path]), held(many[path]))
        np.testing.assert_array_equal(held(few[path]), held(turned[path]))
    assert many["bias"] == optax.MaskedNode()
    # Two leaves of one shape under two names differ, and so do two links and two keys.
    twins = {"head": jnp.zeros((9, 5)), "tail": jnp.zeros((9, 5))}
    first = rl.sample_sketch(twins, spec_of(name), key=5)
    np.testing.assert_array_equal(held(first["head"]), held(few["head"]))
    others = [
        first["tail"],
        rl.sample_sketch(twins, spec_of(name), key=5, link=1)["head"],
        rl.sample_sketch(twins, spec_of(name), key=6)["head"],
    ]
    for other in others:
        assert np.abs(held(other) - held(first["head"])).max() > 1e-2


@pytest.mark.parametrize("name", with_repeats(SKETCHES, "rademacher"))
def test_the_process_and_its_transformations_do_not_enter(name):
    def drawn():
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree())
        return rl.sample_sketch(params, spec_of(name), key=3, link=2)

    def in_cond():
        draw = lambda: rl.sample_sketch(tree(), spec_of(name), key=3, link=2)  # noqa: E731
        zeros = lambda: jax.tree.map(jnp.zeros_like, draw())  # noqa: E731
        return lax.cond(jnp.asarray(True), draw, zeros)

    want = drawn()
    for flag in (False, True):
        with jax.threefry_partitionable(flag):
            jax.tree.map(np.testing.assert_array_equal, drawn(), want)
    with jax.default_prng_impl("rbg"):
        jax.tree.map(np.testing.assert_array_equal, drawn(), want)
    with jax.enable_x64(True):
        with_x64 = drawn()
    dtype = "int32" if name in select.PICKING_LAWS else "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(with_x64)} == {jnp.dtype(dtype)}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=COMPILED)  # noqa: E731
    jax.tree.map(close, with_x64, want)
    with jax.threefry_partitionable(False):
        jax.tree.map(close, jax.jit(drawn)(), want)
    jax.tree.map(close, jax.jit(in_cond)(), want)


def test_a_float64_leaf_is_drawn_in_float64():
    with jax.enable_x64(True):
        S = rl.sample_sketch(jnp.zeros((40, 31), jnp.float64), 5, key=0)
        assert S.dtype == jnp.float64
        np.testing.assert_allclose(S @ S.T, np.eye(5), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SKETCHES)
def test_a_slice_of_a_stack_depends_on_its_index_only(name):
    def drawn(layers, axis):
        shape = [6, 9]
        shape.insert(axis, layers)
        rule = rl.Rule("kernel", rows=1 if axis == 0 else 0, batch=axis)
        spec = spec_of(name, rules=[rule])
        params = {"kernel": jnp.zeros(shape)}
        return explicit(rl.sample_sketch(params, spec, key=1), spec, params)["kernel"]

    five = drawn(5, axis=0)
    assert five.shape == (5, 3, 6)
    np.testing.assert_allclose(drawn(3, axis=0), five[:3], rtol=0, atol=COMPILED)
    np.testing.assert_allclose(drawn(5, axis=1), five, rtol=0, atol=COMPILED)
    gaps = [np.abs(five[i] - five[j]).max() for i in range(5) for j in range(i)]
    # Of two blocks some pairs are the same.
    assert (max if name == "block" else min)(gaps) > 1e-2


@pytest.mark.parametrize("name", with_repeats(SKETCHES, "rademacher", "coordinate"))
def test_drawn_together_or_alone(name):
    """Leaves of one kind are drawn as one stack, which enters none of their values."""
    params = {f"layer_{i}": jnp.zeros((40, 64)) for i in range(3)}
    params |= {"stack": jnp.zeros((2, 64, 40)), "other": jnp.zeros((9, 5))}
    spec = spec_of(name, rules=[rl.Rule("stack", batch=0)])
    plans = rl.plan(spec, params)
    data = keys.key_data(4)
    together = sketch.draw_all(data, 2, plans.values())
    assert list(together) == list(plans)
    for path, plan in plans.items():
        alone = sketch.draw(data, 2, plan)
        both = held(together[path]), held(alone)
        np.testing.assert_allclose(*both, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 16, 17, 40])
def test_inverse_cholesky(rank):
    draws = np.random.default_rng(rank).normal(size=(3, rank, 2 * rank))
    gram = draws @ draws.mT
    want = np.linalg.inv(np.linalg.cholesky(gram))
    with jax.enable_x64(True):
        got = inverse_cholesky(jnp.asarray(gram))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())
    np.testing.assert_array_equal(got, np.tril(got))
    singular = inverse_cholesky(jnp.ones((2, 2)))
    assert not bool(jnp.all(jnp.diagonal(singular) < 1e2))


def test_two_stack_axes_count_in_row_major_order():
    rule = rl.Rule("experts", rows=2, batch=(0, 1))
    S = rl.sample_sketch(
        {"experts": jnp.zeros((2, 3, 6, 9))}, rl.Spec(2, rules=[rule]), key=1
    )
    flat = rl.Rule("experts", rows=1, batch=0)
    T = rl.sample_sketch(
        {"experts": jnp.zeros((6, 6, 9))}, rl.Spec(2, rules=[flat]), key=1
    )
    np.testing.assert_array_equal(S["experts"].reshape(6, 2, 6), T["experts"])


def test_axes_of_the_sketched_side_are_kept():
    """A sketch over (heads, head_dim) is that over their product, unflattened."""
    spread = rl.Spec(4, rules=[rl.Rule("out", rows=(0, 1))])
    S = rl.sample_sketch({"out": jnp.zeros((2, 3, 10))}, spread, key=8)["out"]
    T = rl.sample_sketch({"out": jnp.zeros((6, 10))}, 4, key=8)["out"]
    assert S.shape == (4, 2, 3)
    np.testing.assert_allclose(S.reshape(4, 6), T, rtol=0, atol=COMPILED)


@pytest.mark.smoke
def test_every_form_of_a_key_is_the_same_key():
    forms = {
        "int": 7,
        "numpy int": np.int64(7),
        "jax int": jnp.int32(7),
        "typed": jax.random.key(7),
        "raw": jax.random.PRNGKey(7),
        "numpy raw": np.array([0, 7], np.uint32),
    }
    W = jnp.zeros((6, 5))
    want = rl.sample_sketch(W, 2, key=7)
    for name, key in forms.items():
        got = rl.sample_sketch(W, 2, key=key)
        np.testing.assert_array_equal(got, want, err_msg=name)
        traced = jax.jit(keys.key_data)(key)
        np.testing.assert_array_equal(traced, [0, 7], err_msg=name)
    # The largest seed is still what jax.random.key makes of it, with x64 and without.
    for x64 in (False, True):
        with jax.enable_x64(x64):
            last = 2**32 - 1
            want = jax.random.key_data(jax.random.key(last))
            np.testing.assert_array_equal(keys.key_data(last), want)


GOLDEN = {
    "orthonormal": [
        [0.785849, -0.254052, 0.234201, 0.508528, -0.066691],
        [-0.368511, -0.414858, 0.392037, 0.086104, -0.728687],
    ],
    "rademacher": [
        [0.678598, -0.452932, 0.254175, 0.254175, -0.452932],
        [-0.678598, -0.254175, 0.452932, 0.452932, -0.254175],
    ],
    "coordinate": [4, 3],
    "block": 3,
    "gaussian_raw": [
        [1.541249, -0.529293, 0.545077, 1.526783, -0.233729],
        [-0.5892, -0.903014, 0.843225, 0.203273, -1.497004],
    ],
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    """A chain begun under one release goes on under the next.

    The first two rows at seed 0, link 3; the tolerance is for the logarithms and
    square roots of other versions of XLA.
    """
    params = {"decoder/layer_0/kernel": jnp.zeros((5, 8))}
    S = rl.sample_sketch(params, spec_of(name), key=0, link=3)["decoder/layer_0/kernel"]
    S = held(S)[:2] if S.shape else held(S)
    np.testing.assert_allclose(S, GOLDEN[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", PROJECTORS)
def test_large_sketches_are_orthonormal_in_float32(name):
    W = {"kernel": jax.ShapeDtypeStruct((4096, 5000), jnp.float32)}
    spec = spec_of(name, rank=128)
    S = explicit(rl.sample_sketch(W, spec, key=2), spec, W)["kernel"].astype(float)
    assert S.shape == (128, 4096)
    assert np.abs(S @ S.T - np.eye(128)).max() <= 1e-5


@pytest.mark.parametrize("name", ["orthonormal", repeat("rademacher")])
def test_small_sketches_are_orthonormal_at_any_rank(name):
    """At rank = dim - 1 a third of the sign draws are singular at dim 4."""
    rules = [rl.Rule(f"{dim}", rank=dim - 1, rows=1, batch=0) for dim in range(2, 10)]
    params = {r.path: jnp.zeros((500, int(r.path), 10), jnp.float32) for r in rules}
    spec = spec_of(name, rank=1, rules=rules)
    drawn = jax.jit(lambda key: rl.sample_sketch(params, spec, key=key))
    for seed in range(4):
        for path, S in drawn(seed).items():
            S = np.asarray(S, np.float64)
            gram = np.einsum("nri,nsi->nrs", S, S)
            error = np.abs(gram - np.eye(S.shape[1])).max()
            assert error <= 1e-5, (seed, path)  # NaN compares false


@pytest.mark.parametrize(
    ("name", "dim", "rank"),
    [(name, *sizes) for name in SKETCHES for sizes in [(5, 2), (4, 3)]]
    + [("block", 4, 2), ("block", 5, 1)],
)
def test_the_mean_projector_is_isotropic(name, dim, rank):
    """E[H] = (rank / dim) I, whatever the distribution: the theory's lambda."""
    count = 20_000
    spec = spec_of(name, rank=rank, rules=[rl.Rule("kernel", rows=1, batch=0)])
    params = {"kernel": jax.ShapeDtypeStruct((count, dim, dim + 3), jnp.float32)}
    S = jax.jit(lambda: rl.sample_sketch(params, spec, key=17))()
    S = explicit(S, spec, params)["kernel"]
    H = projectors(S)
    expected = rank / dim * np.eye(dim)
    assert np.abs(z_scores(H, expected)).max() < MAX_Z
    # A vector without symmetry sees an axis that is favoured or turned.
    skew = np.array([5.0, 3.0, 1.0, -0.5, -2.0])[:dim]
    along = np.einsum("i,nij,j->n", skew, H, skew) / (skew @ skew)
    assert abs(z_scores(along, rank / dim)) < MAX_Z
    if name in PROJECTORS:
        # S S^T (S tall, as on paper) is H itself: one learning rate fits all of them.
        outer = np.einsum("nri,nrj->nij", S, S)
        assert np.abs(outer - H).max() < 1e-5
    else:
        # N(0, 1) entries: rank / dim as seen by H only.
        outer = np.einsum("nri,nrj->nij", S, S, dtype=np.float64)
        assert np.abs(z_scores(outer, rank * np.eye(dim))).max() < MAX_Z


def test_the_mean_projector_test_sees_a_favoured_axis():
    """The z-scores above would catch an axis stretched by a tenth."""
    spec = rl.Spec(2, sketch="gaussian_raw", rules=[rl.Rule("kernel", rows=1, batch=0)])
    params = {"kernel": jax.ShapeDtypeStruct((20_000, 5, 8), jnp.float32)}
    S = np.asarray(rl.sample_sketch(params, spec, key=17)["kernel"])
    H = projectors(S * np.array([1.1, 1, 1, 1, 1], np.float32))
    assert np.abs(z_scores(H, 0.4 * np.eye(5))).max() > 2 * MAX_Z


def test_no_gradient_reaches_a_sketch():
    """A sketch is drawn from key, path and link: NaN weights leave it as it is."""
    W = jnp.full((6, 5), jnp.nan)
    np.testing.assert_array_equal(
        rl.sample_sketch(W, 2, key=0), rl.sample_sketch(jnp.zeros((6, 5)), 2, key=0)
    )
