"""A linen ``TrainState`` that takes gradients in factor coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raclora_jax._core.types import PyTree
from raclora_jax._extras import extra
from raclora_jax._forms import apply
from raclora_jax._forms.trainer import Trainer

with extra("flax"):
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state


class TrainState(train_state.TrainState):
    """A linen ``TrainState`` that steps in factor form.

    Gradients come from ``raclora_jax.value_and_grad(loss_fn, spec)(state.params,
    state.opt_state, *args)``; dense ones are taken as well. A ``Trainer`` steps it whole.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss_fn(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> trainer = rl.Trainer(loss_fn, params, x, rank=2, learning_rate=0.1, key=0)
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=trainer.tx
      ... )
      >>> state, loss = state.train_step(trainer, x)
      >>> grad_fn = rl.value_and_grad(loss_fn, trainer.spec)
      >>> loss, grads = grad_fn(state.params, state.opt_state, x)
      >>> int(state.apply_gradients(grads=grads).step)
      2
    """

    def train_step(self, trainer: Trainer, *args: Any) -> tuple[TrainState, Any]:
        """One compiled step; ``params`` and ``opt_state`` of this state are given away.

        Args:
          trainer: Whose ``tx`` this state was created with.
          *args: What else its loss takes: trees of arrays.

        Returns:
          ``(state, loss)``, or ``(state, (loss, aux))``.

        Raises:
          ValueError: If the state has another transformation.
        """
        if self.tx is not trainer.tx:
            raise ValueError(
                "this TrainState has another transformation than the trainer; create it "
                "with tx=trainer.tx"
            )
        params, opt_state, out = trainer.step(self.params, self.opt_state, *args)
        new = self.replace(step=self.step + 1, params=params, opt_state=opt_state)
        return new, out

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> TrainState:
        """The state after one step.

        Args:
          grads: Gradients of the params, dense or in factor coordinates. As in Flax, the
            collection ``_overwrite_with_gradient`` of 8-bit layers beside ``params`` is
            no business of the optimizer: what comes for it is what it becomes.
          **kwargs: Other fields to replace.

        Returns:
          The new state.
        """
        params: PyTree = self.params
        given = grads
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        if overwrites:
            given, params = grads["params"], params["params"]
        # Flax's own method ends in optax.apply_updates, which cannot add a Factor.
        updates, opt_state = self.tx.update(given, self.opt_state, params)
        params = apply.apply_updates(params, updates)
        if overwrites:
            whole = {"params": params}
            whole[OVERWRITE_WITH_GRADIENT] = grads[OVERWRITE_WITH_GRADIENT]
            params = whole
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )
