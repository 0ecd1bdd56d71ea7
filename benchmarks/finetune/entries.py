"""What the comparison compares: every method as a line of one of two tables."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array

import raclora_jax as rl
from benchmarks.finetune import training
from raclora_jax import methods

# A quarter of the hidden width. The head has 5 classes: no room for it on that side.
RANK = 16
HEAD = rl.Rule("Dense_2/kernel", side="left")


class Entry(NamedTuple):
    """One line of a table.

    Attributes:
      name: What the table calls it: the method, a comma, what sets it apart.
      make: ``make(schedule, spec, key)``, the method.
      spec: The spec; the link length is put in when it is known.
      chained: Whether there are links.
    """

    name: str
    make: Callable[[optax.Schedule, rl.Spec, Array], methods.Method]
    spec: rl.Spec
    chained: bool

    def build(self, link: int | None) -> training.Build:
        """The method with links of that many steps, for a schedule and a key."""
        spec = self.spec
        if link is not None:
            spec = dataclasses.replace(spec, resample_every=link)
        return lambda schedule, key: self.make(schedule, spec, key)


def adam() -> list[Entry]:
    """Every method at rank 1, Adam inside.

    A left sketch trains the output side, a right one the input side.
    """
    table = [Entry("full fine-tuning", _full, _spec(1), False)]
    kinds = (
        ("LoRA", methods.lora, False),
        ("Chain of LoRA", methods.cola, True),
        ("Asymmetric LoRA", methods.asymmetric, False),
        ("RAC-LoRA as published", methods.published_raclora, True),
        ("RAC-LoRA", methods.raclora, True),
    )
    for (name, make, chained), side in itertools.product(kinds, ("left", "right")):
        spec = _spec(1, side=side)
        table.append(Entry(f"{name}, {side}", keyed(make), spec, chained))
    return table


def orthogonal() -> list[Entry]:
    """The methods that need no optimizer state, ``rl.orthogonal()`` inside.

    RAC-LoRA sketches the columns, by both laws, at ranks 1 and ``RANK``; the last line
    is the larger rank with Adam inside.
    """
    full = functools.partial(_full, inner=rl.orthogonal())
    table = [Entry("full fine-tuning", full, _spec(1), False)]
    for rank in (1, RANK):
        pair = _spec(rank, side="left")
        ours = sketched(rank)
        lora, cola, raclora = (
            keyed(make, inner=rl.orthogonal())
            for make in (methods.lora, methods.cola, methods.raclora)
        )
        block = dataclasses.replace(ours, sketch="block")
        table += [
            Entry(f"LoRA, rank {rank}", lora, pair, False),
            Entry(f"Chain of LoRA, rank {rank}", cola, pair, True),
            Entry(f"RAC-LoRA, rank {rank}", raclora, ours, True),
            Entry(f"RAC-LoRA, rank {rank}, block", raclora, block, True),
        ]
    with_adam = Entry(
        f"RAC-LoRA, rank {RANK}, Adam", keyed(methods.raclora), sketched(RANK), True
    )
    return [*table, with_adam]


def sketched(rank: int, side: str = "right", **fields: Any) -> rl.Spec:
    """One learning rate for all ranks; the head's rows where its columns are too few."""
    rules = (HEAD,) if rank > 1 else ()
    return _spec(rank, side=side, alpha="dim", rules=rules, **fields)


def keyed(
    make: Callable[..., methods.Method], **options: Any
) -> Callable[..., methods.Method]:
    """The maker of a method that takes its key by name."""
    return lambda schedule, spec, key: make(schedule, spec, key=key, **options)


def _full(
    schedule: optax.Schedule,
    spec: rl.Spec,
    key: Array,
    inner: optax.GradientTransformation | None = None,
) -> methods.Method:
    del spec, key
    return methods.full(schedule, inner=inner)


def _spec(rank: int, **fields: Any) -> rl.Spec:
    """Biases stay frozen, as in the paper."""
    return rl.Spec(rank, rest="frozen", **fields)
