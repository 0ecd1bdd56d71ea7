"""Fine-tuning at LoRA's cost with full fine-tuning's guarantee."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from raclora_jax._chain.clip import clip_by_matrix_norm
from raclora_jax._chain.orthogonal import orthogonal
from raclora_jax._chain.separable import per_matrix
from raclora_jax._chain.state import RacLoraState
from raclora_jax._core.factor import Factor
from raclora_jax._core.picks import Picks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree as plan
from raclora_jax._core.spec import Rule, Spec
from raclora_jax._forms.adapter import (
    AdapterChain,
    effective_params,
    init_adapter,
    merge,
    next_link,
)
from raclora_jax._forms.apply import apply_updates
from raclora_jax._forms.factor_rules import factor_labels, reset_moments, with_plans
from raclora_jax._forms.fused import fused_step
from raclora_jax._forms.gradient import grad, value_and_grad
from raclora_jax._forms.optimizer import raclora, scale_by_raclora
from raclora_jax._forms.pure import lift, project, sample_sketch
from raclora_jax._forms.summary import summary
from raclora_jax._forms.trace import trace_spec
from raclora_jax._forms.trainer import Trainer
from raclora_jax._forms.unmerged import adapted

__version__ = "0.1.0"

__all__ = [
    "AdapterChain",
    "Factor",
    "LeafPlan",
    "Picks",
    "RacLoraState",
    "Rule",
    "Spec",
    "Trainer",
    "adapted",
    "apply_updates",
    "clip_by_matrix_norm",
    "effective_params",
    "factor_labels",
    "fused_step",
    "grad",
    "init_adapter",
    "lift",
    "merge",
    "next_link",
    "orthogonal",
    "per_matrix",
    "plan",
    "project",
    "raclora",
    "reset_moments",
    "sample_sketch",
    "scale_by_raclora",
    "summary",
    "trace_spec",
    "value_and_grad",
    "with_plans",
]

_MODULES = (
    "checkpoint",
    "estimators",
    "federated",
    "flax",
    "follow",
    "methods",
    "peft",
    "quantized",
    "sharding",
    "theory",
    "tunix",
)


def __getattr__(name: str) -> _ModuleType:
    """The modules that few programs need, imported where one is first named."""
    if name in _MODULES:
        return _import_module(f"raclora_jax.{name}")
    raise AttributeError(f"module 'raclora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
