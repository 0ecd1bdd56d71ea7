"""The methods of the field, one line each: what a newcomer adds is one more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array

import raclora_jax as rl
from benchmarks.contenders import factor_form
from raclora_jax import methods
from raclora_jax.methods import Method


class Entry(NamedTuple):
    """One method.

    Attributes:
      name: What tables call it.
      make: ``make(schedule, spec, key, steps) -> Method``.
      fields: What its spec has beside rank, views and links of the task.
      ranked: Whether a rank means anything to it.
      family: Whose it is, for figures.
    """

    name: str
    make: Callable[[optax.Schedule, rl.Spec, Array, int], Method]
    fields: dict[str, Any]
    ranked: bool
    family: str

    def method(
        self, spec: rl.Spec, schedule: optax.Schedule, key: Array, steps: int
    ) -> Method:
        """The method on the spec of a task."""
        return self.make(schedule, dataclasses.replace(spec, **self.fields), key, steps)


def full(name: str, inner: optax.GradientTransformation) -> Entry:
    """Full fine-tuning."""
    return Entry(
        name,
        lambda schedule, spec, key, steps: methods.full(schedule, inner=inner),
        {},
        False,
        "full",
    )


def pair(name: str, kind: Callable[..., Method], **options: Any) -> Entry:
    """A method with a pair of factors beside the weights."""
    return Entry(
        name,
        lambda schedule, spec, key, steps: kind(schedule, spec, key=key, **options),
        {},
        True,
        "pairs",
    )


def projected(name: str, make: Callable[..., Method]) -> Entry:
    """A method that forms the dense gradient and steps in a basis."""
    return Entry(name, make, {}, True, "projected")


def ours(
    name: str, inner: Callable[[], optax.GradientTransformation], **fields: Any
) -> Entry:
    """RAC-LoRA by the public functions, its gradients never at full size."""
    return Entry(
        name,
        lambda schedule, spec, key, steps: factor_form(
            schedule, spec, inner=inner(), moments="reset", key=key
        ),
        {"alpha": "dim", **fields},
        True,
        "RAC-LoRA",
    )


ENTRIES = (
    full("full SGD", optax.identity()),
    full("full Adam", optax.scale_by_adam()),
    full("full orthogonal", rl.orthogonal()),
    pair("LoRA", methods.lora),
    pair("LoRA, orthogonal", methods.lora, inner=rl.orthogonal()),
    pair("Asymmetric LoRA", methods.asymmetric),
    pair("Chain of LoRA", methods.cola),
    pair("RAC-LoRA as published", methods.published_raclora),
    projected("GaLore", lambda rate, spec, key, steps: methods.galore(rate, spec)),
    projected(
        "GoLore",
        lambda rate, spec, key, steps: methods.golore(
            rate, spec, random_from=steps // 2, key=key
        ),
    ),
    projected("Flora", lambda rate, spec, key, steps: methods.flora(rate, spec, key=key)),
    ours("RAC-LoRA, gradient descent", optax.identity),
    ours("RAC-LoRA, Adam", optax.scale_by_adam),
    ours("RAC-LoRA, orthogonal", rl.orthogonal),
    ours("RAC-LoRA, orthogonal, block", rl.orthogonal, sketch="block"),
)
