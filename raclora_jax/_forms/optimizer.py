"""The optimizer form: RAC-LoRA as an optax transformation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from raclora_jax._chain.boxes import keeping_boxes
from raclora_jax._chain.state import RacLoraState, find_state, sketches_of_last
from raclora_jax._chain.step import Run
from raclora_jax._core import paths, rounding
from raclora_jax._core.keys import key_data, leaf_keys
from raclora_jax._core.lowrank import Factor, add_lifted, check_factor, is_factor
from raclora_jax._core.merge import merge_leaf
from raclora_jax._core.plan import LeafPlan, plan_leaves
from raclora_jax._core.spec import Spec, as_spec, kind
from raclora_jax._core.types import (
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

    def update(
        updates: PyTree, state: RacLoraState, params: PyTree = None, **extra: Any
    ) -> tuple[Any, RacLoraState]:
        step = run.step(updates, state, params, extra)

        def one(path: str, grad: Leaf) -> Leaf:
            if is_factor(grad):
                return _like(grad, step.directions[path], np.zeros(()))
            return step.lifted(path, step.directions[path]).astype(grad.dtype)

        return step.answer(one), step.state

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
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)

    def update(
        updates: PyTree, state: RacLoraState, params: PyTree = None, **extra: Any
    ) -> tuple[Any, RacLoraState]:
        weights = _weights(updates, params, decays)
        decaying = _decaying(mask, params) if decays else {}
        step = run.step(updates, state, params, extra)
        rate = _wide_scalar(
            learning_rate(state.count) if callable(learning_rate) else learning_rate
        )
        shrink = jnp.where(step.emitted, rate * weight_decay, 0.0) if decays else 0.0
        master, descent = dict(state.master), -rate
        dense = [step.plans[p] for p, g in step.grads.items() if not is_factor(g)]
        rounds = _low_keys(state.key_data, "rounding", dense, state.count)
        lands = _low_keys(state.key_data, "landing", dense, state.count)

        def one(path: str, grad: Leaf) -> Leaf:
            plan = step.plans[path]
            value = jax.tree.map(
                lambda one: (descent * one).astype(plan.wide_dtype),
                step.directions[path],
            )
            # No JAX array: that nothing decays is to be known while tracing.
            decay: Array | np.ndarray = np.zeros((), plan.wide_dtype)
            if decaying.get(path):
                decay = jnp.asarray(shrink, plan.wide_dtype)
            if is_factor(grad) and path not in master:
                return _like(grad, value, decay)
            delta = step.lifted(path, value)
            weight: Leaf = weights.get(path)
            if decaying.get(path):
                delta = delta - decay * jnp.asarray(weight, plan.wide_dtype)
            if path in master:
                master[path] = master[path] + delta
            if is_factor(grad):
                return _like(grad, value, decay)
            if weight is None or not rounding.is_low(plan.dtype):
                return delta.astype(grad.dtype)
            if path in master:
                exact = master[path]
            elif plan.mode == "lowrank":
                exact = add_lifted(weight, value, step.sketches[path], decay, plan)
            else:
                exact = weight.astype(plan.wide_dtype) + delta
            target = rounding.settle(exact, weight.dtype, run.spec.rounding, rounds[path])
            return rounding.landing_update(weight, target, grad.dtype, lands[path])

        answer = step.answer(one)
        return answer, step.state._replace(master=master)

    return optax.GradientTransformationExtraArgs(
        partial(run.init, data), keeping_boxes(update)
    )


def apply_updates(
    params: PyTree, updates: PyTree, opt_state: PyTree, spec: Spec | int
) -> PyTree:
    """Adds updates to the weights: ``W + lift(value) - decay * W``, rounded once.

    Dense leaves are added as ``optax.apply_updates`` does, ``Factor`` leaves are lifted
    on the sketch of the update that made them; frozen ones stay.

    Args:
      params: The parameters.
      updates: What ``tx.update`` returned.
      opt_state: The optimizer state that ``tx.update`` returned with them.
      spec: The spec of the run.

    Returns:
      The new parameters, dtypes kept.

    Raises:
      ValueError: If ``opt_state`` holds none or several RAC-LoRA states, or an update
        does not belong to its leaf.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W, tx = jnp.zeros((6, 4)), rl.raclora(0.1, 2, key=0)
      >>> state = tx.init(W)
      >>> grads = rl.project(jnp.ones((6, 4)), rl.sample_sketch(W, 2, key=0), 2)
      >>> updates, state = tx.update(grads, state, W)
      >>> rl.apply_updates(W, updates, state, 2).shape
      (6, 4)
    """
    spec, state = as_spec(spec), find_state(opt_state)
    leaves, treedef = paths.flatten(params)
    steps, _ = paths.flatten(updates, is_leaf=is_factor)
    plans = plan_leaves(spec, leaves)
    _check_steps(steps, plans)
    # The state has counted the update that is being applied.
    count = jnp.maximum(state.count - 1, 0)
    lifted = [plans[path] for path, step in steps.items() if is_factor(step)]
    keys = _low_keys(state.key_data, "rounding", lifted, count)
    stepped = [plan for path, plan in plans.items() if path in steps]
    sketches = sketches_of_last(state, stepped, spec) if lifted else {}

    def one(path: str, weight: Leaf) -> Leaf:
        step, plan = steps.get(path), plans[path]
        if step is None:
            return weight
        if not is_factor(step):
            return optax.apply_updates(weight, step)
        if path in state.master:
            return state.master[path].astype(weight.dtype)
        return merge_leaf(
            weight,
            step.value,
            sketches[path],
            step.decay,
            plan,
            spec.rounding,
            keys.get(path),
        )

    return paths.unflatten(treedef, {p: one(p, w) for p, w in leaves.items()})


def _check_rate(rate: object) -> None:
    if not (callable(rate) or _is_scalar(rate)):
        raise TypeError(
            f"learning_rate must be a number or a schedule, got {kind(rate)}; write for "
            "example 1e-3 or optax.cosine_decay_schedule(1e-3, steps)"
        )


def _check_decay(decay: object) -> None:
    if not _is_scalar(decay):
        raise TypeError(
            f"weight_decay must be a number, got {kind(decay)}; for a schedule wrap "
            "raclora in optax.inject_hyperparams"
        )


def _is_scalar(value: Any) -> bool:
    array = hasattr(value, "dtype") and jnp.shape(value) == ()
    return array or isinstance(value, int | float)


def _check_steps(steps: Leaves, plans: dict[str, LeafPlan]) -> None:
    """Refuses updates that do not belong to the weights they are to be added to."""
    for path, step in steps.items():
        if path not in plans:
            raise ValueError(
                f"the update of {paths.show(path)} has no leaf in params; apply updates "
                "to the tree whose gradients tx.update took"
            )
        if is_factor(step):
            check_factor(step, plans[path])
        elif jnp.shape(step) != plans[path].shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected an update of shape "
                f"{plans[path].shape}, got {jnp.shape(step)}; apply what tx.update "
                "returned"
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
    return leaf_keys(data, domain, low, count)


def _like(grad: Factor, value: FactorValue, decay: Array | np.ndarray) -> Factor:
    """A ``Factor`` in the dtypes of the gradient."""
    return Factor(
        jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), value, grad.value),
        decay.astype(grad.decay.dtype),
        grad.stamp,
    )


def _wide_scalar(value: Scalar) -> Array:
    value = jnp.asarray(value)
    low = value.dtype.itemsize < 4 or not jnp.issubdtype(value.dtype, jnp.inexact)
    return value.astype(jnp.float32) if low else value
