"""GaLore, GoLore and Flora against their formulae, and against what they must not be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import states_of
from reference import Adam

import raclora_jax as rl
from raclora_jax import methods
from raclora_jax._core.lowrank import lift_leaf, project_leaf
from raclora_jax.methods import _projected

PARAMS = {
    "kernel": jnp.sin(jnp.arange(35.0)).reshape(7, 5),
    "bias": jnp.cos(jnp.arange(5.0)),
}
X = jax.random.normal(jax.random.key(0), (4, 7)) / 2
Y = jax.random.normal(jax.random.key(1), (4, 5))
EVERY = 3
SGD = optax.identity()


def loss_fn(params, x, y):
    return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


def spec(rank=2, **kwargs):
    return rl.Spec(rank, resample_every=EVERY, **kwargs)


def golore(rate, spec, **options):
    return methods.golore(rate, spec, random_from=0, key=4, **options)


def history(method, steps, params=PARAMS):
    return states_of(method, params, loss_fn, X, Y, steps=steps)


def grads_of(params):
    """In float64 NumPy, from the formula of the loss."""
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    rest = np.asarray(X, np.float64) @ kernel + bias - np.asarray(Y, np.float64)
    rest *= 2 / rest.size
    return {"kernel": np.asarray(X, np.float64).T @ rest, "bias": rest.sum(0)}


def leading(gradient, rank):
    """The top right singular vectors of a tall matrix, (rank, cols)."""
    return np.linalg.svd(gradient)[2][:rank]


# GaLore ------------------------------------------------------------------------------


def test_galore_is_adam_on_the_leading_directions():
    """Seven steps by hand: bases of steps 0, 3 and 6, moments never reset or rotated."""
    rate, scaling = 0.03, 1.5
    method = methods.galore(rate, spec(alpha=2 * scaling))
    params = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS.items()}
    adams = {name: Adam(0.9, 0.999, 1e-8) for name in params}
    for step, state in enumerate(history(method, 7)[1:]):
        grads = grads_of(params)
        if step % EVERY == 0:
            P = leading(grads["kernel"], 2)
            own = np.asarray(state.opt_state[0].basis["kernel"])
            P *= np.sign(
                np.sum(P * own, axis=1, keepdims=True)
            )  # a vector or its negative
        move = scaling * adams["kernel"](grads["kernel"] @ P.T) @ P
        params["kernel"] = params["kernel"] - rate * move
        params["bias"] = params["bias"] - rate * adams["bias"](grads["bias"])
        for name, leaf in params.items():
            np.testing.assert_allclose(state.params[name], leaf, atol=2e-5)


def test_the_basis_holds_the_energy_of_the_top_and_lives_its_steps():
    states = history(methods.galore(0.05, spec(3)), 7)
    bases = [np.asarray(s.opt_state[0].basis["kernel"], np.float64) for s in states]
    for index in range(2, 7):
        same = np.array_equal(bases[index], bases[index + 1])
        assert same == (index % EVERY != 0)
    gradient = grads_of(PARAMS)["kernel"]
    values = np.linalg.svd(gradient, compute_uv=False)
    energy = np.sum((gradient @ bases[1].T) ** 2)
    np.testing.assert_allclose(energy, np.sum(values[:3] ** 2), rtol=1e-5)
    # A random frame holds 3 / 5 of it in the mean, and never as much.
    random = history(golore(0.05, spec(3)), 1)[1].opt_state[0].basis["kernel"]
    assert np.sum((gradient @ np.asarray(random).T) ** 2) < 0.99 * energy


@pytest.mark.parametrize(
    ("shape", "side"), [((7, 5), "right"), ((5, 7), "left"), ((5, 5), "left")]
)
def test_the_smaller_side_is_projected(shape, side):
    params = {"w": jnp.ones(shape)}
    method = methods.galore(0.1, 2)
    basis = method.init(params).opt_state[0].basis["w"]
    assert basis.shape == (2, 5)
    assert method.trained(params) == 2 * max(shape)
    assert rl.summary(params, rl.Spec(2)).rows[0].side == side


def test_every_direction_with_plain_descent_is_plain_descent():
    """X has rank 4, and so has the gradient: five leading rows of seven hold it."""
    full = history(methods.full(0.3, inner=SGD), 7)[-1].params
    wide, less = (
        history(methods.galore(0.3, spec(rank, side="left"), inner=SGD), 7)[-1].params
        for rank in (5, 2)
    )
    np.testing.assert_allclose(wide["kernel"], full["kernel"], atol=2e-6)
    np.testing.assert_allclose(wide["bias"], full["bias"], atol=2e-6)
    assert np.abs(less["kernel"] - full["kernel"]).max() > 1e-3


@pytest.mark.parametrize("law", ["leading", "random"])
def test_a_basis_of_the_smaller_side_loses_nothing(law):
    """Rank min(m, n), which a spec hands to the inner rule as it is."""
    plan = dataclasses.replace(rl.plan(4, PARAMS)["kernel"], law="", rank=5)
    grads = {"kernel": jnp.asarray(grads_of(PARAMS)["kernel"], jnp.float32)}
    if law == "leading":
        basis = _projected.top_directions(grads, {"kernel": plan})
    else:
        data = jax.random.key_data(jax.random.key(1))
        plans = {"kernel": plan}
        basis = _projected.drawn_directions(data, 0, plans, "orthonormal")
    there = project_leaf(grads["kernel"], basis["kernel"], plan)
    back = lift_leaf(there, basis["kernel"], plan)
    np.testing.assert_allclose(back, grads["kernel"], atol=1e-6)


def test_a_spec_of_that_rank_is_plain_descent_itself():
    params = {**PARAMS, "other": jnp.ones((4, 3))}
    given = rl.Spec(5, rules=[rl.Rule("other", rank=2)])
    full = history(methods.full(0.3, inner=SGD), 5)[-1].params
    for method in (methods.galore(0.3, given, inner=SGD), golore(0.3, given, inner=SGD)):
        kernel = history(method, 5, params)[-1].params["kernel"]
        np.testing.assert_allclose(kernel, full["kernel"], atol=1e-6)


def test_stacks_and_axes_are_those_of_the_view():
    """Layers in a stack are stepped as each would be alone."""
    layers = jnp.sin(jnp.arange(70.0)).reshape(2, 7, 5)

    def loss(params, x):
        return jnp.mean(jnp.tanh(jnp.einsum("bi,lij->lbj", x, params["w"])) ** 2)

    stacked = rl.Spec(2, rules=[rl.Rule("w", batch=0)])
    both = methods.galore(0.1, stacked, inner=SGD)
    moved, _ = both.step(both.init({"w": layers}), loss, X)
    for index in range(2):
        gradient = jax.grad(loss)({"w": layers}, X)["w"][index]
        P = leading(np.asarray(gradient, np.float64), 2)
        expected = layers[index] - 0.1 * gradient @ P.T @ P
        np.testing.assert_allclose(moved.params["w"][index], expected, atol=1e-6)


# GoLore ------------------------------------------------------------------------------


def noisy(params, noise):
    """Gradient W on one block; on another noise of mean zero, and larger.

    The blocks share no row and no column, so the leading directions are of one alone.
    """
    w = params["w"]
    return jnp.sum(w[3:, 5:] ** 2) / 2 + jnp.sum(noise * w[:3, :5])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_galore_stalls_under_noise_where_golore_does_not(seed):
    start = {"w": jnp.ones((8, 11))}
    noise = 30 * jax.random.normal(jax.random.key(seed), (300, 3, 5))

    def left(method):
        def step(state, noise):
            return method.step(state, noisy, noise)

        state, _ = jax.lax.scan(step, method.init(start), noise)
        gradient = jax.grad(noisy)(method.params(state), jnp.zeros((3, 5)))["w"]
        return float(jnp.linalg.norm(gradient) / np.sqrt(5 * 6))

    one = rl.Spec(2, resample_every=1)
    assert left(methods.galore(0.1, one, inner=SGD)) > 0.999
    late = functools.partial(methods.golore, 0.1, one, inner=SGD, key=seed)
    # 300 links keep (1 - 0.1 * 2/8) of it each in the mean, the last 150 half of that.
    assert left(late(random_from=0)) < 0.01
    assert 0.001 < left(late(random_from=150)) < 0.1


def test_golore_draws_orthonormal_frames_from_its_step_on():
    states = history(methods.golore(0.05, spec(), random_from=4, key=2), 9)
    bases = [np.asarray(s.opt_state[0].basis["kernel"], np.float64) for s in states]
    for basis in bases[1:]:
        np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-6)
    top = leading(grads_of(PARAMS)["kernel"], 2)

    def is_top(basis, gradient):
        top = leading(gradient, 2)
        return np.linalg.norm(top @ basis.T) ** 2 > 2 - 1e-3

    assert is_top(bases[1], grads_of(PARAMS)["kernel"])
    assert is_top(bases[4], grads_of(states[3].params)["kernel"])
    assert not is_top(bases[7], grads_of(states[6].params)["kernel"])
    assert np.linalg.norm(top @ bases[7].T) > 0
    other = history(methods.golore(0.05, spec(), random_from=4, key=3), 9)
    assert np.any(other[7].opt_state[0].basis["kernel"] != bases[7])


def test_golore_carries_the_first_moment_into_the_new_frame():
    states = history(golore(0.05, spec()), EVERY + 1)
    before, after = states[EVERY].opt_state[0], states[EVERY + 1].opt_state[0]
    old, new = (np.asarray(s.basis["kernel"], np.float64) for s in (before, after))
    gradient = grads_of(states[EVERY].params)["kernel"] @ new.T  # (rows, rank)
    rotated = np.asarray(before.inner.mu["kernel"]).T @ old @ new.T
    expected = 0.9 * rotated + 0.1 * gradient
    np.testing.assert_allclose(after.inner.mu["kernel"].T, expected, atol=1e-6)
    kept = 0.999 * np.asarray(before.inner.nu["kernel"]).T + 0.001 * gradient**2
    np.testing.assert_allclose(after.inner.nu["kernel"].T, kept, atol=1e-8)


# Flora -------------------------------------------------------------------------------


def projection(link):
    """A, (2, cols): the raw sketch of the library at the scale of Flora."""
    raw = rl.sample_sketch(
        {"kernel": PARAMS["kernel"]}, rl.Spec(2, sketch="gaussian_raw"), key=5, link=link
    )
    return np.asarray(raw["kernel"], np.float64) / np.sqrt(2)


def by_hand(rate, steps, *, inside):
    """Flora's kernel after each step; M is read with the A of the link ``inside``."""
    params, M = {n: np.asarray(w, np.float64) for n, w in PARAMS.items()}, 0.0
    momentum, kernels = np.zeros(5), []
    for step in range(steps):
        grads, link = grads_of(params), step // EVERY
        A = projection(link)
        if step and step % EVERY == 0:
            M = M @ projection(inside(link)) @ A.T
        M = 0.9 * M + 0.1 * grads["kernel"] @ A.T
        momentum = 0.9 * momentum + 0.1 * grads["bias"]
        kernel = params["kernel"] - rate * (0.9 * M @ A + 0.1 * grads["kernel"])
        bias = params["bias"] - rate * (0.9 * momentum + 0.1 * grads["bias"])
        params = {"kernel": kernel, "bias": bias}
        kernels.append(kernel)
    return np.array(kernels)


def test_flora_reads_with_the_old_projection_and_writes_with_the_new():
    method = methods.flora(0.3, spec(), inner=SGD, key=5)
    kernels = np.array([state.params["kernel"] for state in history(method, 8)[1:]])
    right = by_hand(0.3, 8, inside=lambda link: link - 1)
    wrong = by_hand(0.3, 8, inside=lambda link: link)
    np.testing.assert_allclose(kernels, right, atol=2e-6)
    np.testing.assert_allclose(right[:EVERY], wrong[:EVERY])
    assert np.abs(right[EVERY:] - wrong[EVERY:]).max() > 1e-3


def test_flora_projections_are_the_identity_in_the_mean():
    draws, law = 4000, rl.Spec(2, sketch="gaussian_raw")
    every = jax.vmap(
        lambda link: rl.sample_sketch(PARAMS["kernel"], law, key=5, link=link)
    )(jnp.arange(draws))
    mean = np.einsum("kri,krj->ij", every, every) / 2 / draws
    # An entry of A^T A has variance at most 2 / rank.
    np.testing.assert_allclose(mean, np.eye(5), atol=5 / np.sqrt(draws))


def test_a_new_projection_lengthens_the_momentum():
    """``|A' A^T M|^2`` is ``dim / rank |M|^2`` in the mean: why links must be long."""
    draws, law, wide = (
        2000,
        rl.Spec(2, side="smaller", sketch="gaussian_raw"),
        jnp.zeros((31, 20)),
    )
    every = jax.vmap(lambda link: rl.sample_sketch(wide, law, key=7, link=link))(
        jnp.arange(2 * draws)
    )
    old, new = np.asarray(every, np.float64).reshape(2, draws, 2, 20) / np.sqrt(2)
    M = np.random.default_rng(0).standard_normal((2, 31))
    grown = np.sum((new @ old.mT @ M) ** 2, axis=(1, 2)) / np.sum(M**2)
    error = grown.std() / np.sqrt(draws)
    assert abs(grown.mean() - 20 / 2) < 4 * error < 2


def test_flora_without_compression_is_momentum():
    """With no momentum A drops out: b A^T M + (1 - b) G is G."""
    flora = methods.flora(0.3, spec(), inner=SGD, momentum=0.0, key=1)
    plain = history(flora, 5)[-1].params
    full = history(methods.full(0.3, inner=SGD), 5)[-1].params
    np.testing.assert_allclose(plain["kernel"], full["kernel"], atol=1e-6)


def test_flora_sees_a_factored_second_moment():
    method = methods.flora(0.3, spec(), momentum=0.0, key=1)
    tx = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.99, min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.scale(-0.3),
    )
    params, opt_state = PARAMS, tx.init(PARAMS)
    for state in history(method, 3)[1:]:
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, X, Y), opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(state.params["kernel"], params["kernel"], atol=2e-6)


# What they train and keep --------------------------------------------------------------


def test_numbers_are_told_truthfully():
    """Rank 2 of 7 x 5: coordinates 7 x 2, basis 2 x 5; a bias of 5 in full; a counter."""
    for method in (methods.galore(0.1, spec()), golore(0.1, spec())):
        assert method.trained(PARAMS) == 14 + 5
        assert method.optimizer_bytes(PARAMS) == 4 * (10 + 2 * (14 + 5) + 1)
        stateless = methods.galore(0.1, spec(), inner=SGD)
        assert stateless.optimizer_bytes(PARAMS) == 4 * 10
    flora = methods.flora(0.1, spec(), key=0)
    assert flora.trained(PARAMS) == 35 + 5
    # Momentum 14 + 5; means of 7 rows and 5 columns, 5 of the bias; a counter and three
    # placeholders of what is not kept.
    assert flora.optimizer_bytes(PARAMS) == 4 * (14 + 5 + 7 + 5 + 5 + 1 + 3)


MAKERS = {
    "galore": methods.galore,
    "golore": golore,
    "flora": functools.partial(methods.flora, key=3),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_frozen_leaves_stay_and_dense_ones_move(make):
    rest = history(make(0.05, spec(rest="frozen")), 4)[-1].params
    np.testing.assert_array_equal(rest["bias"], PARAMS["bias"])
    dense = history(make(0.05, spec()), 4)[-1].params
    assert np.any(dense["bias"] != PARAMS["bias"])
    assert np.any(rest["kernel"] != PARAMS["kernel"])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_low_precision_weights_keep_their_dtype_and_wide_moments(make):
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    method = make(0.05, spec())
    state, _ = method.step(method.init(low), loss_fn, X, Y)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    assert method.optimizer_bytes(low) == method.optimizer_bytes(PARAMS)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bad_input_names_the_leaf_or_the_argument(make):
    with pytest.raises(ValueError, match=r"side=0\.5 draws the side"):
        make(0.1, rl.Spec(2, side=0.5))
    named = rl.Spec(2, rules=[rl.Rule("kernel", rank=6)])
    with pytest.raises(ValueError, match=r"'kernel'.* rank 6 is not below"):
        make(0.1, named).init(PARAMS)
    long = rl.Spec(2, rules=[rl.Rule("kernel", rank=6, side="left")])
    with pytest.raises(ValueError, match=r"'kernel'.* rank 6 has more directions than"):
        make(0.1, long).init(PARAMS)
    deep = {"w": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match=r"'w'.*no view"):
        make(0.1, rl.Spec(1)).init(deep)


def test_bad_options():
    for make in (methods.galore, golore):
        with pytest.raises(ValueError, match="carries a learning rate"):
            make(0.1, spec(), inner=optax.adam(0.1))
    with pytest.raises(ValueError, match="random_from must be at least 0, got -1"):
        methods.golore(0.1, 2, random_from=-1, key=0)
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        methods.flora(0.1, 2, momentum=1.0, key=0)
    with pytest.raises(ValueError, match=r"alpha=4\.0: Flora draws A to a fixed scale"):
        methods.flora(0.1, rl.Spec(2, alpha=4.0), key=0)
