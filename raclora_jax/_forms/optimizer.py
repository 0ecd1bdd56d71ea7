"""The optimizer form: RAC-LoRA as an optax transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from raclora_jax._chain.boxes import keeping_boxes
from raclora_jax._chain.state import RacLoraState
from raclora_jax._chain.step import Run, Step
from raclora_jax._core import checks, paths, rounding
from raclora_jax._core.factor import Factor, Origin, is_factor
from raclora_jax._core.keys import key_data, step_keys
from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.merge import merge_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import (
    Drawn,
    FactorValue,
    KeyLike,
    Leaf,
    Leaves,
    Moments,
    PyTree,
    Scalar,
)


def scale_by_raclora(
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    moments: Moments = "reset",
    clip_norm: Scalar | None = None,
    key: KeyLike,
) -> optax.GradientTransformationExtraArgs:
    """Runs any optax rule on projected gradients and lifts its answer back.

    With H the projector on the link's sketch, an identity inside gives
    ``scaling^2 * H G``, which is Eq. 3/4 of the paper. No learning rate, no sign: chain
    ``optax.scale_by_learning_rate`` after it. Weights below float32 want ``raclora``,
    which rounds the whole step without bias.

    Args:
      spec: A ``Spec`` or a rank.
      inner: Any optax preconditioner that needs no params and carries no learning rate;
        ``optax.scale_by_adam()`` by default.
      moments: What a new link does to the inner state of the factors: ``"reset"`` starts
        it again, counters too; ``"keep"`` leaves it; ``"transport"`` re-expresses first
        moments in the new sketch and leaves the rest.
      clip_norm: Clips the gradient to this global norm before ``inner``, estimated from
        what the sketches see of it: the same in dense and in factor form.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      An optax transformation. ``update`` answers a dense gradient with a dense update
      and a ``Factor`` with a ``Factor``, leaf by leaf, dtypes kept.

    Raises:
      ValueError: If an argument is out of range or ``inner`` carries a sign.
      TypeError: If an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_raclora(2, inner=optax.identity(), key=0)
      >>> W = jnp.zeros((6, 4))
      >>> update, _ = tx.update(jnp.ones((6, 4)), tx.init(W), W)
      >>> update.shape
      (6, 4)

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024.
    """
    run = Run.of(spec, inner, moments, steps_weights=False)
    data = key_data(key)
    _check_clip(clip_norm)

    def update(
        updates: PyTree, state: RacLoraState, params: PyTree = None, **extra: Any
    ) -> tuple[Any, RacLoraState]:
        step = run.step(updates, state, params, extra, clip_norm)
        rounds = _rounding_keys(step, state.count)

        def one(path: str, grad: Leaf) -> Leaf:
            value, plan = step.directions[path], step.plans[path]
            if is_factor(grad):
                origin = Origin.of(plan, step.sketches[path], rounds.get(path), None)
                return _like(grad, value, np.zeros(()), plan, origin)
            change = Change(plan, value, np.zeros(()), step.sketches.get(path), None)
            return change.delta().astype(grad.dtype)

        return step.answer({p: one(p, g) for p, g in step.trained.items()}), step.state

    return optax.GradientTransformationExtraArgs(
        partial(run.init, data), keeping_boxes(update)
    )


def raclora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    inner: optax.GradientTransformation | None = None,
    weight_decay: Any = 0.0,
    mask: PyTree = None,
    moments: Moments = "reset",
    clip_norm: Scalar | None = None,
    key: KeyLike,
) -> optax.GradientTransformationExtraArgs:
    """RAC-LoRA with learning rate, decoupled weight decay and rounding without bias.

    Per step ``W <- round(W - lr * lift(inner(project(G))) - lr * weight_decay * W)``,
    where the sketch behind ``project`` and ``lift`` is drawn again every
    ``spec.resample_every`` updates. Weights below float32 are rounded by
    ``spec.rounding``; that holds only while this is last in its chain.

    Args:
      learning_rate: A float or a schedule of the emitted updates.
      spec: A ``Spec`` or a rank.
      inner: Any optax preconditioner that needs no params and carries no learning rate;
        ``optax.scale_by_adam()`` by default.
      weight_decay: Decoupled decay of the dense weights; may be traced.
      mask: Which leaves decay: a tree of bools, or a prefix of one, or a function of
        the params that gives it. ``None`` decays every trained leaf.
      moments: ``"reset"``, ``"keep"`` or ``"transport"``, see ``scale_by_raclora``.
      clip_norm: Clips the gradient to this global norm before ``inner``, estimated from
        what the sketches see of it: the same in dense and in factor form.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      An optax transformation; dense updates are for ``optax.apply_updates``, ``Factor``
      updates for ``raclora_jax.apply_updates``.

    Raises:
      ValueError: If an argument is out of range or ``inner`` carries a sign.
      TypeError: If an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> W = jnp.zeros((6, 4))
      >>> target = jnp.arange(24.0).reshape(6, 4) / 24
      >>> loss = lambda W: jnp.sum((W - target) ** 2)
      >>> tx = optax.chain(raclora(0.1, Spec(1, resample_every=5), key=0))
      >>> state = tx.init(W)
      >>> for _ in range(200):
      ...     updates, state = tx.update(jax.grad(loss)(W), state, W)
      ...     W = optax.apply_updates(W, updates)
      >>> bool(loss(W) < 0.1 * loss(jnp.zeros((6, 4))))
      True

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024.
    """
    run = Run.of(spec, inner, moments, steps_weights=True)
    data = key_data(key)
    _check_rate(learning_rate)
    _check_decay(weight_decay)
    _check_clip(clip_norm)
    descent = Descent(run, data, learning_rate, weight_decay, mask, clip_norm)
    return RacLora.of(descent)


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
        rounds = _rounding_keys(step, before.count)
        dense = [step.plans[p] for p, g in step.grads.items() if not is_factor(g)]
        lands = _low_keys(before.key_data, "landing", dense, before.count)
        rounding_rule = self.run.spec.rounding

        def update(path: str, grad: Leaf) -> Leaf:
            change, key, exact = changes[path], rounds.get(path), master.get(path)
            if is_factor(grad):
                origin = Origin.of(change.plan, change.sketch, key, exact)
                return _like(grad, change.value, change.decay, change.plan, origin)
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


class RacLora(optax.GradientTransformationExtraArgs):  # type: ignore[misc]  # untyped
    """The transformation that ``raclora`` returns; it knows what it was given."""

    descent: Descent

    @classmethod
    def of(cls, descent: Descent) -> RacLora:
        """The transformation of a descent."""
        start = partial(descent.run.init, descent.data)
        tx = cls(start, keeping_boxes(descent.update))
        tx.descent = descent
        return tx


def _check_rate(rate: object) -> None:
    if not callable(rate):
        checks.scalar(
            "learning_rate",
            rate,
            expected="a number or a schedule",
            way_out="write for example 1e-3 or optax.cosine_decay_schedule(1e-3, steps)",
        )


def _check_decay(decay: object) -> None:
    way_out = "for a schedule wrap raclora in optax.inject_hyperparams"
    checks.scalar("weight_decay", decay, way_out=way_out)


def _check_clip(norm: object) -> None:
    if norm is not None:
        checks.scalar(
            "clip_norm",
            norm,
            checks.POSITIVE,
            expected="a number or None",
            way_out="write for example 1.0; None clips nothing",
        )


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


def _rounding_keys(step: Step, count: Array) -> dict[str, Array]:
    """The key of each leaf below float32 for the rounding of this step."""
    return _low_keys(step.state.key_data, "rounding", step.plans.values(), count)


def _like(
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
