"""The methods of the field, one line each: what a newcomer adds is one more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jax import Array

import raclora_jax as rl
from benchmarks.pretrained.entries import factor_form
from raclora_jax import methods
from raclora_jax._core.planning import plan_tree
from raclora_jax.methods import Method
from raclora_jax.methods._layers import layer_of


class Setting(NamedTuple):
    """What a task gives to a method.

    Attributes:
      spec: Rank, views and links.
      steps: Of the run.
      leaves: How many leaves are adapted.
    """

    spec: rl.Spec
    steps: int
    leaves: int

    @classmethod
    def of(cls, spec: rl.Spec, shapes: Any, steps: int) -> Setting:
        """The setting of a model by the shapes of its weights."""
        plans = plan_tree(spec, shapes).values()
        return cls(spec, steps, sum(plan.adapted for plan in plans))


class Entry(NamedTuple):
    """One method.

    Attributes:
      name: What tables call it.
      make: ``make(schedule, setting, key) -> Method``.
      fields: What its spec has beside rank, views and links of the task.
      ranked: Whether a rank means anything to it.
      family: Whose it is, for figures.
    """

    name: str
    make: Callable[[optax.Schedule, Setting, Array], Method]
    fields: dict[str, Any]
    ranked: bool
    family: str

    def method(self, setting: Setting, schedule: optax.Schedule, key: Array) -> Method:
        """The method in the setting of a task."""
        spec = dataclasses.replace(setting.spec, **self.fields)
        return self.make(schedule, setting._replace(spec=spec), key)


def full(name: str, inner: optax.GradientTransformation) -> Entry:
    """Full fine-tuning."""
    return Entry(
        name,
        lambda schedule, setting, key: methods.full(schedule, inner=inner),
        {},
        False,
        "full",
    )


def pair(
    name: str,
    kind: Callable[..., Method],
    fields: dict[str, Any] | None = None,
    **options: Any,
) -> Entry:
    """A method with a pair of factors beside the weights."""
    return Entry(
        name,
        lambda schedule, setting, key: kind(schedule, setting.spec, key=key, **options),
        fields or {},
        True,
        "pairs",
    )


def projected(name: str, make: Callable[..., Method], **fields: Any) -> Entry:
    """A method that forms the dense gradient and steps in a basis."""
    return Entry(name, make, fields, True, "projected")


def ours(
    name: str, inner: Callable[[], optax.GradientTransformation], **fields: Any
) -> Entry:
    """RAC-LoRA by the public functions, its gradients never at full size."""
    return Entry(
        name,
        lambda schedule, setting, key: factor_form(
            schedule, setting.spec, inner=inner(), moments="reset", key=key
        ),
        {"alpha": "dim", **fields},
        True,
        "RAC-LoRA",
    )


def galore(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """GaLore, which draws nothing."""
    return methods.galore(schedule, setting.spec)


def golore(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """GoLore, random from the middle of the run on."""
    middle = setting.steps // 2
    return methods.golore(schedule, setting.spec, random_from=middle, key=key)


def flora(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """Flora."""
    return methods.flora(schedule, setting.spec, key=key)


def fira(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """Fira, which draws nothing."""
    return methods.fira(schedule, setting.spec)


def apollo(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """APOLLO."""
    return methods.apollo(schedule, setting.spec, key=key)


def apollo_mini(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """APOLLO-Mini."""
    return methods.apollo_mini(schedule, setting.spec, key=key)


def pissa(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """PiSSA, which draws nothing."""
    return methods.pissa(schedule, setting.spec)


def fed_krso(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """One client of FedKRSO, a round of four links, each of one of four seeds."""
    return methods.fed_krso(schedule, setting.spec, seeds=4, links=4, key=key)


def muon(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """Muon."""
    return methods.muon(schedule, setting.spec)


def adalomo(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """AdaLomo."""
    return methods.adalomo(schedule)


def badam(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """BAdam, a block a link."""
    return methods.badam(schedule, steps=setting.spec.resample_every, key=key)


def any_layer(path: str) -> str:
    """The layer of a leaf; in the small tasks, which have none, the leaf itself."""
    return layer_of(path) or path


def lisa(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """LISA, one drawn layer a link."""
    every = setting.spec.resample_every
    return methods.lisa(schedule, steps=every, layers=1, layer=any_layer, key=key)


def layered(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """RAC-LoRA without state, from a drawn layer on in each link."""
    own = dataclasses.replace(setting.spec, alpha="dim")
    return methods.layered(schedule, own, layer=any_layer, inner=rl.orthogonal(), key=key)


def xgblora(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """XGBLoRA, a booster a link, a third of the leaves in each, as in its paper."""
    return methods.xgblora(
        schedule,
        setting.spec,
        boosters=setting.steps // setting.spec.resample_every,
        steps=setting.steps,
        leaves=max(1, round(setting.leaves / 3)),
        key=key,
    )


def heterolora(schedule: optax.Schedule, setting: Setting, key: Array) -> Method:
    """HeteroLoRA, static, a quarter of the leaves or one."""
    budget = max(0.25, 1 / setting.leaves)
    return methods.heterolora(schedule, setting.spec, budget=budget, key=key)


ENTRIES = (
    full("full SGD", optax.identity()),
    full("full Adam", optax.scale_by_adam()),
    full("full orthogonal", rl.orthogonal()),
    # Every number, as all of this family, though a task may freeze some for adapters.
    Entry("Muon", muon, {"rest": "dense"}, False, "full"),
    Entry("AdaLomo", adalomo, {}, False, "full"),
    Entry("BAdam", badam, {}, False, "some layers"),
    Entry("LISA", lisa, {}, False, "some layers"),
    pair("LoRA", methods.lora),
    pair("LoRA, orthogonal", methods.lora, inner=rl.orthogonal()),
    pair("LoRA+", methods.lora_plus),
    Entry("PiSSA", pissa, {}, True, "pairs"),
    pair("rsLoRA", methods.rslora, {"alpha": 1.0}),
    pair("LoRA-FA", methods.lora_fa),
    pair("Asymmetric LoRA", methods.asymmetric),
    pair("DoRA", methods.dora),
    pair("SoRA", methods.sora),
    pair("LoRA-Pro", methods.lora_pro),
    pair("LoRA-RITE", methods.lora_rite),
    pair("ALLoRA", methods.allora, eta=1.0),
    Entry("HeteroLoRA", heterolora, {}, True, "pairs"),
    pair("Chain of LoRA", methods.cola),
    Entry("XGBLoRA", xgblora, {"rank": 1}, False, "pairs"),
    # Of 0, 0.01, 0.1 and 1 the best on the language model.
    pair("RSO", methods.rso, proximal=0.1),
    Entry("FedKRSO, one client", fed_krso, {}, True, "pairs"),
    pair("RAC-LoRA as published", methods.published_raclora),
    projected("GaLore", galore),
    projected("GoLore", golore),
    projected("Fira", fira),
    projected("APOLLO", apollo),
    Entry("APOLLO-Mini", apollo_mini, {}, False, "projected"),
    # In links of 10 or 25 its momentum may grow faster than it decays.
    projected("Flora", flora, resample_every=50),
    ours("RAC-LoRA, gradient descent", optax.identity),
    ours("RAC-LoRA, Adam", optax.scale_by_adam),
    ours("RAC-LoRA, orthogonal", rl.orthogonal),
    ours("RAC-LoRA, orthogonal, block", rl.orthogonal, sketch="block"),
    Entry("RAC-LoRA, orthogonal, from a drawn layer", layered, {}, True, "RAC-LoRA"),
)
