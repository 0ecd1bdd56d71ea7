"""Checkpoints that survive: a run's state over orbax, and a log of a chain's links.

``pip install 'raclora-jax[checkpoint]'``; ``ChainLog`` needs safetensors and no orbax.

Read in this order: ``_checkpointer`` (save and restore), ``_state`` and ``_leaves`` (what
is saved, and how it lies there), ``_meta`` (how damage is seen), ``_everyone`` and
``_position`` (runs of several processes). ``_log`` is ``ChainLog``.
"""

from raclora_jax.checkpoint._checkpointer import Checkpointer
from raclora_jax.checkpoint._log import ChainLog
from raclora_jax.checkpoint._state import Restored, abstract_state

__all__ = ["ChainLog", "Checkpointer", "Restored", "abstract_state"]
