"""How soon the certificate catches a broken run, and whether it lets a sound one be.

Least squares, one step of 1 / L a link, the certificate in both forms: from the dense
gradient, and from the factor's gradient beside an independent probe. Runs are broken in
four ways: one sketch for the whole run, a law that stays in one half of the space, a step
too large, and a NaN.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import raclora_jax as rl
from benchmarks.rates.problems import FAST_COMPILE, Problem, least_squares
from benchmarks.shared import chains
from raclora_jax import theory

LAWS = ("orthonormal", "rademacher", "coordinate", "block")
RANKS, SIDE = (1, 4), "left"
LINKS = 500
TOO_LARGE, NAN_AT = 4.0, 10
# Losses have a floor, as losses do: descent must be told from rounding.
FLOOR = 1.0
PROBE_SEED = 2**20


class Broken(NamedTuple):
    """What is wrong with a run."""

    one_sketch: bool = False
    half: bool = False
    step: float = 1.0
    nan: bool = False


RUNS = {
    "sound": Broken(),
    "one sketch": Broken(one_sketch=True),
    "half the space": Broken(half=True),
    f"step {TOO_LARGE:g} / L": Broken(step=TOO_LARGE),
    "NaN": Broken(nan=True),
}


def drawn(W: Array, spec: rl.Spec, key: Array, link: Array, broken: Broken) -> Array:
    """The sketch that the run trains with."""
    link = jnp.where(broken.one_sketch, 0, link)
    half = W.shape[0] // 2
    small = rl.sample_sketch(W[:half], spec, key=key, link=link)
    if jnp.issubdtype(small.dtype, jnp.floating):
        small = jnp.pad(small, ((0, 0), (0, W.shape[0] - half)))
    whole = rl.sample_sketch(W, spec, key=key, link=link)
    return jnp.where(broken.half, small, whole)


def run(
    problem: Problem, law: str, rank: int, form: str, seeds: int
) -> theory.Certificate:
    """Certificates with axes ``(runs, seeds, links)``."""
    spec = rl.Spec(rank, side=SIDE, sketch=law, resample_every=1)

    def one(broken: Broken, key: Array, probe_key: Array) -> theory.Certificate:
        rate = broken.step / problem.smoothness

        def step(carry, link):
            W, previous = carry
            G = problem.grad(W)
            S = drawn(W, spec, key, link, broken)
            factors = rl.project(G, S, spec)
            if form == "dense":
                seen = theory.captured(G, S, spec)
            else:
                Q = rl.sample_sketch(W, spec, key=probe_key, link=link)
                seen = theory.captured_by_probe(factors, rl.project(G, Q, spec), W, spec)
            after = W - rate * rl.lift(factors, S, W, spec)
            after = jnp.where(broken.nan & (link == NAN_AT), jnp.nan, after)
            certificate = theory.certify(
                previous,
                seen,
                loss_before=FLOOR + problem.gap(W),
                loss_after=FLOOR + problem.gap(after),
                learning_rate=rate,
            )
            return (after, certificate), certificate

        first, head = step((problem.start, None), jnp.zeros((), jnp.int32))
        _, tail = lax.scan(step, first, jnp.arange(1, LINKS))
        return jax.tree.map(
            lambda one, more: jnp.concatenate([one[None], more]), head, tail
        )

    by_seed = jax.vmap(one, (None, 0, 0))
    by_run = jax.jit(jax.vmap(by_seed, (0, None, None)), compiler_options=FAST_COMPILE)
    broken = jax.tree.map(lambda *each: jnp.array(each), *RUNS.values())
    probes = jax.vmap(jax.random.key)(PROBE_SEED + jnp.arange(seeds))
    return jax.tree.map(np.asarray, by_run(broken, chains.seed_keys(seeds), probes))


def measure(seeds: int) -> list[dict]:
    """Rows: links until a broken run is caught, alarms of sound ones."""
    problem = least_squares()
    results = []
    for form in ("dense", "probe"):
        for law, rank in itertools.product(LAWS, RANKS):
            found = run(problem, law, rank, form, seeds)
            for index, name in enumerate(RUNS):
                own = jax.tree.map(lambda a, index=index: a[index], found)
                case = {"form": form, "law": law, "rank": rank, "run": name}
                results.append(case | summarise(own, name))
    return results


def summarise(found: theory.Certificate, name: str) -> dict:
    """When the first alarm of every seed came, counted from what broke."""
    alarms = ~found.sound
    first = np.where(alarms.any(axis=1), alarms.argmax(axis=1) + 1, 0)
    caught = first[first > 0] - (NAN_AT if name == "NaN" else 0)
    return {
        "study": "certificate",
        "links": LINKS,
        "seeds": len(first),
        "alarms": len(caught),
        "links_until_caught": [int(caught.min()), int(caught.max())]
        if len(caught)
        else None,
        "alarms_of_descent": int((~found.descends).any(axis=1).sum()),
        "alarms_of_coverage": int((~found.covers).any(axis=1).sum()),
        "lowest_z": float(np.nanmin(found.z[""])),
    }
