"""To and from the formats of PEFT and Transformers: adapters and whole models.

A change of the weights is an ``Adapter``: of one link (``of_link``), of several, exactly
(``summed``), or the best of a rank for what a whole chain did (``best``).
``save_adapter`` and ``save_model`` write it, or the merged weights, for the rest of the
world to load.

Read in this order: ``_targets`` (which parameter of a PyTorch model a leaf is, and how
its axes lie there), ``_pairs`` (what an adapter is), ``_write`` and ``_read``, with
``_format`` and ``_config`` for PEFT's names. ``_models`` is whole models, ``_best`` the
truncation, ``_families`` and ``_ties`` what models of the hub have of their own.
``_files``, ``_folder`` and ``_patterns`` know of no model.
"""

from raclora_jax.peft._best import Kept, best
from raclora_jax.peft._families import names_of
from raclora_jax.peft._models import load_model, parameters, save_model
from raclora_jax.peft._pairs import Adapter, Pair, merged, of_link, summed
from raclora_jax.peft._read import load_adapter
from raclora_jax.peft._targets import Target, targets
from raclora_jax.peft._write import save_adapter

__all__ = [
    "Adapter",
    "Kept",
    "Pair",
    "Target",
    "best",
    "load_adapter",
    "load_model",
    "merged",
    "names_of",
    "of_link",
    "parameters",
    "save_adapter",
    "save_model",
    "summed",
    "targets",
]
