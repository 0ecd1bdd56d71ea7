"""What the trials of the language study left open, each beside rank 16 without state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import raclora_jax as rl
from benchmarks.pretrained.entries import (
    ADAM_LINK,
    LINK,
    Entry,
    momentum,
    ours,
    raclora,
    rivals,
    second_moment,
)
from raclora_jax.methods._method import DenseState, Method


def explored() -> list[Entry]:
    """What the trials left open, around rank 16 without state."""
    name = "RAC r16 orthogonal"
    entries = [
        *(ours(f"{name}, link {k}", 16, resample_every=k) for k in (5, 100)),
        *(ours(f"{name}, side {side}", 16, side=side) for side in ("left", "right")),
        in_turn(f"{name}, sides in turn", 16),
        ours(f"{name}, re-warmed", 16, rewarm=5),
        by_leaf(f"{name}, ranks 28 attention, 10 feed-forward", 28, 10),
        by_leaf(f"{name}, ranks 6 attention, 21 feed-forward", 6, 21),
        ours(f"{name}, coordinates", 16, sketch="coordinate"),
    ]
    for link in (25, 50, 100):
        entries.append(
            ours(f"RAC r16 Adam, link {link}", 16, inner=None, resample_every=link)
        )
    for link in (5, 10, 50, 100):
        entries.append(
            ours(
                f"{name}, momentum 0.9, link {link}",
                16,
                guess=0.001,
                inner=momentum,
                resample_every=link,
            )
        )
    for moments in ("keep", "transport"):
        named = f"{name}, momentum 0.9, moments={moments}"
        entries.append(ours(named, 16, guess=0.001, inner=momentum, moments=moments))
    entries += [
        ours(f"{name}, momentum 0.5", 16, inner=half_momentum),
        ours(f"RAC r{32} orthogonal, momentum 0.5", 32, inner=half_momentum),
        ours(f"{name}, second moment", 16, inner=second_moment),
        ours("RAC r32 orthogonal, second moment", 32, inner=second_moment),
    ]
    twice = {entry.name: entry for entry in (*rivals(), *raclora())}
    for chosen in BATCHED:
        entry = twice[chosen]
        entries.append(entry._replace(name=f"{chosen}, 16 windows", batch=16))
    return entries


BATCHED = (
    "full Adam",
    "full orthogonal",
    "LoRA r8 Adam",
    "LoRA r8 orthogonal",
    "RAC r16 orthogonal",
    "RAC r32 orthogonal",
)


def one_rate() -> list[Entry]:
    """Every rank on both sides: ``alpha="dim"`` should give all of them one rate."""
    entries = []
    for rank in (3, 6, 12, 16, 32):
        # The columns of the key and value matrices leave no room for rank 32.
        for side in ("left", "right") if rank < 32 else ("left",):
            name = f"RAC r{rank}, side {side}"
            adam = {"inner": None, "resample_every": ADAM_LINK}
            entries += [
                ours(f"{name}, orthogonal", rank, side=side),
                ours(f"{name}, Adam", rank, side=side, **adam),
            ]
    return entries


def half_momentum() -> optax.GradientTransformation:
    """Orthogonal with a short momentum."""
    return rl.orthogonal(momentum=0.5)


def by_leaf(name: str, attention: int, feed_forward: int) -> Entry:
    """One rank for the four matrices of attention, another for the other three."""
    rules = (rl.Rule(".*w[qkvo]", rank=attention), rl.Rule(".*", rank=feed_forward))
    return ours(name, 16, rules=rules)


def in_turn(name: str, rank: int) -> Entry:
    """Links that sketch the rows, then the columns, and so on: two chains take turns."""

    def make(schedule: optax.Schedule, key: Array) -> Method:
        def turns(first: int) -> Method:
            def own(count: Array) -> Array:
                return schedule(count // LINK * 2 * LINK + first + count % LINK)

            side = "right" if first else "left"
            entry = ours(name, rank, side=side)
            return entry.make(own, jax.random.fold_in(key, first))

        left, right = turns(0), turns(LINK)

        def init(params: Any) -> Any:
            states = left.init(params), right.init(params)
            return (states[0].params, *(s.opt_state for s in states), jnp.int32(0))

        def step(state: Any, loss_fn: Any, *args: Any) -> tuple[Any, Array]:
            params, rows, columns, count = state

            def of_rows() -> Any:
                new, loss = left.step(DenseState(params, rows), loss_fn, *args)
                return (*new, columns), loss

            def of_columns() -> Any:
                new, loss = right.step(DenseState(params, columns), loss_fn, *args)
                return (new.params, rows, new.opt_state), loss

            odd = count // LINK % 2 == 1
            new, loss = jax.lax.cond(odd, of_columns, of_rows)
            return (*new, count + 1), loss

        def mean(params: Any) -> int:
            return (left.trained(params) + right.trained(params)) // 2

        return Method(init, step, lambda s: s[0], mean, left.optimizer_bytes)

    return Entry(name, make, 0.002, link=LINK)
