"""A federation on loopback: one SuperLink, its SuperNodes, a trainer beside each."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import socket
import ssl
import sys
import time
from collections.abc import Callable

from fedrac.certificates import make_certificates, make_node_key
from fedrac.processes import Processes, free_ports

APP = pathlib.Path(__file__).parent.parent
_BIN = pathlib.Path(sys.executable).parent
_HOST = "127.0.0.1"


def environment(home: pathlib.Path) -> dict[str, str]:
    """What every process of a federation sees: offline, its files in one folder."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Trainers, server and simulation share a machine: none may take all of a GPU.
        "JAX_PLATFORMS": "cpu",
        "NO_PROXY": _HOST,
        "no_proxy": _HOST,
        "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{APP}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }


class Federation:
    """The processes of a federation.

    Args:
      processes: What starts and ends them.
      home: A folder that only its user can open.
      clients: How many there are.
      tls: Whether to encrypt, and to let in registered nodes only; else ``--insecure``.
      data_dir: The folder of MNIST, or nothing for the digits.
    """

    def __init__(
        self,
        processes: Processes,
        home: pathlib.Path,
        *,
        clients: int,
        tls: bool,
        data_dir: str,
    ) -> None:
        self.processes, self.home = processes, home
        self.clients, self.tls, self.data_dir = clients, tls, data_dir
        self._port = free_ports(1)[0]

    def start(self) -> None:
        """Starts the SuperLink, the trainers and the nodes."""
        self._start_superlink()
        for client in range(self.clients):
            self._start_trainer(client)
        self.wait(self._listens, "superlink")
        for client in range(self.clients):
            self.wait(self._socket(client).exists, f"trainer-{client}")
            key = f"node-{client}.key" if self.tls else ""
            if key:
                make_node_key(self.home, key)
                self._flwr("supernode", "register", f"{self.home / key}.pub", "loop")
            self.start_node(f"node-{client}", client, key)

    def start_node(self, name: str, client: int, key: str) -> None:
        """Starts a SuperNode.

        Args:
          name: Of its process.
          client: Its partition.
          key: The file of its private key in ``home``; nothing for none.
        """
        config = {
            "partition-id": client,
            "num-partitions": self.clients,
            "trainer": str(self._socket(client)),
        }
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        secure = ["--root-certificates", str(self.home / "ca.pem")]
        if key:
            secure += ["--auth-supernode-private-key", str(self.home / key)]
        self.processes.start(
            name,
            str(_BIN / "flower-supernode"),
            *(secure if self.tls else ["--insecure"]),
            *("--superlink", f"{_HOST}:{self._port}"),
            *("--host", _HOST, "--port", str(free_ports(1)[0])),
            *("--node-config", words),
        )

    def unsigned_request(self) -> int:
        """The status of a request for a node's messages that no key has signed."""
        trusted = ssl.create_default_context(cafile=self.home / "ca.pem")
        server = http.client.HTTPSConnection(_HOST, self._port, context=trusted)
        headers = {"Content-Type": "application/protobuf"}
        with contextlib.closing(server):
            server.request("POST", "/v1/fleet/pull-messages", b"", headers)
            return server.getresponse().status

    def submit(self, **config: int | float | str) -> None:
        """Starts the app; it runs by itself."""
        words = (f"{name}={json.dumps(value)}" for name, value in config.items())
        self._flwr("run", str(APP), "loop", "--run-config", " ".join(words))

    def wait(self, done: Callable[[], bool], *needed: str, timeout: float = 300) -> None:
        """Waits until something is so.

        Raises:
          RuntimeError: If a process that is needed ends before, or time is up; the
            message ends with what they said last.
        """
        until = time.monotonic() + timeout
        while not done():
            ended = [name for name in needed if self.processes.ended(name)]
            if ended or time.monotonic() > until:
                why = f"{ended[0]} ended" if ended else f"nothing for {timeout:.0f} s"
                last = "\n".join(
                    f"--- {name} said\n{self.processes.said(name)[-3000:]}"
                    for name in needed
                )
                raise RuntimeError(f"{why}\n{last}")
            time.sleep(0.1)

    def _start_superlink(self) -> None:
        secure, connection = ["--insecure"], "insecure = true"
        if self.tls:
            make_certificates(self.home)
            files = {"ca-certfile": "ca.pem", "certfile": "server.pem"}
            files["keyfile"] = "server.key"
            secure = [f"--ssl-{flag}={self.home / file}" for flag, file in files.items()]
            secure.append("--enable-supernode-auth")
            connection = f"root-certificates = {json.dumps(str(self.home / 'ca.pem'))}"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\n'
            f'address = "{_HOST}:{self._port}"\n{connection}\n'
        )
        self.processes.start(
            "superlink",
            str(_BIN / "flower-superlink"),
            *secure,
            *("--host", _HOST, "--port", str(self._port)),
            "--disable-runtime-dependency-installation",
        )

    def _start_trainer(self, client: int) -> None:
        self.processes.start(
            f"trainer-{client}",
            *(sys.executable, "-m", "fedrac.trainer"),
            *("--partition", str(client), "--partitions", str(self.clients)),
            *("--socket", str(self._socket(client)), "--data-dir", self.data_dir),
        )

    def _socket(self, client: int) -> pathlib.Path:
        return self.home / f"trainer-{client}"

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((_HOST, self._port)) == 0

    def _flwr(self, *words: str) -> str:
        return self.processes.run(str(_BIN / "flwr"), *words)
