"""Packages that not everyone has installed."""

from __future__ import annotations

import importlib
from types import ModuleType


def needs(module: str, extra: str) -> ModuleType:
    """A module of an optional package.

    Args:
      module: Its name, such as ``"safetensors.numpy"``.
      extra: The extra of this package that brings it.

    Returns:
      The module.

    Raises:
      ModuleNotFoundError: If it is not installed; it names the command that does.

    Example:
      >>> needs("json", "peft").__name__
      'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'raclora-jax[{extra}]'",
            name=error.name,
        ) from error
