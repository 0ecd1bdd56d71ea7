"""Trainers of Tunix that step in factor form, and samplers that follow them.

The drop-in form needs nothing of this module: ``raclora(...)`` is an optax
transformation, and ``PeftTrainer(model, tx, config)`` trains with it on dense gradients.

Read in this order: ``_trainers`` (the factor form, SFT and DPO), ``_rollout`` and
``_cluster`` (GRPO and what else Tunix's learners do on a cluster).
"""

from raclora_jax.tunix._cluster import RacLoraRLCluster
from raclora_jax.tunix._rollout import FollowerRollout
from raclora_jax.tunix._trainers import RacLoraDPOTrainer, RacLoraTrainer

__all__ = [
    "FollowerRollout",
    "RacLoraDPOTrainer",
    "RacLoraRLCluster",
    "RacLoraTrainer",
]
