"""Fed-RAC-LoRA on Flower, on this machine: one SuperLink, three SuperNodes, no network.

make federated ARGS="--kill --late"
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import tempfile

import jax

from fedrac import simulation, task
from fedrac.certificates import make_node_key
from fedrac.federation import Federation, environment
from fedrac.processes import Processes
from raclora_jax import federated as fed

CLIENTS = 3
KILLED, KILL_LINK = 1, 2  # the node that --kill ends, and the link it does it in
SLOW, LATE_LINK = 2, 5  # the node whose trainer --late holds up, and in which link


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fedrac", description=__doc__)
    parser.add_argument("--links", type=int, default=10)
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds a link may take"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default="", help="the folder of MNIST")
    parser.add_argument("--out", default="", help="an empty folder to keep the log in")
    parser.add_argument("--kill", action="store_true", help="end a node in mid-run")
    parser.add_argument("--late", action="store_true", help="hold a client up for a link")
    parser.add_argument("--tls", action="store_true", help="TLS and known nodes only")
    options = parser.parse_args(arguments)
    if options.links < 1 or options.timeout <= 0:
        parser.error("--links and --timeout must be positive")
    return options


def run(options: argparse.Namespace, home: pathlib.Path, out: pathlib.Path) -> None:
    """A run on Flower: leaves its log and its factors in a folder."""
    with Processes(home, environment(home)) as processes:
        federation = Federation(
            processes,
            home,
            clients=CLIENTS,
            tls=options.tls,
            data_dir=options.data_dir,
        )
        federation.start()
        if options.tls:
            refused(federation)
        federation.submit(
            **{
                "seed": options.seed,
                "links": options.links,
                "nodes": CLIENTS,
                "timeout": options.timeout,
                "data-dir": options.data_dir,
                "out": str(out),
            }
        )
        lines = out / "log.jsonl"
        for link in range(options.links):
            hurt(options, processes, link)
            federation.wait(
                lambda link=link: len(read_lines(lines)) > link,
                "superlink",
                timeout=options.timeout + 240,
            )
            show(json.loads(read_lines(lines)[link]))


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a file that may not be there yet; one not ended is not yet one."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def hurt(options: argparse.Namespace, processes: Processes, link: int) -> None:
    """The faults that were asked for, before a link."""
    if options.kill and link == KILL_LINK:
        print(f"        SIGKILL: node and trainer of client {KILLED}", flush=True)
        for name in (f"node-{KILLED}", f"trainer-{KILLED}"):
            processes.signal(name, signal.SIGKILL)
    if options.late and link in (LATE_LINK, LATE_LINK + 1):
        stop = link == LATE_LINK
        print(
            f"        client {SLOW} {'stands still' if stop else 'goes on'}", flush=True
        )
        processes.signal(f"trainer-{SLOW}", signal.SIGSTOP if stop else signal.SIGCONT)


def refused(federation: Federation) -> None:
    """Shows what becomes of nodes that nobody registered, and of unsigned requests.

    Raises:
      RuntimeError: If one is not refused.
    """
    make_node_key(federation.home, "stranger.key")
    for name, key in (("stranger", "stranger.key"), ("keyless", "")):
        federation.start_node(name, CLIENTS, key)
        federation.wait(lambda name=name: federation.processes.ended(name), timeout=120)
        said = federation.processes.said(name)
        codes = [line for line in said.splitlines() if line.startswith("[code: ")]
        if not codes:
            raise RuntimeError(f"{name} was not refused:\n{said}")
        print(f"{name} refused: {codes[0]}", flush=True)
    status = federation.unsigned_request()
    if status != 401:
        raise RuntimeError(f"an unsigned request got the status {status}, not 401")
    print("unsigned request for messages refused: 401", flush=True)


def show(log: dict) -> None:
    """The progress of one link."""
    print(
        f"link {log['link']:2d}  {log['seconds']:5.1f} s  "
        f"accuracy {log['accuracy']:.3f}  "
        f"up {log['bytes_up']:,} B  down {log['bytes_down']:,} B  "
        f"answered {log['accepted']} of {log['asked']}  model {log['model']}",
        flush=True,
    )
    for drop in log["dropped"]:
        print(f"        dropped, {drop['reason']}: {drop['line']}", flush=True)


def compare(options: argparse.Namespace, out: pathlib.Path) -> float:
    """Prints the run beside its simulation; returns the largest difference."""
    train, test = task.load(options.data_dir)
    log, states = simulation.read(out, options.seed, train.images.shape[1])
    parts = [task.part(train, client, CLIENTS) for client in range(CLIENTS)]
    accepted = [line["accepted"] for line in log]
    simulated = simulation.simulate(parts, options.seed, accepted)
    print("\nlink  in the mean  accuracy  simulated  difference    bytes up  bytes down")
    gaps = []
    for line, state, other in zip(log, states, simulated, strict=True):
        gaps.append(simulation.difference(state, other))
        clients = " ".join(map(str, line["accepted"])) or "none"
        print(
            f"{line['link']:4d}  {clients:>11}  {line['accuracy']:8.3f}  "
            f"{float(task.accuracy(other, test)):9.3f}  {gaps[-1]:10.1e}  "
            f"{line['bytes_up']:10,}  {line['bytes_down']:10,}"
        )
    weights = fed.nbytes(simulated[-1].base_params)
    up, down = (sum(line[key] for line in log) for key in ("bytes_up", "bytes_down"))
    whole = weights * sum(len(clients) for clients in accepted)
    print(
        f"largest difference {max(gaps):.1e}; {up:,} bytes up, {down:,} bytes down; "
        f"the weights themselves would have been {whole:,} bytes up"
    )
    return max(gaps)


def main() -> None:
    options = parsed()
    # Ctrl-C already ends a program with an exception; so does a request to end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jax.config.update("jax_platforms", environment(pathlib.Path())["JAX_PLATFORMS"])
    with tempfile.TemporaryDirectory(prefix="fedrac-") as folder:
        home = pathlib.Path(folder)
        out = pathlib.Path(options.out or home / "out").resolve()
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise SystemExit(f"--out: {out} is not empty; name a new folder")
        run(options, home, out)
        if compare(options, out) > 1e-6:
            raise SystemExit("the run on Flower is not the simulation")


if __name__ == "__main__":
    main()
