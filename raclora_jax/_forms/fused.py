"""The fused form: leaves are updated inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._autodiff.interpret import arrays, constants, evaluate
from raclora_jax._autodiff.reads import preceding, scanned_once
from raclora_jax._autodiff.updating import Moving, moving_weight
from raclora_jax._autodiff.uses import Uses
from raclora_jax._autodiff.weight import leaf_weight
from raclora_jax._chain.boxes import boxed_as
from raclora_jax._chain.separable import (
    is_common,
    joined_parts,
    parts_of,
)
from raclora_jax._chain.slices import Held, Known, Slice
from raclora_jax._chain.state import RacLoraState, is_state
from raclora_jax._chain.step import Step
from raclora_jax._core import paths, rounding
from raclora_jax._core.factor import Factor
from raclora_jax._core.keys import step_keys
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sides import apart, in_link, switched
from raclora_jax._core.types import Drawn, FactorValue, Leaf, Leaves, OptState, PyTree
from raclora_jax._forms.apply import applied
from raclora_jax._forms.descent import Descent
from raclora_jax._forms.fusable import check_alone, descent_of, tell_of_two_copies
from raclora_jax._forms.gradient import Traced, traced, zero_trained_leaves


def fused_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    low_gradients: bool = False,
) -> Callable[..., tuple[Any, Any, Any]]:
    """A training step that updates the weights inside the backward pass.

    It is ``value_and_grad``, ``tx.update`` and ``apply_updates`` in one, on the same
    state: a run may change from one form to the other at any step. A leaf that one
    ``scan`` runs over, as a model's stacked layers, moves layer by layer while the
    backward pass goes through that scan, so that the gradient of a layer is gone before
    that of the next exists. Other leaves have a gradient of their factor, and each moves
    by itself. Donate ``params`` and ``opt_state`` to ``jit``, or the weights are held
    twice.

    Where the loss is not finite nothing moves; where the gradient of a matrix is not,
    that matrix and its moments stay, and ``skipped`` of the state counts it.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a real scalar, or ``(scalar, aux)``.
      tx: What ``raclora`` returned, with nothing around it.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.
      low_gradients: Whether the gradient of a factor is formed, and summed over devices,
        in the dtype of its weight, as full fine-tuning sends it; in float32 otherwise.
        Weights of 16 bits then send half the bytes.

    Returns:
      ``step(params, opt_state, *args)`` that returns ``(params, opt_state, loss)``, or
      ``(params, opt_state, (loss, aux))``.

    Raises:
      TypeError: If ``tx`` is not what ``raclora`` returned.
      ValueError: If it needs the gradients of all leaves at once; and from the step, what
        ``value_and_grad`` raises.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> params = {"layers": jnp.ones((3, 6, 6)) / 6}
      >>> def loss_fn(params, x, y):
      ...     def layer(x, W):
      ...         return jnp.tanh(x @ W), None
      ...     x, _ = jax.lax.scan(layer, x, params["layers"])
      ...     return jnp.mean((x - y) ** 2)
      >>> x, y = jnp.ones((4, 6)), jnp.zeros((4, 6))
      >>> spec = rl.trace_spec(loss_fn, params, x, y, rank=2)
      >>> tx = rl.raclora(1e-2, spec, inner=rl.orthogonal(), key=0)
      >>> step = jax.jit(fused_step(loss_fn, tx), donate_argnums=(0, 1))
      >>> params, state, loss = step(params, tx.init(params), x, y)
      >>> bool(step(params, state, x, y)[2] < loss)
      True

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited
      Resources <https://arxiv.org/abs/2306.09782>`_, 2023.
    """
    return reporting_step(
        loss_fn, tx, has_aux, lambda uses, _: uses.warn(), low_gradients
    )


def reporting_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    has_aux: bool,
    report: Callable[[Uses, frozenset[str]], None],
    low_gradients: bool = False,
) -> Callable[..., tuple[Any, Any, Any]]:
    """``fused_step`` that hands what it saw of the model to ``report``.

    Args:
      loss_fn: As in ``fused_step``.
      tx: As in ``fused_step``.
      has_aux: As in ``fused_step``.
      report: Called with the uses, and the paths of the leaves that move inside a scan,
        whenever the step is traced.
      low_gradients: As in ``fused_step``.

    Returns:
      As ``fused_step``.
    """
    descent = descent_of(tx)

    def step(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        spec = descent.run.spec
        model = traced(loss_fn, spec, has_aux, params, opt_state, args, kwargs)
        check_alone(opt_state)
        tell_of_two_copies(model.leaves)
        fused = _Fused.of(descent, model, params, low_gradients)
        out, leaves, state = fused.stepped()
        report(fused.uses, frozenset(fused.slices))

        def put(node: Any) -> Any:
            return boxed_as(state, node) if is_state(node) else node

        new_state = jax.tree.map(put, opt_state, is_leaf=is_state)
        return paths.unflatten(model.treedef, leaves), new_state, out

    return step


class _Fused(NamedTuple):
    """One fused step.

    Attributes:
      descent: What ``raclora`` was given.
      model: The loss and its leaves.
      before: The state, as its link finds it.
      sketches: ``{path: sketch}``.
      slices: ``{path: step of a slice}`` of the leaves that a scan updates.
      decaying: ``{path: whether it decays}``.
      uses: What the model is seen to do with its leaves.
      low_gradients: As in ``fused_step``.
    """

    descent: Descent
    model: Traced
    before: RacLoraState
    sketches: dict[str, Drawn]
    slices: dict[str, Slice]
    decaying: dict[str, bool]
    uses: Uses
    low_gradients: bool

    @classmethod
    def of(
        cls, descent: Descent, model: Traced, params: PyTree, low_gradients: bool
    ) -> _Fused:
        run, plans = descent.run, model.plans
        before, sketches = run.entered(model.state, plans)
        once = scanned_once(model.staged.jaxpr)
        # A drawn side is a branch around the backward pass, and what a scan updates
        # cannot be in two branches at once: such runs update no leaf on the way.
        drawn = any(plan.sides for plan in plans.values())
        slices = {
            path: Slice.of(run, plan, _gradient_dtype(plan, low_gradients))
            for place, (path, plan) in enumerate(plans.items())
            if plan.adapted and plan.batch[:1] == (0,) and place in once and not drawn
        }
        return cls(
            descent,
            model,
            before,
            sketches,
            slices,
            descent.decaying(params),
            Uses(),
            low_gradients,
        )

    @property
    def plans(self) -> dict[str, LeafPlan]:
        return self.model.plans

    def stepped(self) -> tuple[PyTree, Leaves, RacLoraState]:
        """What the loss returned, the new weights and the new state."""
        model, run = self.model, self.descent.run
        (loss, *aux), grads, held = self._backward()
        goes = jnp.isfinite(loss)
        rest, state, inner = self._moved(grads, goes)
        old = self.before.inner_state.lowrank
        for path, one in self.slices.items():
            # What all leaves share, such as Adam's count, goes on once a step: every
            # round of every scan reads it as it was before.
            pairs = zip(one.common_after(old), one.parts(old)[1], strict=True)
            common = [jnp.where(goes, new, before) for new, before in pairs]
            inner.append(one.whole(held[path].inner, common))
        lowrank = joined_parts(old, inner)
        masters = {p: h.master for p, h in held.items() if h.master is not None}
        skipped = sum(jnp.sum(h.skipped) for h in held.values())
        state = run.counted(
            state._replace(
                inner_state=state.inner_state._replace(lowrank=lowrank),
                master=state.master | masters,
                skipped=state.skipped + jnp.asarray(skipped, jnp.int32),
            ),
            goes,
        )
        new = model.leaves | rest | {path: h.weight for path, h in held.items()}
        return model.staged.rebuilt([loss, *aux]), new, state

    def _backward(self) -> tuple[list[Array], Leaves, dict[str, Held]]:
        """Loss and aux, gradients of what is not updated on the way, and what is."""
        model, uses = self.model, self.uses
        held = {path: self._held(path) for path in self.slices}
        others = {p: plan for p, plan in self.plans.items() if p not in held}
        trained = {
            path: jax.tree.map(self._in_gradient_dtype(path), zero)
            for path, zero in zero_trained_leaves(others, model.leaves).items()
        }

        def backward(plans: dict[str, LeafPlan], sketches: dict[str, Array]) -> PyTree:
            def value(
                trained: dict[str, FactorValue], held: dict[str, Held]
            ) -> tuple[tuple[Array, list[Array]], list[Array]]:
                def stand_in(path: str, leaf: Leaf) -> Leaf:
                    if path in held:
                        known, mover = self._known(path), self.slices[path]
                        moving = Moving(held[path], leaf, sketches[path], known, mover)
                        return moving_weight(plans[path], moving, uses)
                    if plans[path].mode != "lowrank":
                        return trained.get(path, leaf)
                    factor = in_link(trained[path], plans[path])
                    return leaf_weight(leaf, plans[path], uses, sketches[path], factor)

                inputs = [stand_in(path, leaf) for path, leaf in model.leaves.items()]
                loss, *aux = evaluate(model.staged.jaxpr, inputs)
                return (arrays([loss], "output")[0], uses.tokens), constants(aux)

            (loss, tokens), back, aux = jax.vjp(value, trained, held, has_aux=True)
            # A token's cotangent says whether anything may move.
            goes = [jnp.isfinite(loss).astype(token.dtype) for token in tokens]
            return [loss, *aux], *back((jnp.ones_like(loss), goes))

        found: tuple[list[Array], Leaves, dict[str, Held]]
        found = switched(self.plans, self.sketches, backward)
        return found

    def _in_gradient_dtype(self, path: str) -> Callable[[Array], Array]:
        plan = self.plans[path]
        if plan.mode != "lowrank":
            return lambda zero: zero
        return lambda zero: zero.astype(_gradient_dtype(plan, self.low_gradients))

    def _held(self, path: str) -> Held:
        own, _ = self.slices[path].parts(self.before.inner_state.lowrank)
        weight = self.model.leaves[path]
        skipped = jnp.zeros(self.plans[path].shape[:1])
        return Held(weight, self.before.master.get(path), own, skipped)

    def _known(self, path: str) -> Known:
        plan, count = self.plans[path], self.before.count
        _, common = self.slices[path].parts(self.before.inner_state.lowrank)
        key = decay = None
        rate = self.descent.rate(count)
        if rounding.is_low(plan.dtype):
            keys = step_keys(self.before.key_data, "rounding", [path], count)
            key = jax.random.key_data(keys[path])
        if self.decaying.get(path):
            decay = rate * self.descent.weight_decay
        return Known(rate, decay, key, common)

    def _moved(
        self, grads: Leaves, allowed: Array
    ) -> tuple[Leaves, RacLoraState, list[OptState]]:
        """The other leaves after their steps, each by itself.

        Returns:
          Weights, the state with masters and moments of dense leaves, and the parts of
          the state of the inner rule for factors.
        """
        before, plans = self.before, {path: self.plans[path] for path in grads}
        goes = self._going(grads, allowed)
        alone = {p: self._alone(p, g, goes[p], allowed) for p, g in grads.items()}
        gradients = {
            path: Factor.gradient(_wide(grad, plans[path]), plans[path])
            if plans[path].adapted
            else grad
            for path, grad in grads.items()
        }
        directions = {path: direction for path, (direction, _) in alone.items()}
        step = Step(
            before, plans, gradients, None, self.sketches, directions, jnp.asarray(True)
        )
        leaves = {path: self.model.leaves[path] for path in grads}
        decaying = {p: g if self.decaying.get(p) else False for p, g in goes.items()}
        updates, state = self.descent.updates(step, before, leaves, decaying)
        parts = {
            adapted: [
                part for p, (_, part) in alone.items() if plans[p].adapted == adapted
            ]
            for adapted in (True, False)
        }
        dense = joined_parts(state.inner_state.dense, parts[False])
        state = state._replace(
            inner_state=state.inner_state._replace(dense=dense),
            skipped=before.skipped
            + sum((~one).astype(jnp.int32) for one in goes.values()),
        )
        return applied(leaves, updates), state, parts[True]

    def _going(self, grads: Leaves, allowed: Array) -> dict[str, Array]:
        """Which leaves move; known of each when nothing reads it any more."""
        names = [*self.plans]
        needs = preceding(self.model.staged.jaxpr)
        earlier = {names[place]: names[other] for place, other in needs.items()}

        def one(path: str, grad: FactorValue) -> Array:
            finite = [jnp.all(jnp.isfinite(part)) for part in jax.tree.leaves(grad)]
            done = _done(grads[earlier[path]] if earlier.get(path) in grads else None)
            return jnp.all(jnp.stack([allowed, *finite, *done]))

        return {path: one(path, grad) for path, grad in grads.items()}

    def _alone(
        self, path: str, grad: FactorValue, goes: Array, allowed: Array
    ) -> tuple[FactorValue, OptState]:
        """Direction of one leaf, and its part of the state of the inner rule after it."""
        run, plan, inner = self.descent.run, self.plans[path], self.before.inner_state
        mode = "lowrank" if plan.adapted else "dense"
        group = {
            name: jnp.where(goes, one, 0).astype(plan.wide_dtype)
            for name, one in apart(plan, grad).items()
        }
        template = jax.eval_shape(lambda: run.inner_init((plan,), mode))
        own = parts_of(getattr(inner, mode), template)
        moved, after, _ = run.directions(
            {mode: group}, inner._replace(**{mode: own}), {path: plan}, {}
        )
        direction = jax.tree.map(lambda one: jnp.where(goes, one, 0), moved[path])
        part = _where_it_goes(getattr(after, mode), own, group, goes, allowed)
        return direction, part


def _gradient_dtype(plan: LeafPlan, low: bool) -> jnp.dtype:
    return jnp.dtype(plan.dtype) if low else plan.wide_dtype


def _wide(gradient: FactorValue, plan: LeafPlan) -> FactorValue:
    return jax.tree.map(lambda one: one.astype(plan.wide_dtype), gradient)


def _done(gradient: FactorValue | None) -> list[Array]:
    """What is true once a gradient is there.

    It is that of a leaf before another one: what reads the other is then behind, and the
    compiler has no reason to copy it when it moves.
    """
    return [jnp.count_nonzero(one) >= 0 for one in jax.tree.leaves(gradient)]


def _where_it_goes(
    new: OptState, old: OptState, names: Iterable[str], goes: Array, allowed: Array
) -> OptState:
    """The new state of a leaf if it moved, and what all leaves share if any did."""

    def one(keypath: tuple[Any, ...], new: Array, old: Array) -> Array:
        common = all(is_common(keypath, name) for name in names)
        return jnp.where(allowed if common else goes, new, old)

    return jax.tree_util.tree_map_with_path(one, new, old)
