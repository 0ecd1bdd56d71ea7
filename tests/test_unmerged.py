"""The adapter form's forward pass: the same loss as the merged weights, never merged."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import repeat

import raclora_jax as rl

SPEC = rl.Spec(
    2,
    alpha=3.0,
    rules=[
        rl.Rule("qkv", rows=0),
        rl.Rule("layers", batch=0, rows=1),
        rl.Rule("conv", rows=(0, 1, 2)),
        rl.Rule("frozen", mode="frozen"),
    ],
)


def params(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def leaf(*shape):
        return (jax.random.normal(next(keys), shape) / 2).astype(dtype)

    return {
        "conv": leaf(3, 3, 2, 5),
        "embed": leaf(11, 6),
        "frozen": leaf(6, 6),
        "layers": leaf(3, 6, 6),
        "norm": leaf(6),
        "qkv": leaf(6, 3, 4),
    }


def loss_fn(params, tokens, images):
    x = params["embed"][tokens] * params["norm"] @ params["frozen"]
    x, _ = jax.lax.scan(
        jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["layers"]
    )
    heads = jnp.einsum("te,eih->tih", x, params["qkv"])
    dimensions = ("NHWC", "HWIO", "NHWC")
    maps = jax.lax.conv_general_dilated(
        images, params["conv"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    logits = x @ params["embed"].T
    total = jnp.mean(heads**2) + jnp.mean(jnp.sin(maps)) + jnp.mean(logits**3)
    return total.astype(jnp.float32)


def inputs(dtype=jnp.float32):
    images = jax.random.normal(jax.random.key(7), (2, 5, 4, 2)).astype(dtype)
    return jnp.array([1, 4, 4, 10, 0]), images


def trained(base, spec):
    """Factors away from zero, as in the middle of a link."""
    factors, chain = rl.init_adapter(base, spec, key=3)
    keys = iter(jax.random.split(jax.random.key(5), 8))
    moved = jax.tree.map(lambda f: jax.random.normal(next(keys), f.shape) / 5, factors)
    return jax.tree.map(lambda m, f: m.astype(f.dtype), moved, factors), chain


@pytest.mark.smoke
@pytest.mark.parametrize("side", [repeat("left"), "right"])
def test_loss_and_gradient_are_those_of_the_sum(side):
    spec = rl.Spec(2, alpha=3.0, rules=SPEC.rules, side=side)
    with jax.enable_x64(True):
        base = params(jnp.float64)
        args = inputs(jnp.float64)
        factors, chain = trained(base, spec)

        def summed(factors):
            return loss_fn(rl.effective_params(base, factors, chain, spec), *args)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unmerged = jax.jit(jax.value_and_grad(rl.adapted(loss_fn, spec)))
            value, grads = unmerged(factors, base, chain, *args)
        expected, wanted = jax.jit(jax.value_and_grad(summed))(factors)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # the loss is float32
    # jax.tree.leaves leaves out the frozen leaf, which has no factor.
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.smoke
def test_no_weight_is_formed():
    base, args = params(), inputs()
    factors, chain = trained(base, SPEC)
    loss = rl.adapted(loss_fn, SPEC)
    program = jax.make_jaxpr(jax.grad(loss))(factors, base, chain, *args)
    trained_shapes = {base[name].shape for name in ("qkv", "conv", "embed")}
    made = {
        eqn.outvars[0].aval.shape
        for eqn in program.jaxpr.eqns
        if eqn.primitive.name in ("add", "add_any", "dot_general")
    }
    assert not made & trained_shapes


@pytest.mark.smoke
def test_an_unknown_use_is_formed_and_reported():
    base = params()
    factors, chain = trained(base, SPEC)

    def loss(p):
        return jnp.sum(p["qkv"] ** 2) + sum(jnp.sum(p[n] ** 2) for n in p if n != "qkv")

    with pytest.warns(UserWarning, match=r"'qkv' by (integer_pow|square|mul)"):
        value = rl.adapted(loss, SPEC)(factors, base, chain)
    merged = rl.effective_params(base, factors, chain, SPEC)
    np.testing.assert_allclose(value, loss(merged), rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_trains(kind):
    qwix = pytest.importorskip("qwix")
    base = params()
    axes = {"layers": (0, 2), "qkv": (1, 2), "embed": (1,), "frozen": (1,)}
    quantised = base | {
        name: qwix.quantize(base[name], kind, channelwise_axes=axes[name])
        for name in axes
    }
    read = base | {name: qwix.dequantize(quantised[name]) for name in axes}
    factors, chain = trained(quantised, SPEC)
    loss = jax.jit(
        jax.value_and_grad(rl.adapted(loss_fn, SPEC, dequantize=qwix.dequantize))
    )
    value, grads = loss(factors, quantised, chain, *inputs())
    plain = jax.jit(jax.value_and_grad(rl.adapted(loss_fn, SPEC)))
    expected, wanted = plain(factors, read, chain, *inputs())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1e-3, np.abs(want).max()))
    summed = rl.effective_params(
        quantised, factors, chain, SPEC, dequantize=qwix.dequantize
    )
    np.testing.assert_allclose(loss_fn(summed, *inputs()), value, rtol=1e-4)


def test_a_quantised_base_without_a_reader_is_refused():
    qwix = pytest.importorskip("qwix")
    base = params() | {"qkv": qwix.quantize(params()["qkv"], "int8")}
    factors, chain = trained(base, SPEC)
    with pytest.raises(ValueError, match=r"'qkv' is quantised.*dequantize"):
        rl.adapted(loss_fn, SPEC)(factors, base, chain, *inputs())
    with pytest.raises(ValueError, match=r"'qkv' is quantised.*effective_params"):
        rl.next_link(base, factors, chain, SPEC)


@pytest.mark.slow
def test_a_bfloat16_base_keeps_float32_factors():
    base, args = params(jnp.bfloat16), inputs(jnp.bfloat16)
    factors, chain = trained(base, SPEC)
    value, grads = jax.value_and_grad(rl.adapted(loss_fn, SPEC))(
        factors, base, chain, *args
    )
    exact = rl.effective_params(base, factors, chain, SPEC)
    wide = jax.value_and_grad(rl.adapted(loss_fn, SPEC))
    _, wanted = wide(
        factors, jax.tree.map(lambda w: w.astype(jnp.float32), base), chain, *inputs()
    )
    assert grads["qkv"].dtype == jnp.float32
    assert jnp.isfinite(value)
    np.testing.assert_allclose(value, loss_fn(exact, *inputs()), rtol=0.05)
    gap = np.linalg.norm(grads["qkv"] - wanted["qkv"]) / np.linalg.norm(wanted["qkv"])
    assert gap < 0.05  # some steps of bfloat16, 2^-8, through five layers


@pytest.mark.smoke
def test_second_derivatives_are_those_of_the_merged_weights():
    """By the factors, also where two leaves meet, and forwards."""
    keys = jax.random.split(jax.random.key(0), 4)
    base = {
        "up": jax.random.normal(keys[0], (6, 8)) / 3,
        "down": jax.random.normal(keys[1], (8, 4)) / 3,
        "mix": jax.random.normal(keys[2], (4, 5)),
    }
    x = jax.random.normal(keys[3], (5, 6))

    def loss(params, x):
        return (
            jnp.mean(jnp.tanh(x @ params["up"]) @ (params["down"] @ params["mix"])) ** 2
        )

    spec = rl.Spec(2)
    factors, chain = rl.init_adapter(base, spec, key=1)

    def ours(factors):
        return rl.adapted(loss, spec)(factors, base, chain, x)

    def merged(factors):
        return loss(rl.effective_params(base, factors, chain, spec), x)

    for derivative in (jax.grad, jax.hessian, jax.jacfwd):
        mine, theirs = (jax.jit(derivative(function)) for function in (ours, merged))
        for start in (0.0, 0.3):
            at = jax.tree.map(lambda f, start=start: f + start, factors)
            got, want = mine(at), theirs(at)
            for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
            if derivative is jax.hessian:
                assert float(jnp.abs(got["down"]["down"]).max()) > 1e-6
