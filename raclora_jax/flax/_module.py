"""Gradients and updates of an nnx module in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree
from raclora_jax._extras import extra
from raclora_jax._forms import apply, fusable, fused, gradient
from raclora_jax.flax._optimizer import Optimizer
from raclora_jax.flax._tree import Model, check_module, part_as_tree, to_tree

with extra("flax"):
    from flax import nnx


def value_and_grad(
    loss_fn: Callable[..., Any], spec: Spec | int, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``raclora_jax.value_and_grad`` for an nnx module in place.

    What the loss changes in the module besides parameters (batch statistics, counters of
    random streams) is changed in ``model``, as ``nnx.value_and_grad`` does.

    Args:
      loss_fn: ``loss_fn(model, *args)``, a real scalar, or ``(scalar, aux)``.
      spec: The spec of the run.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      ``function(model, optimizer, *args)`` that returns ``(loss, grads)``, or
      ``((loss, aux), grads)``, by what the optimizer trains, its ``wrt``. In place of
      an ``Optimizer`` it takes an ``opt_state`` that began as
      ``tx.init(to_tree(model)[0])``.

    Raises:
      TypeError: From the function, if ``model`` is no ``nnx.Module``.
      ValueError: From the function, as ``raclora_jax.value_and_grad``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
      >>> optimizer = rl.flax.Optimizer(model, rl.raclora(0.1, 2, key=0))
      >>> grad_fn = value_and_grad(lambda model, x: jnp.sum(model(x) ** 2), 2)
      >>> loss, grads = grad_fn(model, optimizer, jnp.ones((3, 6)))
      >>> grads["kernel"].value.shape
      (2, 6)
    """

    def compute(model: Model, optimizer: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        check_module(model, "value_and_grad")
        opt_state: PyTree = optimizer
        wrt: Any = nnx.Param
        if isinstance(optimizer, nnx.Optimizer):
            opt_state, wrt = nnx.as_pure(optimizer.opt_state), optimizer.wrt
        tree, restore = part_as_tree(model, wrt)
        # What else the loss changes (statistics, counts of keys) comes out as aux:
        # written to the module inside the trace, it would be tracers.
        loss = _of_tree(loss_fn, has_aux, restore, wrt, args, kwargs)
        grad_fn = gradient.value_and_grad(loss, spec, has_aux=True)
        (value, (aux, rest)), grads = grad_fn(tree, opt_state)
        nnx.update(model, rest)
        return ((value, aux) if has_aux else value), grads

    return compute


def fused_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """``raclora_jax.fused_step`` for an nnx module in place.

    Where the loss is not finite nothing of the module changes, neither parameters nor
    what else the loss changes in it. Donate module and optimizer to ``nnx.jit``, or the
    weights are held twice.

    Args:
      loss_fn: ``loss_fn(model, *args)``, a real scalar, or ``(scalar, aux)``.
      tx: What ``raclora`` returned, with nothing around it.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      ``step(model, optimizer, *args)`` that moves the module and the ``Optimizer``, and
      returns the loss, or ``(loss, aux)``.

    Raises:
      TypeError: If ``tx`` is not what ``raclora`` returned; from the step, if ``model``
        is no ``nnx.Module``.
      ValueError: As ``raclora_jax.fused_step``; from the step, if the optimizer has
        another transformation.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model, tx = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rl.raclora(0.1, 2, key=0)
      >>> optimizer = rl.flax.Optimizer(model, tx)
      >>> step = fused_step(lambda model, x: jnp.sum(model(x) ** 2), tx)
      >>> step = nnx.jit(step, donate_argnums=(0, 1))
      >>> before = step(model, optimizer, jnp.ones((3, 6)))
      >>> bool(step(model, optimizer, jnp.ones((3, 6))) < before)
      True
    """
    fusable.descent_of(tx)

    def step(model: Model, optimizer: Optimizer, *args: Any, **kwargs: Any) -> PyTree:
        check_module(model, "fused_step")
        check_same(optimizer, tx)
        wrt = optimizer.wrt
        tree, restore = part_as_tree(model, wrt)
        loss = _of_tree(loss_fn, has_aux, restore, wrt, args, kwargs)
        take = fused.fused_step(loss, tx, has_aux=True)
        stepped, opt_state, out = take(tree, nnx.as_pure(optimizer.opt_state))
        value, (aux, rest) = out
        before = nnx.state(model, nnx.Not(wrt))
        nnx.update(model, nnx.state(restore(stepped), wrt))
        nnx.update(model, _if_finite(value, rest, before))
        optimizer.advance(opt_state)
        return (value, aux) if has_aux else value

    return step


def _of_tree(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    restore: Callable[[Any], Any],
    wrt: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[PyTree], tuple[Any, tuple[Any, Any]]]:
    """A loss of a module as one of its tree, with what else it changes beside it."""

    def loss(tree: PyTree) -> tuple[Any, tuple[Any, Any]]:
        inside = restore(tree)
        out = loss_fn(inside, *args, **kwargs)
        value, aux = out if has_aux else (out, None)
        return value, (aux, nnx.state(inside, nnx.Not(wrt)))

    return loss


def _if_finite(value: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new state, or where the value is not finite what of it was there before."""
    before = dict(nnx.to_flat_state(old))
    goes = jnp.isfinite(value)

    def one(place: Any, variable: Any) -> Any:
        held = before.get(place)
        if _form(variable) != _form(held):
            return variable  # recorded in this call, or of another batch
        return jax.tree.map(lambda n, o: jnp.where(goes, n, o), variable, held)

    return nnx.from_flat_state([(p, one(p, v)) for p, v in nnx.to_flat_state(new)])


def _form(variable: Any) -> Any:
    """The tree of a variable, and the types of its arrays."""
    leaves, treedef = jax.tree.flatten(variable)
    return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def check_same(optimizer: Any, tx: optax.GradientTransformation) -> None:
    """Refuses an optimizer that is not ours or has another transformation."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "a fused step takes a raclora_jax.flax.Optimizer, got "
            f"{type(optimizer).__name__}; make one with Optimizer(model, tx)"
        )
    if optimizer.tx is not tx:
        raise ValueError(
            "the optimizer has another transformation than this fused step; make both "
            "with one tx"
        )


def apply_updates(model: nnx.Module, updates: PyTree, *gone: Any) -> nnx.Module:
    """``raclora_jax.apply_updates`` on the parameters of an nnx module, in place.

    Args:
      model: The module.
      updates: What ``tx.update`` returned.
      *gone: State and spec are no arguments any more, and are refused.

    Returns:
      The same module.

    Raises:
      TypeError: If ``model`` is no ``nnx.Module``.
      ValueError: As ``raclora_jax.apply_updates``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model, tx = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rl.raclora(0.1, 2, key=0)
      >>> tree, _ = to_tree(model)
      >>> grad_fn = value_and_grad(lambda model, x: jnp.sum(model(x) ** 2), 2)
      >>> loss, grads = grad_fn(model, tx.init(tree), jnp.ones((3, 6)))
      >>> updates, opt_state = tx.update(grads, tx.init(tree), tree)
      >>> model = apply_updates(model, updates)
    """
    check_module(model, "apply_updates")
    tree, restore = to_tree(model)
    stepped = apply.apply_updates(tree, updates, *gone)
    nnx.update(model, nnx.state(restore(stepped), nnx.Param))
    return model
