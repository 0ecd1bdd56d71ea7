"""What PEFT calls things: the modules of a leaf and the keys of their factors."""

from __future__ import annotations

from raclora_jax.peft._targets import Target, View, torch_shapes

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
FILE = "adapter_model"


def modules(view: View, target: Target) -> list[str]:
    """The modules of a leaf's parameters; of fused experts the parameter."""
    if target.kind == "experts":
        return [target.name]
    return [name.rpartition(".")[0] for name in torch_shapes(view, target)]


def keys(module: str, kind: str) -> tuple[str, str]:
    """Of the factors at the input and at the output of a module."""
    if kind == "experts":
        module = module.rpartition(".")[0]
    if kind == "embedding":
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
