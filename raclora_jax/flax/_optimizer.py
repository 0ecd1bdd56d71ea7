"""An ``nnx.Optimizer`` that takes gradients in factor coordinates."""

from __future__ import annotations

from typing import Any

import optax

from raclora_jax._core import paths
from raclora_jax._core.factor import is_factor
from raclora_jax._core.types import Leaf, PyTree
from raclora_jax._extras import extra
from raclora_jax._forms import apply
from raclora_jax.flax._tree import check_module

with extra("flax"):
    from flax import nnx


class Optimizer(nnx.Optimizer[Any]):
    """An ``nnx.Optimizer`` that takes gradients in factor coordinates.

    ``update(model, grads)`` takes what ``value_and_grad(loss_fn, spec)(model, optimizer,
    *args)`` of this module returned, or dense gradients as ``nnx.grad`` gives them, and
    moves the model in place.

    Args:
      model: The module.
      tx: With one ``raclora(...)`` in it.
      wrt: What is trained, as in ``nnx.Optimizer``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, rl.raclora(0.1, 2, key=0))
      >>> grad_fn = rl.flax.value_and_grad(lambda model, x: jnp.sum(model(x) ** 2), 2)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, grads = grad_fn(model, optimizer, x)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> before = step(model, optimizer, jnp.ones((3, 6)))
      >>> bool(step(model, optimizer, jnp.ones((3, 6))) < before)
      True
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        wrt: Any = nnx.Param,
    ) -> None:
        check_module(model, "Optimizer")
        super().__init__(model, tx, wrt=wrt)

    def update(self, model: nnx.Module, grads: PyTree, /, **kwargs: Any) -> PyTree:
        """Moves the model and the state by one step.

        Args:
          model: The module.
          grads: Dense, in factor coordinates, or some leaves the one and some the other.
          **kwargs: Extra arguments of ``tx.update``.

        Returns:
          The updates, in the structure of the parameters.

        Raises:
          ValueError: If a parameter has no gradient, or as
            ``raclora_jax.apply_updates``.
        """
        updates = self.updates(model, grads, **kwargs)
        # Not super().update, which ends in optax.apply_updates: that cannot add a Factor.
        params = nnx.as_pure(nnx.state(model, self.wrt))
        nnx.update(model, apply.apply_updates(params, updates))
        return updates

    def updates(self, model: nnx.Module, grads: PyTree, /, **kwargs: Any) -> PyTree:
        """Moves the state only, for who moves the model otherwise, as by a message.

        Args:
          model: The module.
          grads: As in ``update``.
          **kwargs: As in ``update``.

        Returns:
          The updates, in the structure of the parameters.

        Raises:
          ValueError: If a parameter has no gradient.
        """
        params = nnx.as_pure(nnx.state(model, self.wrt))
        opt_state = nnx.as_pure(self.opt_state)
        given = (_as_params(grads, params), opt_state, params)
        updates, new_state = self.tx.update(*given, **nnx.as_pure(kwargs))
        self.advance(new_state)
        return updates

    def advance(self, opt_state: PyTree) -> None:
        """Takes the state after a step, and counts it.

        Args:
          opt_state: What a step of ``tx`` returned.
        """
        nnx.update(self.opt_state, nnx.state(opt_state))
        self.step[...] += 1


def _as_params(grads: PyTree, params: PyTree) -> PyTree:
    """Gradients by path, in the structure of the parameters."""

    def is_leaf(node: Leaf) -> bool:
        return is_factor(node) or isinstance(node, optax.MaskedNode)

    by_path, _ = paths.flatten(nnx.as_pure(grads), is_leaf=is_leaf)
    leaves, treedef = paths.flatten(params)
    for path in leaves:
        if path not in by_path:
            raise ValueError(
                f"leaf {paths.show(path)} has no gradient; make gradients with "
                "raclora_jax.flax.value_and_grad and the optimizer's own spec and model"
            )
    return paths.unflatten(treedef, {path: by_path[path] for path in leaves})
