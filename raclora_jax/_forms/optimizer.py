"""The optimizer form: RAC-LoRA as an optax transformation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import optax

from raclora_jax._chain.boxes import keeping_boxes
from raclora_jax._chain.state import RacLoraState
from raclora_jax._chain.step import Run
from raclora_jax._core import checks
from raclora_jax._core.factor import Origin, is_factor
from raclora_jax._core.keys import key_data
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, Leaf, Moments, PyTree, Scalar
from raclora_jax._forms.descent import Change, Descent, like, rounding_keys


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
        rounds = rounding_keys(step, state.count)

        def one(path: str, grad: Leaf) -> Leaf:
            value, plan = step.directions[path], step.plans[path]
            if is_factor(grad):
                origin = Origin.of(plan, step.sketches[path], rounds.get(path), None)
                return like(grad, value, np.zeros(()), plan, origin)
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
