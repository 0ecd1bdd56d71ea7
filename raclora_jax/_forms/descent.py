"""Descent by the directions of a step: rate, decay, and rounding to the weights' grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from raclora_jax._chain.state import RacLoraState
from raclora_jax._chain.step import Run, Step
from raclora_jax._core import paths, rounding
from raclora_jax._core.factor import Factor, Origin, is_factor
from raclora_jax._core.keys import step_keys
from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.merge import merge_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Drawn, FactorValue, Leaf, Leaves, PyTree, Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """What ``raclora`` was given, checked, and what it does with it.

    Args:
      run: What is static.
      data: Key data.
      learning_rate: As in ``raclora``, like the rest.
      weight_decay: A number or a traced one.
      mask: Which leaves decay.
      clip_norm: The largest norm of a gradient, or ``None``.
    """

    run: Run
    data: Array
    learning_rate: optax.ScalarOrSchedule
    weight_decay: Any
    mask: PyTree
    clip_norm: Scalar | None

    @property
    def decays(self) -> bool:
        """Whether anything may decay; a traced number may."""
        decay = self.weight_decay
        return not (isinstance(decay, (int, float)) and decay == 0)

    def decaying(self, params: PyTree) -> dict[str, bool]:
        """Which leaves decay."""
        return _decaying(self.mask, params) if self.decays else {}

    def rate(self, count: Array) -> Array:
        """The learning rate of an update, at least float32."""
        rate = self.learning_rate
        return _wide_scalar(rate(count) if callable(rate) else rate)

    def update(
        self, updates: PyTree, state: RacLoraState, params: PyTree = None, **extra: Any
    ) -> tuple[Any, RacLoraState]:
        """The ``update`` of an optax transformation."""
        weights = _weights(updates, params, self.decays)
        decaying = self.decaying(params)
        step = self.run.step(updates, state, params, extra, self.clip_norm)
        answer, new = self.updates(step, state, weights, decaying)
        return step.answer(answer), new

    def updates(
        self,
        step: Step,
        before: RacLoraState,
        weights: Leaves,
        decaying: Mapping[str, bool | Array],
    ) -> tuple[Leaves, RacLoraState]:
        """The updates that the directions of a step come to, and the state after it.

        Args:
          step: The step.
          before: The state before it.
          weights: ``{path: weight}``, where the step needs them.
          decaying: ``{path: whether it decays}``, flags that may be traced.

        Returns:
          ``{path: update}`` of the leaves that are trained, and the state.
        """
        changes = self._changes(step, before, weights, decaying)
        masters = step.state.master
        master = {p: masters[p] + c.delta() for p, c in changes.items() if p in masters}
        # Two keys: *rounding* draws the new weight, *landing* the dense update that
        # optax.apply_updates turns into that weight.
        rounds = rounding_keys(step, before.count)
        dense = [step.plans[p] for p, g in step.grads.items() if not is_factor(g)]
        lands = _low_keys(before.key_data, "landing", dense, before.count)
        rounding_rule = self.run.spec.rounding

        def update(path: str, grad: Leaf) -> Leaf:
            change, key, exact = changes[path], rounds.get(path), master.get(path)
            if is_factor(grad):
                origin = Origin.of(change.plan, change.sketch, key, exact)
                return like(grad, change.value, change.decay, change.plan, origin)
            if change.weight is None or not rounding.is_low(change.plan.dtype):
                return change.delta().astype(grad.dtype)
            target = change.landed(rounding_rule, rounds[path], exact)
            return rounding.landing_update(change.weight, target, grad.dtype, lands[path])

        answer = {path: update(path, grad) for path, grad in step.trained.items()}
        return answer, step.state._replace(master=masters | master)

    def _changes(
        self,
        step: Step,
        before: RacLoraState,
        weights: Leaves,
        decaying: Mapping[str, bool | Array],
    ) -> dict[str, Change]:
        """What each trained leaf is to change by."""
        rate = self.rate(before.count)
        shrink = None
        if self.decays:
            shrink = jnp.where(step.emitted, rate * self.weight_decay, 0.0)

        def change(path: str) -> Change:
            plan, descent = step.plans[path], -rate
            value = jax.tree.map(
                lambda one: (descent * one).astype(plan.wide_dtype),
                step.directions[path],
            )
            # No JAX array: that nothing decays is to be known while tracing.
            decay: Array | np.ndarray = np.zeros((), plan.wide_dtype)
            decays = decaying.get(path, False)
            if decays is not False:
                decay = jnp.asarray(shrink, plan.wide_dtype)
                decay = decay if decays is True else jnp.where(decays, decay, 0)
            sketch = step.sketches.get(path)
            return Change(plan, value, decay, sketch, weights.get(path))

        return {path: change(path) for path in step.trained}


class Change(NamedTuple):
    """What one leaf is to change by: ``lift(value) - decay * W``.

    Attributes:
      plan: Plan of the leaf.
      value: The factor, or both, or the difference of a leaf trained in full.
      decay: Scalar; no JAX array where nothing decays.
      sketch: The sketch of an adapted leaf.
      weight: W, or ``None`` where the step does not need it.
    """

    plan: LeafPlan
    value: FactorValue
    decay: Array | np.ndarray
    sketch: Drawn
    weight: Leaf

    def delta(self) -> Array:
        """The change as an array of the leaf's shape, at least float32."""
        delta: Array = self.value
        if self.plan.adapted:
            delta = lift_leaf(self.value, self.sketch, self.plan)
        if isinstance(self.decay, np.ndarray):
            return delta
        return delta - self.decay * jnp.asarray(self.weight, self.plan.wide_dtype)

    def landed(self, rule: str, key: Array, master: Array | None) -> Array:
        """The new weight, rounded to its grid but still in float32.

        Args:
          rule: As in ``Spec``.
          key: Key for rounding.
          master: The new float32 copy of the weight, where there is one.
        """
        if master is None and self.plan.adapted:
            whole = self.value, self.sketch, self.decay, self.plan
            merged = merge_leaf(self.weight, *whole, rule, key)
            return merged.astype(self.plan.wide_dtype)
        if master is None:
            master = self.weight.astype(self.plan.wide_dtype) + self.delta()
        return rounding.settle(master, self.weight.dtype, rule, key)


def _weights(updates: PyTree, params: PyTree, decays: bool) -> dict[str, Array]:
    """The weights, where the step needs them."""
    if params is not None:
        leaves, _ = paths.flatten(params)
        return leaves
    grads, _ = paths.flatten(updates, is_leaf=is_factor)
    low = [p for p, g in grads.items() if is_factor(g) or rounding.is_low(g.dtype)]
    if decays or low:
        why = "weight_decay" if decays else f"leaf {paths.show(low[0])}"
        raise ValueError(
            f"raclora needs params for {why}: call tx.update(grads, state, params)"
        )
    return {}


def _decaying(mask: PyTree, params: PyTree) -> dict[str, bool]:
    """Which leaves decay; a mask may stop at a prefix of the params."""
    leaves, _ = paths.flatten(params)
    if mask is None:
        return dict.fromkeys(leaves, True)
    flags, _ = paths.flatten(mask(params) if callable(mask) else mask)

    def decays(path: str) -> bool:
        prefix = path
        while prefix not in flags and prefix:
            prefix = prefix.rpartition("/")[0]
        if prefix not in flags:
            raise ValueError(
                f"mask says nothing about leaf {paths.show(path)}; it must be a tree of "
                "bools like the params, or a prefix of one"
            )
        return bool(flags[prefix])

    return {path: decays(path) for path in leaves}


def _low_keys(
    data: Array, domain: str, plans: Iterable[LeafPlan], count: Array
) -> dict[str, Array]:
    """A key per trained leaf below float32, for one purpose in one step."""
    low = [
        plan.path
        for plan in plans
        if plan.mode != "frozen" and rounding.is_low(plan.dtype)
    ]
    return step_keys(data, domain, low, count)


def rounding_keys(step: Step, count: Array) -> dict[str, Array]:
    """The key of each leaf below float32 for the rounding of this step."""
    return _low_keys(step.state.key_data, "rounding", step.plans.values(), count)


def like(
    grad: Factor,
    value: FactorValue,
    decay: Array | np.ndarray,
    plan: LeafPlan,
    origin: Origin,
) -> Factor:
    """The update of a gradient, in its dtypes."""
    return Factor(
        jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), value, grad.value),
        decay.astype(grad.decay.dtype),
        plan.stamp,
        origin,
    )


def _wide_scalar(value: Scalar) -> Array:
    value = jnp.asarray(value)
    low = value.dtype.itemsize < 4 or not jnp.issubdtype(value.dtype, jnp.inexact)
    return value.astype(jnp.float32) if low else value
