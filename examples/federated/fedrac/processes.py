"""Child processes that end with the program, whatever happens to it."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import TracebackType

# Reads process ids. When its input ends, because the program closed it or died, it ends
# them all, the last one first, and with each the group that it leads.
_REAPER = """
import os, signal, sys, time

def tell(group, what):
    try:
        os.killpg(group, what)
        return True
    except ProcessLookupError:
        return False

groups = [int(line) for line in sys.stdin][::-1]
for group in groups:
    if tell(group, signal.SIGTERM):
        tell(group, signal.SIGCONT)
        until = time.monotonic() + 5
        while tell(group, 0) and time.monotonic() < until:
            time.sleep(0.1)
        tell(group, signal.SIGKILL)
"""


class Processes:
    """A context that starts processes and ends them when it is left.

    Args:
      folder: Where each writes what it says, as ``NAME.log``.
      env: Their environment.
    """

    def __init__(self, folder: pathlib.Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        # In a session of its own, so that Ctrl-C does not reach it.
        self._reaper = subprocess.Popen(
            [sys.executable, "-c", _REAPER],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=self.env,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        while self._reaper.poll() is None:
            for process in self.running.values():
                process.poll()  # one that ended leaves its group once it is waited for
            time.sleep(0.05)

    def start(self, name: str, *command: str) -> None:
        """Starts a process that leads a group of its own."""
        with self.log(name).open("wb") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.env,
            )
        self.running[name] = process
        assert self._reaper.stdin is not None
        self._reaper.stdin.write(b"%d\n" % process.pid)
        self._reaper.stdin.flush()

    def run(self, *command: str) -> str:
        """Runs a command to its end and returns what it said.

        Raises:
          RuntimeError: If it fails; the message is what it said.
        """
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.env,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
        return done.stdout

    def signal(self, name: str, what: signal.Signals) -> None:
        """Sends a signal to a process and its group."""
        os.killpg(self.running[name].pid, what)

    def ended(self, name: str) -> bool:
        return self.running[name].poll() is not None

    def log(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        """What a process said so far."""
        return self.log(name).read_text(errors="replace")


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
