"""The step of one slice of a stacked leaf, by itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

from raclora_jax._chain.inner import as_rule, knowing
from raclora_jax._chain.separable import is_common, parts_of
from raclora_jax._chain.step import Run
from raclora_jax._core import paths
from raclora_jax._core.lowrank import lift_leaf
from raclora_jax._core.merge import merge_in_stack, merge_leaf, moves_slices
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import Drawn, OptState


class Held(NamedTuple):
    """What moves of a stacked leaf, slice by slice.

    Attributes:
      weight: The leaf.
      master: Its float32 copy, or ``None``.
      inner: What the inner rule holds for it, each array stacked as the leaf is.
      skipped: float32, 1 for every slice that was left as it was.
    """

    weight: Array
    master: Array | None
    inner: list[Array]
    skipped: Array


class Moved(NamedTuple):
    """One slice after its rule.

    Attributes:
      value: What its factor moves by.
      decay: What its weight shrinks by; no JAX array where nothing does.
      inner: What the inner rule holds of it.
      skipped: How often it was left as it was.
    """

    value: Array
    decay: Array | np.ndarray
    inner: list[Array]
    skipped: Array


class Known(NamedTuple):
    """What the steps of all the slices have in common.

    Attributes:
      rate: The learning rate.
      decay: What a weight shrinks by; no JAX array where nothing does.
      key: Key data for rounding, or ``None``.
      common: What the inner rule holds for all leaves at once, before the step.
    """

    rate: Array
    decay: Array | None
    key: Array | None
    common: list[Array]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Takes the step of one slice: rule, decay, rounding; as ``raclora`` does.

    Args:
      run: The run.
      plan: The plan of one slice.
      gradient_dtype: The dtype in which the gradient of its factor is formed.
    """

    run: Run
    plan: LeafPlan
    gradient_dtype: jnp.dtype

    @classmethod
    def of(cls, run: Run, plan: LeafPlan, gradient_dtype: jnp.dtype) -> Slice:
        """The step of the slices of a stacked leaf, checked.

        Args:
          run: The run.
          plan: The plan of the leaf; its first axis stacks matrices.
          gradient_dtype: As of the class.

        Raises:
          ValueError: If the inner rule holds something of a leaf that is no stack, or no
            real numbers.
        """
        one = cls(run, plan.of_slice, gradient_dtype)
        stacked = _shapes(run, plan)
        for keypath, leaf in jax.tree_util.tree_leaves_with_path(one.template):
            if is_common(keypath, plan.path):
                continue
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"leaf {paths.show(plan.path)}: inner keeps an array of {leaf.dtype} "
                    "of it, and a fused step carries real numbers only; keep what all "
                    "leaves have in common once, or use rl.value_and_grad, tx.update and "
                    "rl.apply_updates in place of a fused step"
                )
            if stacked[keypath] != (plan.shape[0], *leaf.shape):
                raise ValueError(
                    f"leaf {paths.show(plan.path)}: inner keeps an array of shape "
                    f"{stacked[keypath]} of it, and of one of its {plan.shape[0]} "
                    f"matrices one of shape {leaf.shape}, so it does not act on each "
                    "matrix by itself; use rl.value_and_grad, tx.update and "
                    "rl.apply_updates in place of a fused step"
                )
        return one

    @functools.cached_property
    def template(self) -> OptState:
        """The state of the inner rule for one slice, as shapes."""
        return jax.eval_shape(lambda: self.run.inner_init((self.plan,), "lowrank"))

    def parts(self, inner: OptState) -> tuple[list[Array], list[Array]]:
        """Of the state of the inner rule what it holds of the leaf, and of all leaves."""
        own: list[Array] = []
        common: list[Array] = []
        found = parts_of(inner, self.template)
        for keypath, leaf in jax.tree_util.tree_leaves_with_path(found):
            (common if is_common(keypath, self.plan.path) else own).append(leaf)
        return own, common

    def whole(self, own: list[Array], common: list[Array]) -> OptState:
        """The inverse of ``parts``, for a slice or for the leaf."""
        these, those, path = iter(own), iter(common), self.plan.path
        return jax.tree_util.tree_map_with_path(
            lambda keypath, _: next(those if is_common(keypath, path) else these),
            self.template,
        )

    @staticmethod
    def together(
        slices: Sequence[Slice],
        held: Sequence[Held],
        known: Sequence[Known],
        gradients: Sequence[Array],
        allowed: Array,
    ) -> list[Moved]:
        """By what the slices of several leaves move.

        One whose gradient is not finite stays as it was. The inner rule is called once
        for all of them, since what it does to matrices of one shape is one operation.

        Args:
          slices: The steps.
          held: What is held of each leaf's slice.
          known: What the steps have in common.
          gradients: The gradients of the factors.
          allowed: Whether anything is to move.
        """
        goes = [allowed & jnp.all(jnp.isfinite(gradient)) for gradient in gradients]
        pairs = zip(slices, gradients, goes, strict=True)
        finite = {s.plan.path: jnp.where(go, gradient, 0) for s, gradient, go in pairs}
        before = [
            s.whole(h.inner, k.common)
            for s, h, k in zip(slices, held, known, strict=True)
        ]
        directions, after = _ruled(
            slices[0].run, [s.plan for s in slices], finite, before
        )
        each = zip(slices, held, known, goes, strict=True)
        return [
            s._moved(h, k, directions[s.plan.path], after, go) for s, h, k, go in each
        ]

    def _moved(
        self,
        held: Held,
        known: Known,
        direction: Array,
        after: OptState,
        goes: Array,
    ) -> Moved:
        plan = self.plan
        inner, _ = self.parts(after)
        inner = [
            jnp.where(goes, new, old).astype(old.dtype)
            for new, old in zip(inner, held.inner, strict=True)
        ]
        descent = -jnp.where(goes, known.rate, 0)
        value = (descent * direction).astype(plan.wide_dtype)
        # No JAX array: that nothing decays is to be known while tracing.
        decay: Array | np.ndarray = np.zeros((), plan.wide_dtype)
        if known.decay is not None:
            decay = jnp.where(goes, known.decay, 0).astype(plan.wide_dtype)
        skipped = held.skipped + (~goes).astype(held.skipped.dtype)
        return Moved(value, decay, inner, skipped)

    def put(
        self, held: Held, moved: Moved, sketch: Drawn, known: Known, index: Array
    ) -> Held:
        """What is held of the leaf, with one slice after its step.

        The slice is read where it is written, so that a compiler which knows the index
        late makes it late, and holds no second copy of the slices before.
        """
        plan, start, key = self.plan, None, None
        value, decay, inner, skipped = moved
        rest = [*held.inner, held.skipped], [*inner, skipped]
        *inner, skipped = [_put(a, n, index) for a, n in zip(*rest, strict=True)]
        if held.master is not None:
            old = _at(held.weight, index)
            delta = lift_leaf(value, sketch, plan)
            if isinstance(decay, Array):
                delta = delta - decay * old.astype(plan.wide_dtype)
            new = _at(held.master, index) + delta
            weight = _put(held.weight, new.astype(old.dtype), index)
            return Held(weight, _put(held.master, new, index), inner, skipped)
        if known.key is not None:
            key = jax.random.wrap_key_data(known.key, impl="threefry2x32")
            # Each number of the stack draws as it does when the stack moves at once.
            start = index.astype(jnp.uint32) * jnp.uint32(math.prod(plan.shape))
        rounded = plan, plan.rounding, key, start
        if moves_slices(plan, decay):
            weight = merge_in_stack(held.weight, value, sketch, *rounded, index)
        else:
            old = _as_stored(_at(held.weight, index))
            new = _as_stored(merge_leaf(old, value, sketch, decay, *rounded))
            weight = _put(held.weight, new, index)
        return Held(weight, None, inner, skipped)

    def common_after(self, inner: OptState) -> list[Array]:
        """What the inner rule holds for all leaves at once, after a step."""
        _, common = self.parts(inner)
        # Which gradient and which moments is no matter: it depends on none.
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.template
        )
        own, _ = self.parts(zeros)
        gradient = jnp.zeros(self.plan.factor_shape, self.plan.wide_dtype)
        before = [self.whole(own, common)]
        _, after = _ruled(self.run, [self.plan], {self.plan.path: gradient}, before)
        return self.parts(after)[1]


def _as_stored(array: Array) -> Array:
    """The array, in a TPU's memory in the order of its axes.

    Its compiler would lay a slice out as the product that changes it, then the whole
    stack as the slice, and copy the stack for that.
    """
    order = Layout(tuple(range(array.ndim)))
    stored: Array = lax.platform_dependent(
        array,
        tpu=lambda array: with_layout_constraint(array, order),
        default=lambda array: array,
    )
    return stored


def _at(stack: Array, index: Array) -> Array:
    """One slice."""
    return lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _put(stack: Array, new: Array, index: Array) -> Array:
    """The stack with one slice replaced."""
    return lax.dynamic_update_index_in_dim(stack, new, index, 0)


def _ruled(
    run: Run,
    plans: Sequence[LeafPlan],
    gradients: dict[str, Array],
    states: Sequence[OptState],
) -> tuple[dict[str, Array], OptState]:
    """One call of the inner rule for several leaves, each with a state of its own."""
    own = {plan.path: plan for plan in plans}
    held: dict[Any, Array] = {}
    for state in states:
        held |= dict(jax.tree_util.tree_leaves_with_path(state))
    template = jax.eval_shape(lambda: run.inner_init(tuple(plans), "lowrank"))
    before = jax.tree_util.tree_map_with_path(lambda at, _: held[at], template)
    wide = {path: one.astype(own[path].wide_dtype) for path, one in gradients.items()}
    with knowing(own):
        moved, after = as_rule(run.inner).update(wide, before, None, plans=own)
    return moved, after


def _shapes(run: Run, plan: LeafPlan) -> dict[Any, tuple[int, ...]]:
    state = jax.eval_shape(lambda: run.inner_init((plan,), "lowrank"))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {keypath: leaf.shape for keypath, leaf in leaves}
