"""Gradients in factor coordinates, straight from the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._autodiff.attach import varying_as
from raclora_jax._autodiff.interpret import arrays, constants, evaluate
from raclora_jax._autodiff.reads import read_inputs
from raclora_jax._autodiff.stage import Staged, stage
from raclora_jax._autodiff.uses import Uses
from raclora_jax._autodiff.weight import leaf_weight
from raclora_jax._chain.around import check_neighbours, check_takes_factors
from raclora_jax._chain.state import (
    RacLoraState,
    check_leaves,
    check_values,
    find_state,
    sketches_now,
)
from raclora_jax._core import paths
from raclora_jax._core.factor import Factor
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sides import in_link, switched, zero_trained
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import FactorValue, Leaf, Leaves, PyTree, TreeDef


def value_and_grad(
    loss_fn: Callable[..., Any], spec: Spec | int, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` whose gradients never exist at full size.

    For an adapted leaf W with sketch S it gives ``project(dloss / dW)``, which for
    ``y = x . W`` and a sketch of the rows is ``scaling * (x . S)^T dy``: the forward
    pass keeps ``x . S`` in place of ``x``, and ``x^T dy`` is never computed. The model
    stays as it is, and is staged as by ``jax.jit``. A use no rule is known for forms its
    gradient in full and projects it, with a warning that names leaf and operation.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a real scalar, or ``(scalar, aux)``.
      spec: The spec of the run.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      ``function(params, opt_state, *args)`` that returns ``(loss, grads)``, or
      ``((loss, aux), grads)``. ``grads`` has a ``Factor`` for each adapted leaf, an array
      for each dense one, and ``optax.MaskedNode()`` for each frozen one.

    Raises:
      ValueError: From the function: if the loss is no real scalar, never uses an adapted
        leaf, or ``opt_state`` does not hold one RAC-LoRA state of this spec.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W, x = jnp.zeros((6, 4)), jnp.ones((3, 6))
      >>> tx = rl.raclora(0.1, 2, key=0)
      >>> grad_fn = value_and_grad(lambda W, x: jnp.sum((x @ W - 1) ** 2), 2)
      >>> loss, grads = grad_fn(W, tx.init(W), x)
      >>> float(loss), grads.value.shape
      (12.0, (2, 6))

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Section 5.1.
    """
    return reporting(loss_fn, spec, has_aux, Uses.warn)


def reporting(
    loss_fn: Callable[..., Any],
    spec: Spec | int,
    has_aux: bool,
    report: Callable[[Uses], None],
) -> Callable[..., tuple[Any, Any]]:
    """``value_and_grad`` that hands what it saw of the model to ``report``.

    Args:
      loss_fn: As in ``value_and_grad``.
      spec: The spec of the run.
      has_aux: As in ``value_and_grad``.
      report: Called with the uses whenever the function is traced.

    Returns:
      As ``value_and_grad``.
    """
    spec = as_spec(spec)

    def compute(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        model = traced(loss_fn, spec, has_aux, params, opt_state, args, kwargs)
        plans, leaves, staged = model.plans, model.leaves, model.staged
        check_takes_factors(opt_state, plans)
        check_neighbours(opt_state)
        sketches = sketches_now(model.state, plans.values(), spec).sketches
        uses = Uses()
        trained = zero_trained_leaves(plans, leaves)

        def backward(plans: dict[str, LeafPlan], sketches: dict[str, Array]) -> PyTree:
            def value(trained: dict[str, FactorValue]) -> tuple[Array, list[Array]]:
                def stand_in(path: str, leaf: Leaf) -> Leaf:
                    if plans[path].mode != "lowrank":
                        return trained.get(path, leaf)
                    factor = in_link(trained[path], plans[path])
                    return leaf_weight(leaf, plans[path], uses, sketches[path], factor)

                inputs = [stand_in(path, leaf) for path, leaf in leaves.items()]
                loss, *aux = evaluate(staged.jaxpr, inputs)
                # What stands beside the loss has no gradient.
                return arrays([loss], "output")[0], constants(aux)

            return jax.value_and_grad(value, has_aux=True)(trained)

        (loss, aux), found = switched(plans, sketches, backward)
        report(uses)
        out = staged.rebuilt([loss, *aux])

        def gradient(path: str) -> Leaf:
            plan = plans[path]
            if plan.mode == "frozen":
                return optax.MaskedNode()
            if plan.mode == "dense":
                return found[path]
            return Factor.gradient(found[path], plan)

        grads = paths.unflatten(model.treedef, {path: gradient(path) for path in leaves})
        return out, grads

    return compute


def grad(
    loss_fn: Callable[..., Any], spec: Spec | int, *, has_aux: bool = False
) -> Callable[..., Any]:
    """``jax.grad`` whose gradients never exist at full size; see ``value_and_grad``.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a real scalar, or ``(scalar, aux)``.
      spec: The spec of the run.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      ``function(params, opt_state, *args)`` that returns ``grads``, or ``(grads, aux)``.

    Raises:
      ValueError: From the function, as ``value_and_grad``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W, x = jnp.zeros((6, 4)), jnp.ones((3, 6))
      >>> tx = rl.raclora(0.1, 2, key=0)
      >>> grads = grad(lambda W, x: jnp.sum((x @ W - 1) ** 2), 2)(W, tx.init(W), x)
      >>> grads.value.shape
      (2, 6)
    """
    both = value_and_grad(loss_fn, spec, has_aux=has_aux)

    def compute(params: PyTree, opt_state: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        value, grads = both(params, opt_state, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return compute


class Traced(NamedTuple):
    """A loss as a program, with what is to be trained in it.

    Attributes:
      staged: The program; its inputs are the leaves.
      plans: ``{path: plan}`` in their order.
      leaves: ``{path: leaf}`` likewise.
      treedef: How they are a tree again.
      state: The state of the run.
    """

    staged: Staged
    plans: dict[str, LeafPlan]
    leaves: Leaves
    treedef: TreeDef
    state: RacLoraState


def traced(
    loss_fn: Callable[..., Any],
    spec: Spec,
    has_aux: bool,
    params: PyTree,
    opt_state: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Traced:
    """Stages a loss and checks that params, state and spec fit it.

    Raises:
      ValueError: If they do not, or the loss is no real number.
    """
    plans = plan_tree(spec, params)
    leaves, treedef = paths.flatten(params)
    state = find_state(opt_state)
    check_leaves(state, plans, spec)
    check_values(state)
    staged = stage(lambda p: loss_fn(p, *args, **kwargs), params)
    check_loss(staged.out_shape, has_aux)
    _check_used(staged.jaxpr, plans)
    return Traced(staged, plans, leaves, treedef, state)


def zero_trained_leaves(plans: dict[str, LeafPlan], leaves: Leaves) -> Leaves:
    """What is differentiated: factors at zero, and the leaves trained in full."""
    return {
        path: leaves[path] if plan.mode == "dense" else _zero_factor(plan, leaves[path])
        for path, plan in plans.items()
        if plan.mode != "frozen"
    }


def _zero_factor(plan: LeafPlan, leaf: Leaf) -> FactorValue:
    """Zero, and inside ``shard_map`` as varying as the leaf whose gradient it gets."""
    return jax.tree.map(lambda zero: varying_as(zero, leaf), zero_trained(plan))


def check_loss(out: PyTree, has_aux: bool) -> None:
    """Checks the shapes of what a loss returns.

    Raises:
      ValueError: If they are no real scalar, or no pair of one and something else.
    """
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            "with has_aux=True loss_fn must return (loss, aux), got a "
            f"{type(out).__name__}"
        )
    loss = out[0] if has_aux else out
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(loss).__name__ if shape is None else f"{dtype} of shape {shape}"
        raise ValueError(
            f"loss_fn must return one real number, got {got}; reduce it, for example "
            "with jnp.mean, and pass has_aux=True if it returns more than the loss"
        )


def _check_used(jaxpr: Any, plans: dict[str, LeafPlan]) -> None:
    read = read_inputs(jaxpr)
    for index, (path, plan) in enumerate(plans.items()):
        if plan.mode == "lowrank" and index not in read:
            raise ValueError(
                f"leaf {paths.show(path)} is adapted, but the loss never uses it; leave "
                "it out of params, or freeze it with "
                f"Rule({path!r}, mode='frozen')"
            )
