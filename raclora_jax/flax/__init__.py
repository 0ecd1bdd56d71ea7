"""Linen and nnx: their views as plain trees, and the forms on their own objects.

Read in this order: ``_tree`` (any view of a model as one plain tree, and the way
back), then for nnx, on top of it, ``_optimizer``, ``_module`` and ``_trainer``.
``_train_state`` is linen's.
"""

from raclora_jax.flax._module import apply_updates, fused_step, value_and_grad
from raclora_jax.flax._optimizer import Optimizer
from raclora_jax.flax._train_state import TrainState
from raclora_jax.flax._trainer import Trainer
from raclora_jax.flax._tree import to_tree

__all__ = [
    "Optimizer",
    "TrainState",
    "Trainer",
    "apply_updates",
    "fused_step",
    "to_tree",
    "value_and_grad",
]
