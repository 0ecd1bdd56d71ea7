"""A scalar on a weight stays on it: the model's own range and digits, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import raclora_jax as rl

N = 4096
USES = {
    "times": lambda w, x: x @ (w * (1 / N)),
    "from the left": lambda w, x: x @ ((1 / N) * w),
    "over": lambda w, x: x @ (w / N),
    "in two steps": lambda w, x: x @ (w * N**-0.5 * N**-0.5),
    "turned": lambda w, x: ((w / N).T @ x.T).T,
    "negated": lambda w, x: -(x @ (-w / N)),
}


def in_every_form(loss, params, *args):
    """The value that each form says the loss has; factors that are not zero as well."""
    spec = rl.trace_spec(loss, params, *args, rank=2)
    state = rl.raclora(0.1, spec, key=0).init(params)
    yield rl.value_and_grad(loss, spec)(params, state, *args)[0], loss(params, *args)
    factors, chain = rl.init_adapter(params, spec, key=0)
    for start in (0.0, 0.25):
        moved = jax.tree.map(lambda f, s=start: f + s, factors)
        whole = rl.effective_params(params, moved, chain, spec)
        whole = jax.tree.map(lambda w, like: w.astype(like.dtype), whole, params)
        yield rl.adapted(loss, spec)(moved, params, chain, *args), loss(whole, *args)


@pytest.mark.parametrize("use", USES)
def test_sums_stay_in_range(use):
    """NTK and mu parameterisation in float16: ``x @ W`` alone would be infinite."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(1 + rng.normal(size=(N, 4)) / 8, jnp.float16)}
    x = jnp.full((3, N), 20, jnp.float16)
    exact = 20 * np.asarray(params["w"], np.float64).mean()

    def loss(params, x):
        return jnp.mean(USES[use](params["w"], x).astype(jnp.float32))

    np.testing.assert_allclose(loss(params, x), exact, rtol=0.01)
    for got, want in in_every_form(loss, params, x):
        np.testing.assert_allclose(got, want, rtol=0.01)


def test_a_convolution_stays_in_range():
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(1 + rng.normal(size=(3, 3, 512, 4)) / 8, jnp.float16)}
    x = jnp.full((1, 4, 4, 512), 20, jnp.float16)

    def loss(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["w"] / 4608, (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.mean(y.astype(jnp.float32))

    for got, want in in_every_form(loss, params, x):
        assert np.isfinite(want)
        np.testing.assert_allclose(got, want, rtol=0.01)


def test_digits_are_those_of_the_model():
    """float32 weights scaled and then cast: the same bits enter the product."""
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(24, 10)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(6, 24)), jnp.bfloat16)
    seen = jnp.eye(24, dtype=jnp.bfloat16)

    def loss(params, x):
        return jnp.sum((x @ (params["w"] * 0.37).astype(jnp.bfloat16)) ** 2)

    def rows(params, x):
        y = x @ (params["w"] * 0.37).astype(jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32)), y

    spec = rl.trace_spec(loss, params, x, rank=2)
    state = rl.raclora(0.1, spec, key=0).init(params)
    (_, ours), _ = rl.value_and_grad(rows, spec, has_aux=True)(params, state, seen)
    np.testing.assert_array_equal(ours, rows(params, seen)[1])
