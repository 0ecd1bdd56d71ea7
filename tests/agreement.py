"""Two ways to one gradient, and how they are compared."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import raclora_jax as rl

KEY = 3
SIDES = ("left", "right")


def oracle(loss_fn, params, spec, *args, link=0, has_aux=False):
    """Dense-then-project, by plain JAX."""
    value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *args)
    return value, rl.project(grads, sketches(params, spec, link), spec)


def sketches(params, spec, link=0):
    return rl.sample_sketch(params, spec, key=KEY, link=link)


def gradient(loss_fn, params, spec, *args, has_aux=False):
    """The library's, at the start of a chain."""
    state = rl.raclora(0.1, spec, key=KEY).init(params)
    return rl.value_and_grad(loss_fn, spec, has_aux=has_aux)(params, state, *args)


def fallbacks(call, *args):
    """What a call returns, and the texts of the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*args)
    return result, [str(w.message) for w in caught if w.category is UserWarning]


def assert_same(actual, expected, tolerance, where=""):
    """Equal structures, shapes and dtypes; values to ``tolerance`` of the tree's norm."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), where
    got, want = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where
    want = [np.asarray(leaf, np.complex128) for leaf in want]
    norm = np.sqrt(sum(np.sum(np.abs(leaf) ** 2) for leaf in want))
    gaps = [np.max(np.abs(g - w), initial=0) for g, w in zip(got, want, strict=True)]
    assert np.isfinite(norm), where
    assert max(gaps, default=0) <= tolerance * norm, (where, norm, gaps)


def assert_reported(case, messages):
    """Every leaf that must fall back is named with its primitive, no other leaf is."""
    for path, primitive in case.falls.items():
        named = [m for m in messages if f"'{path}'" in m]
        assert any(re.search(primitive, m) for m in named), (path, primitive, messages)
    free = {*case.falls, *case.may}
    for message in messages:
        (rule,) = re.findall(r"Rule\('(.+)', mode='dense'\)", message)
        assert any(re.fullmatch(rule, path) for path in free), message
        assert any(f"'{path}'" in message for path in free), message
        assert not any(f"'{path}'" in message for path in {*case.params} - free), message


# A small network to call the library with.
_SHAPES = {"body": {"kernel": (8, 6), "bias": (6,)}, "head": (6, 5), "steps": ()}
RULES = (rl.Rule("steps", mode="frozen"),)


def network(seed=0):
    """Two layers, a bias, and an integer that is frozen."""
    rng = np.random.default_rng(seed)
    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape)), _SHAPES, **is_shape
    )
    x, y = rng.normal(size=(7, 8)), rng.normal(size=(7, 5))
    return params | {"steps": jnp.int32(3)}, jnp.asarray(x), jnp.asarray(y)


def squares(params, x, y):
    body = params["body"]
    hidden = jnp.tanh(x @ body["kernel"] + body["bias"])
    return jnp.mean((hidden @ params["head"] - y) ** 2) * params["steps"]


def plain(params, spec, *args, link=0, loss_fn=squares):
    """The oracle where a leaf is an integer, which ``jax.grad`` does not take."""
    trained = {name: leaf for name, leaf in params.items() if name != "steps"}

    def loss(trained, *args):
        return loss_fn(trained | {"steps": params["steps"]}, *args)

    value, grads = jax.value_and_grad(loss)(trained, *args)
    drawn = sketches(params, spec, link)
    grads = rl.project(grads | {"steps": params["steps"]}, drawn, spec)
    return value, grads
