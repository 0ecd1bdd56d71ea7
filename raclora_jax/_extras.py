"""Packages that not everyone has installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside it tell of the extra that brings what is missing.

    Args:
      name: The extra of this package.

    Raises:
      ModuleNotFoundError: If a package is not installed; it names the command that
        installs it.

    Example:
      >>> with extra("peft"):
      ...     import json
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'raclora-jax[{name}]'",
            name=error.name,
        ) from error
