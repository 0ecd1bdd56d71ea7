"""What PEFT calls things: the modules of a leaf and the keys of their factors."""

from __future__ import annotations

from collections.abc import Iterable

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
    if kind == "embedding":
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def wrapper(target: Target, fused: Iterable[Target]) -> str:
    """The module that holds the factors of one parameter of fused experts.

    PEFT wraps a module once for each adapted parameter of it, the last one outermost.
    """
    same = [other for other in fused if other.module == target.module]
    if len({other.order for other in same}) < len(same):
        raise ValueError(
            f"{' and '.join(other.name for other in same)} are of one module: say by "
            "order=0, 1, ... in which order the module has them"
        )
    depth = sum(other.order > target.order for other in same)
    return target.module + depth * ".base_layer"
