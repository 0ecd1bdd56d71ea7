"""Messages on disk, from which followers and trainers catch up."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from raclora_jax._core.disk import write
from raclora_jax._core.record import checksum
from raclora_jax._core.types import PyTree
from raclora_jax.follow._apply import apply
from raclora_jax.follow._message import Message
from raclora_jax.follow._position import Position

_NAME = re.compile(r"step-(\d{8,})")


class Log:
    """The messages of a run, a file each.

    A trainer writes each message before it applies or sends it; whoever then falls
    behind, be it killed or cut off, goes on from here. Files of steps that no one will
    come back to may be deleted.

    Args:
      directory: Where the messages are; made if it is not there.

    Example:
      >>> import tempfile, jax.numpy as jnp, raclora_jax as rl
      >>> W = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(3)}
      >>> state = rl.raclora(0.1, 2, key=0).init(W)
      >>> position = rl.follow.start(W, key=0)
      >>> message = rl.follow.encode(W, {"bias": jnp.ones(3)}, state, position)
      >>> log = rl.follow.Log(tempfile.mkdtemp())
      >>> log.write(message)
      >>> log.replay(W, position)[0]["bias"].tolist()
      [1.0, 1.0, 1.0]
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """The steps that there are messages of, in order."""
        found = map(_NAME.fullmatch, os.listdir(self._directory))
        return sorted(int(match[1]) for match in found if match)

    def write(self, message: bytes) -> None:
        """Adds a message; the same once more changes nothing.

        Args:
          message: What ``encode`` and its kin returned.

        Raises:
          ValueError: If it is damaged, does not go on from the message before it, or
            another one of its step is there.
          OSError: If it cannot be written.
        """
        read = Message.from_bytes(message)
        path, before = self._path(read.step), self._path(read.step - 1)
        if path.exists():
            if path.read_bytes() == message:
                return
            raise ValueError(
                f"{path} is there already: expected the same message, got another of its "
                "step; another run writes here, or the trainer was set back and went on "
                "otherwise: give each history a directory of its own"
            )
        if before.exists() and checksum(before.read_bytes()) != read.last:
            raise ValueError(
                f"{before}: expected the message that step {read.step} goes on from, got "
                "another; give each history a directory of its own"
            )
        write(path, message)

    def read(self, step: int) -> bytes:
        """The message of a step.

        Args:
          step: How many messages are before it.

        Returns:
          The message.

        Raises:
          FileNotFoundError: If it is not there.
        """
        path = self._path(step)
        if not path.exists():
            have = self.steps()
            held = f"steps {have[0]} to {have[-1]}" if have else "none"
            raise FileNotFoundError(
                f"{path} is missing, there are {held}; bring it back, or take the "
                "trainer's weights and join"
            )
        return path.read_bytes()

    def replay(self, params: PyTree, position: Position) -> tuple[Any, Position]:
        """The weights after all messages that are here.

        Args:
          params: The weights, or a run in the adapter form.
          position: Where they stand.

        Returns:
          The weights and their position, as ``apply`` gives them.

        Raises:
          FileNotFoundError: If a message between is missing.
          ValueError: If ``apply`` refuses one.
        """
        end = max(self.steps(), default=-1)
        for step in range(position.step, end + 1):
            params, position = apply(params, self.read(step), position)
        return params, position

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"step-{step:08d}"
