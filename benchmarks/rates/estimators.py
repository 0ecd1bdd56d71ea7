"""PAGE, MVR, MARINA and EF21 inside the chain: their bounds, and that they have no floor.

Bernoulli-LoRA on least squares: in every link a coin says which side is sketched, and the
estimate of the gradient is projected there. The estimators are written out here, from
their papers; ``raclora_jax`` draws the sketches, projects and lifts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import raclora_jax as rl
from benchmarks.rates.linear_regression import LeastSquares
from benchmarks.rates.problems import FAST_COMPILE, INPUTS, OUTPUTS, SAMPLES, data
from benchmarks.shared import chains
from raclora_jax import theory

RANK, BATCH, CLIENTS = 2, 10, 10
REFRESH, WEIGHT, KEPT = 0.1, 0.1, INPUTS * OUTPUTS // 10
FLOOR_LINKS, FLOOR_STEP = 3000, 0.1
PROBABILITIES = (0.0, 0.5, 1.0)
# At least 20 / lambda for every side.
LINKS = 160


class Data(NamedTuple):
    """Samples, whole and by clients."""

    X: Array
    Y: Array

    def grad(self, W: Array) -> Array:
        """Of the whole."""
        return self.X.T @ (self.X @ W - self.Y) / len(self.X)

    def batch_grad(self, W: Array, key: Array) -> Array:
        """Of ``BATCH`` samples, drawn with replacement."""
        rows = jax.random.randint(key, (BATCH,), 0, len(self.X))
        return Data(self.X[rows], self.Y[rows]).grad(W)

    def client_grads(self, W: Array) -> Array:
        """``(clients, inputs, outputs)``; each has an equal part of the samples."""
        parts = Data(*(a.reshape(CLIENTS, -1, a.shape[-1]) for a in self))
        return jax.vmap(lambda X, Y: Data(X, Y).grad(W))(*parts)


# (data, W of before, W, estimate, key) -> estimate at W.
Estimator = Callable[[Data, Array, Array, Array, Array], Array]


def sgd(data: Data, before: Array, W: Array, g: Array, key: Array) -> Array:
    """A minibatch."""
    return data.batch_grad(W, key)


def page(data: Data, before: Array, W: Array, g: Array, key: Array) -> Array:
    """A full gradient now and then, differences on one minibatch otherwise."""
    coin, key = jax.random.split(key)
    change = data.batch_grad(W, key) - data.batch_grad(before, key)
    fresh = jax.random.bernoulli(coin, REFRESH)
    return jnp.where(fresh, data.grad(W), g + change)


def mvr(data: Data, before: Array, W: Array, g: Array, key: Array) -> Array:
    """A minibatch now, and the estimate carried over on the same one."""
    return data.batch_grad(W, key) + (1 - WEIGHT) * (g - data.batch_grad(before, key))


def marina(data: Data, before: Array, W: Array, g: Array, key: Array) -> Array:
    """Differences of the clients, each with ``KEPT`` of its numbers at random."""
    coin, key = jax.random.split(key)
    changes = (data.client_grads(W) - data.client_grads(before)).reshape(CLIENTS, -1)

    def rand_k(change: Array, key: Array) -> Array:
        kept = jax.random.permutation(key, change.size) < KEPT
        return jnp.where(kept, change * (change.size / KEPT), 0)

    sent = jax.vmap(rand_k)(changes, jax.random.split(key, CLIENTS)).mean(axis=0)
    fresh = jax.random.bernoulli(coin, REFRESH)
    return jnp.where(fresh, data.grad(W), g + sent.reshape(W.shape))


def ef21(data: Data, before: Array, W: Array, g: Array, key: Array) -> Array:
    """``g`` holds the clients' estimates; each sends its ``KEPT`` largest corrections."""
    missing = (data.client_grads(W) - g).reshape(CLIENTS, -1)
    _, largest = lax.top_k(jnp.abs(missing), KEPT)
    rows = jnp.arange(CLIENTS)[:, None]
    sent = jnp.zeros_like(missing).at[rows, largest].set(missing[rows, largest])
    return g + sent.reshape(g.shape)


ESTIMATORS = {"SGD": sgd, "PAGE": page, "MVR": mvr, "MARINA": marina, "EF21": ef21}


@functools.partial(
    jax.jit, static_argnames=("name", "links"), compiler_options=FAST_COMPILE
)
def runs(
    name: str, gamma: Array, p: Array, keys: Array, links: int
) -> tuple[Array, Array, Array]:
    """Relative gaps, squared gradients and minibatch variances, ``(seeds, links)``."""
    X, Y, start = data()
    samples = Data(jnp.asarray(X), jnp.asarray(Y))
    problem = LeastSquares.of(X, Y)
    start = jnp.asarray(start)
    specs = [rl.Spec(RANK, side=side) for side in ("left", "right")]

    def one(key: Array) -> tuple[Array, Array, Array]:
        sketch_key, noise_key, coin_key = jax.random.split(key, 3)
        sketches = jax.vmap(
            lambda link: [
                rl.sample_sketch(start, spec, key=sketch_key, link=link) for spec in specs
            ]
        )(jnp.arange(links))
        lefts = jax.random.bernoulli(coin_key, p, (links,))
        noise = jax.random.split(noise_key, links)
        first = samples.client_grads(start) if name == "EF21" else samples.grad(start)

        def step(carry, link):
            before, W, g = carry
            index, both, left, noise = link
            estimate = ESTIMATORS[name](samples, before, W, g, noise)
            g = jnp.where(index == 0, g, estimate)
            mean = g.mean(axis=0) if g.ndim == 3 else g
            lifted = [
                rl.lift(rl.project(mean, S, spec), S, W, spec)
                for S, spec in zip(both, specs, strict=True)
            ]
            after = W - gamma * jnp.where(left, *lifted)
            G = problem.grad(W)
            each = samples.Y - samples.X @ W
            # The gradient of one sample is x (x^T W - y).
            squares = jnp.sum(samples.X**2, axis=1) * jnp.sum(each**2, axis=1)
            variance = (jnp.mean(squares) - jnp.sum(G**2)) / BATCH
            return (W, after, g), (problem.gap(after), jnp.sum(G**2), variance)

        carry = start, start, first
        _, found = lax.scan(step, carry, (jnp.arange(links), sketches, lefts, noise))
        return found

    gaps, squares, variances = jax.vmap(one)(keys)
    return gaps / problem.gap(start), squares, variances


def run(
    name: str, gamma: float, p: float, links: int, seeds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``runs`` of some seeds, as NumPy's."""
    gaps, squares, variances = runs(name, gamma, p, chains.seed_keys(seeds), links=links)
    return np.asarray(gaps), np.asarray(squares), np.asarray(variances)


def constants() -> dict[str, float]:
    """L, and the root mean squares of the samples' and of the clients' constants."""
    X, _, _ = data()
    parts = X.reshape(CLIENTS, -1, INPUTS)
    clients = [np.linalg.eigvalsh(part.T @ part / len(part))[-1] for part in parts]
    return {
        "whole": float(np.linalg.eigvalsh(X.T @ X / SAMPLES)[-1]),
        "samples": float(np.sqrt(np.mean(np.sum(X**2, axis=1) ** 2))),
        "clients": float(np.sqrt(np.mean(np.square(clients)))),
    }


def rate_of(
    name: str, lam: float
) -> theory.Page | theory.Mvr | theory.Marina | theory.Ef21:
    """The theory's rate of an estimator."""
    found, size = constants(), INPUTS * OUTPUTS
    of = "samples" if name in ("PAGE", "MVR") else "clients"
    known = {"smoothness": found["whole"], "sample_smoothness": found[of], "lam": lam}
    if name == "PAGE":
        return theory.Page(**known, refresh=REFRESH, batch=BATCH)
    if name == "MVR":
        # The step needs no variance, and the run measures it.
        return theory.Mvr(**known, weight=WEIGHT, variance=0.0)
    if name == "MARINA":
        omega = size / KEPT - 1
        return theory.Marina(**known, refresh=REFRESH, compression=omega, clients=CLIENTS)
    return theory.Ef21(**known, contraction=KEPT / size)


def measure(seeds: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows of both studies, and the mean relative gaps of the long runs."""
    results = []
    for name in ("PAGE", "MVR", "MARINA", "EF21"):
        results += [against_bound(name, p, seeds) for p in PROBABILITIES]
    curves = {}
    gamma = FLOOR_STEP / constants()["whole"]
    for name in ESTIMATORS:
        gaps, _, _ = run(name, gamma, 0.5, FLOOR_LINKS, seeds)
        curves[name] = gaps.mean(axis=0)
        row = {
            "study": "floor",
            "estimator": name,
            "links": FLOOR_LINKS,
            "step_times_L": FLOOR_STEP,
            "p": 0.5,
            "relative_gap": float(gaps[:, -1].mean()),
            "relative_gap_worst_seed": float(gaps[:, -1].max()),
        }
        results.append(row)
    return results, curves


def against_bound(name: str, p: float, seeds: int) -> dict:
    """An estimator at its largest step: what was measured over what is allowed."""
    lam = theory.bernoulli_lambda(rows=INPUTS, cols=OUTPUTS, rank=RANK, p=p)
    rate = rate_of(name, lam)
    gamma = rate.largest_step
    _, squares, variances = run(name, gamma, p, LINKS, seeds)
    X, Y, start = data()
    gap = float(LeastSquares.of(X, Y).gap(jnp.asarray(start)))
    if isinstance(rate, theory.Mvr):
        rate = dataclasses.replace(rate, variance=float(variances.max()))
    bound = rate.bound(gap=gap, gamma=gamma, links=LINKS)
    by_seed = squares.mean(axis=1) / bound
    return {
        "study": "estimators",
        "estimator": name,
        "p": p,
        "lam": lam,
        "links": LINKS,
        "step_times_L": gamma * rate.smoothness,
        "over_bound": float(by_seed.mean()),
        "over_bound_worst_seed": float(by_seed.max()),
    }
