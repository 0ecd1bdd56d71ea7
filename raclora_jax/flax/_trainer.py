"""A run of an nnx module in one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree
from raclora_jax._extras import extra
from raclora_jax._forms import trainer
from raclora_jax._forms.costs import Summary
from raclora_jax.flax._module import check_same, fused_step, value_and_grad
from raclora_jax.flax._optimizer import Optimizer
from raclora_jax.flax._tree import Model, check_module, part_as_tree

with extra("flax"):
    from flax import nnx


class Trainer:
    """``raclora_jax.Trainer`` for an nnx module in place.

    A step takes the memory of the module's arrays for the new ones: what else holds them,
    ``nnx.clone(model)`` too, is to have copies of its own,
    ``jax.tree.map(jnp.copy, nnx.state(model))``.

    Args:
      loss_fn: ``loss_fn(model, *args)``, a real scalar, or ``(scalar, aux)``.
      model: The module; only read.
      *args: What else the loss takes, a batch for example; abstract arrays are enough.
      wrt: What is trained, as in ``nnx.Optimizer``.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.
      **options: ``rank``, ``learning_rate``, ``key`` and the further options of
        ``raclora_jax.Trainer``.

    Attributes:
      spec: What was read off the module's own operations.
      tx: What ``raclora`` returned.
      fused: Whether the step updates inside the backward pass.

    Raises:
      TypeError: If ``model`` is no ``nnx.Module``, or there is no option of a name.
      ValueError: As ``raclora_jax.Trainer``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model, x = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), jnp.ones((3, 6))
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> trainer = Trainer(loss_fn, model, x, rank=2, learning_rate=0.1, key=0)
      >>> optimizer = trainer.init(model)
      >>> before = trainer.step(model, optimizer, x)
      >>> bool(trainer.step(model, optimizer, x) < before)
      True
    """

    spec: Spec
    tx: optax.GradientTransformationExtraArgs
    fused: bool

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        model: Model,
        *args: Any,
        wrt: Any = nnx.Param,
        has_aux: bool = False,
        **options: Any,
    ) -> None:
        check_module(model, "Trainer")
        # Shapes in place of arrays, which the first step gives away.
        shapes: nnx.Module = nnx.eval_shape(lambda: nnx.merge(*nnx.split(model)))
        tree, restore = part_as_tree(shapes, wrt)

        def of_tree(tree: PyTree, rest: PyTree, *args: Any) -> Any:
            inside = restore(tree)
            nnx.update(inside, rest)
            return loss_fn(inside, *args)

        rest = nnx.state(shapes, nnx.Not(wrt))
        self._of_tree = trainer.Trainer(
            of_tree, tree, rest, *args, has_aux=has_aux, **options
        )
        self._wrt = wrt
        self.spec, self.tx = self._of_tree.spec, self._of_tree.tx
        self.fused = self._of_tree.fused
        if self.fused:
            step = fused_step(loss_fn, self.tx, has_aux=has_aux)
        else:
            step = _in_parts(loss_fn, self.spec, self.tx, has_aux)
        self._step = nnx.jit(
            _staying(step, jax.tree.map(trainer.place_on_mesh, nnx.state(model))),
            donate_argnums=(0, 1),
        )

    def init(self, model: nnx.Module) -> Optimizer:
        """The optimizer before the first step.

        Args:
          model: The module.

        Returns:
          An ``Optimizer`` of ``tx``.
        """
        return Optimizer(model, self.tx, wrt=self._wrt)

    def step(self, model: nnx.Module, optimizer: Optimizer, *args: Any) -> Any:
        """One compiled step that moves the module and its optimizer in place.

        Args:
          model: The module.
          optimizer: What ``init`` returned.
          *args: What else the loss takes: trees of arrays.

        Returns:
          The loss, or ``(loss, aux)``.

        Raises:
          ValueError: As ``value_and_grad``, if an array stands twice in what is given, or
            if the optimizer has another transformation.
        """
        states = nnx.state(model), nnx.state(optimizer)
        trainer.check_given_once(*states, args)
        return self._step(model, optimizer, *args)

    def summary(self) -> Summary:
        """What the run costs, leaf by leaf, and the peak of its compiled step.

        Returns:
          As ``raclora_jax.summary``.
        """
        return self._of_tree.summary()


def _staying(step: Callable[..., PyTree], places: PyTree) -> Callable[..., PyTree]:
    """A step after which the arrays of the module are on a mesh where they were."""

    def stay(array: Any, place: Any) -> Any:
        return jax.lax.with_sharding_constraint(array, place)

    def staying(model: nnx.Module, optimizer: Optimizer, *args: Any) -> PyTree:
        out = step(model, optimizer, *args)
        moved = dict(nnx.to_flat_state(nnx.state(model)))
        kept = [
            (path, jax.tree.map(stay, moved[path], place))
            for path, place in nnx.to_flat_state(places)
            if jax.tree.leaves(place)
        ]
        nnx.update(model, nnx.from_flat_state(kept))
        return out

    return staying


def _in_parts(
    loss_fn: Callable[..., Any],
    spec: Spec,
    tx: optax.GradientTransformation,
    has_aux: bool,
) -> Callable[..., PyTree]:
    grad_fn = value_and_grad(loss_fn, spec, has_aux=has_aux)

    def step(model: nnx.Module, optimizer: Optimizer, *args: Any) -> PyTree:
        check_same(optimizer, tx)
        out, grads = grad_fn(model, optimizer, *args)
        optimizer.update(model, grads)
        return out

    return step
