"""What the language study compares: every method as a ``Method`` over a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import raclora_jax as rl
from raclora_jax import methods
from raclora_jax._chain.inner import OrthogonalState
from raclora_jax._core.planning import plan_tree
from raclora_jax.methods._method import DenseState, Method, nbytes

Make = Callable[[optax.Schedule, Array], Method]


class Entry(NamedTuple):
    """One contender.

    Attributes:
      name: What tables call it.
      make: ``make(schedule, key)``, the method; both may be traced.
      guess: Where the search of the learning rate starts.
      batch: Windows a step.
      rewarm: Steps after a new link over which the rate rises again; 0 for none.
      link: Steps a link, where there is one.
    """

    name: str
    make: Make
    guess: float
    batch: int = 8
    rewarm: int = 0
    link: int = 0


def factor_form(
    schedule: optax.Schedule,
    spec: rl.Spec,
    *,
    inner: optax.GradientTransformation | None,
    moments: str,
    key: Array,
    fused: bool = False,
) -> Method:
    """RAC-LoRA by the public functions, its gradients never at full size."""
    tx = rl.raclora(schedule, spec, inner=inner, moments=moments, key=key)

    def init(params: Any) -> DenseState:
        params = jax.tree.map(jnp.asarray, params)
        return DenseState(params, tx.init(params))

    def step(state: DenseState, loss_fn: Any, *args: Any) -> tuple[DenseState, Array]:
        if fused:
            params, opt_state, loss = rl.fused_step(loss_fn, tx)(*state, *args)
            return DenseState(params, opt_state), loss
        grad_fn = rl.value_and_grad(loss_fn, spec)
        loss, grads = grad_fn(state.params, state.opt_state, *args)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = rl.apply_updates(state.params, updates)
        return DenseState(params, opt_state), loss

    def trained(params: Any) -> int:
        plans = plan_tree(spec, params).values()
        return sum(math.prod(plan.trained_shape) for plan in plans)

    def optimizer_bytes(params: Any) -> int:
        return nbytes(jax.eval_shape(tx.init, params).inner_state)

    return Method(init, step, lambda state: state.params, trained, optimizer_bytes)


def ours(
    name: str,
    rank: int,
    *,
    guess: float = 0.002,
    batch: int = 8,
    rewarm: int = 0,
    moments: str = "reset",
    inner: Callable[[], optax.GradientTransformation] | None = rl.orthogonal,
    fused: bool = False,
    **spec: Any,
) -> Entry:
    """RAC-LoRA with ``alpha="dim"``; the side whose dim is above the rank, so that no
    leaf is trained in full."""
    spec = {"side": "smaller", "resample_every": 25, "alpha": "dim", **spec}
    spec = {"rest": "frozen", **spec}
    # The key and value matrices are 64 x 32: their columns leave no room for rank 32.
    rules = [rl.Rule("w[kv]$", side="left")] if rank >= 32 else []
    made = rl.Spec(rank, **{"rules": [path_rule(rule) for rule in rules], **spec})

    def make(schedule: optax.Schedule, key: Array) -> Method:
        rule = None if inner is None else inner()
        return factor_form(
            schedule, made, inner=rule, moments=moments, key=key, fused=fused
        )

    return Entry(name, make, guess, batch, rewarm, made.resample_every)


def path_rule(rule: rl.Rule) -> rl.Rule:
    """The rule, for the matrices of every layer."""
    return rl.Rule(f".*{rule.path}", side=rule.side)


def pair(
    name: str,
    kind: Callable[..., Method],
    rank: int,
    guess: float,
    inner: Callable[[], optax.GradientTransformation] | None = None,
    **spec: Any,
) -> Entry:
    """A method with a pair of factors beside the weights."""
    made = rl.Spec(rank, **{"side": "smaller", "rest": "frozen", **spec})

    def make(schedule: optax.Schedule, key: Array) -> Method:
        options = {} if inner is None else {"inner": inner()}
        return kind(schedule, made, **options, key=key)

    return Entry(name, make, guess, link=made.resample_every)


def full(
    name: str,
    guess: float,
    inner: Callable[[], optax.GradientTransformation] | None = None,
) -> Entry:
    """Full fine-tuning of the same matrices."""

    def make(schedule: optax.Schedule, key: Array) -> Method:
        del key
        return methods.full(schedule, inner=None if inner is None else inner())

    return Entry(name, make, guess)


# The table ---------------------------------------------------------------------------

RANKS = (3, 6, 8, 12, 16, 32)
LINK = 25
ADAM_LINK = 50  # moments start again with every link, so Adam wants longer ones


def momentum() -> optax.GradientTransformation:
    """Orthogonal with momentum."""
    return rl.orthogonal(momentum=0.9)


def second_moment() -> optax.GradientTransformation:
    """Orthogonal with a mean square for each free column."""
    return rl.orthogonal(second_moment=True)


def column_adam() -> optax.GradientTransformation:
    """Adam with one second moment a column, which no sketch touches and no link ends.

    For factors of two axes. A factor and a row of moments are kept, not two factors, so
    that twice the rank has about the bytes of Adam.
    """
    first_decay, second_decay, tiny = 0.9, 0.999, 1e-8

    def init(params: Any) -> OrthogonalState:
        none, zero = {}, jnp.zeros((), jnp.int32)
        momentum = jax.tree.map(jnp.zeros_like, params)
        columns = jax.tree.map(lambda factor: jnp.zeros(factor.shape[1]), params)
        return OrthogonalState((), momentum, zero, columns, zero, none, none)

    def update(
        updates: Any, state: OrthogonalState, params: Any = None
    ) -> tuple[Any, OrthogonalState]:
        del params
        count, seen = state.count + 1, state.seen + 1
        momentum = jax.tree.map(
            lambda m, f: first_decay * m + (1 - first_decay) * f, state.momentum, updates
        )
        columns = jax.tree.map(
            lambda v, f: second_decay * v + (1 - second_decay) * (f**2).mean(0),
            state.second_moment,
            updates,
        )

        def step(m: Array, v: Array) -> Array:
            root = jnp.sqrt(v / (1 - second_decay**count))
            return m / (1 - first_decay**seen) / (root + tiny)

        new = state._replace(
            momentum=momentum, count=count, second_moment=columns, seen=seen
        )
        return jax.tree.map(step, momentum, columns), new

    return optax.GradientTransformation(init, update)


def rivals() -> list[Entry]:
    """Full fine-tuning and the methods that train pairs."""
    entries = [
        full("full Adam", 0.002),
        full("full orthogonal", 0.002, rl.orthogonal),
        full("full orthogonal, momentum 0.9", 0.001, momentum),
    ]
    for rank, guess in ((2, 0.016), (6, 0.008), (8, 0.008)):
        name = f"LoRA r{rank}"
        entries += [
            pair(f"{name} Adam", methods.lora, rank, guess),
            pair(f"{name} orthogonal", methods.lora, rank, 0.008, rl.orthogonal),
        ]
    cola = methods.cola
    return [
        *entries,
        pair("Chain of LoRA r6 Adam", cola, 6, 0.008, resample_every=ADAM_LINK),
        pair("Chain of LoRA r6 orthogonal", cola, 6, 0.008, rl.orthogonal),
        pair("Asymmetric LoRA r12 Adam", methods.asymmetric, 12, 0.008),
        pair(
            "RAC-LoRA r12 as published",
            methods.published_raclora,
            12,
            0.001,
            resample_every=ADAM_LINK,
        ),
    ]


def raclora() -> list[Entry]:
    """Ours: Adam inside, and without state at every rank and two links."""
    entries = [
        ours(f"RAC r{rank} Adam", rank, inner=None, resample_every=ADAM_LINK)
        for rank in (3, 12, 32)
    ]
    for rank in RANKS:
        name = f"RAC r{rank} orthogonal"
        entries += [
            ours(name, rank),
            ours(f"{name}, link 1", rank, resample_every=1),
        ]
    for rank in (16, 32):
        name = f"RAC r{rank} orthogonal, momentum 0.9"
        entries.append(ours(name, rank, guess=0.001, inner=momentum))
    for rank in (8, 16, 32):
        name = f"RAC r{rank} block orthogonal"
        entries.append(ours(name, rank, sketch="block"))
    for rank in (16, 32):
        name = f"RAC r{rank} block orthogonal"
        entries += [
            ours(f"{name}, link 1", rank, sketch="block", resample_every=1),
            ours(
                f"{name}, momentum 0.9",
                rank,
                guess=0.001,
                inner=momentum,
                sketch="block",
            ),
        ]
    name = "RAC r12 orthogonal, second moment"
    return [*entries, ours(name, 12, inner=second_moment)]


FUSED = ", fused"


def fused() -> list[Entry]:
    """The best rules without state, by the update inside the backward pass."""
    return [
        ours(f"RAC r{rank} block orthogonal{FUSED}", rank, sketch="block", fused=True)
        for rank in (16, 32)
    ]


# Those that run to 1000 steps and to the time of 1000 steps of full Adam.
LONG = (
    "full Adam",
    "full orthogonal",
    "LoRA r8 Adam",
    "LoRA r8 orthogonal",
    "RAC r12 Adam",
    "RAC r16 orthogonal",
    "RAC r32 orthogonal",
    "RAC r32 orthogonal, momentum 0.9",
    "RAC r8 block orthogonal",
    "RAC r16 block orthogonal",
    "RAC r32 block orthogonal",
    "RAC r32 block orthogonal, momentum 0.9",
)

# What takes their place in a decoder of width 512, in ``benchmarks.speed.laws``.
IN_A_DECODER = {
    "LoRA r8 Adam": "LoRA, rank first",
    "LoRA r8 orthogonal": "LoRA, rank first",
    "RAC r8 block orthogonal": "block, dim / 8",
    "RAC r16 block orthogonal": "block, dim / 4",
    "RAC r32 block orthogonal": "block, dim / 2",
    "RAC r32 block orthogonal, momentum 0.9": "block, dim / 2",
}
