"""Flower's side of the server: asks the nodes, checks the answers, merges the mean."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from fedrac import task
from fedrac.client_app import REFUSED
from fedrac.history import arrays_of
from fedrac.wire import Answer, NotOursError, Question, pack, unpack
from raclora_jax import federated as fed

app = ServerApp()

POLL = 1.0  # seconds between two looks for replies or nodes

# Flower's error codes that are no fault of a program.
_REASONS = {3: "late", 4: "late", 5: "gone", REFUSED: "refused"}


class LinkLog(NamedTuple):
    """What happened in a link.

    Attributes:
      link: The link.
      seconds: How long it took.
      asked: The nodes it was sent to: their partition ids, or ``"node ID"`` of a node
        that never answered.
      accepted: Partition ids in the mean.
      dropped: ``[{client, reason, line}]``.
      bytes_up: Of the factors in the mean.
      bytes_down: Of the factors sent to all that were asked.
      accuracy: Of the global weights after the link, on the test images.
      model: Digest of these weights.
    """

    link: int
    seconds: float
    asked: list[int | str]
    accepted: list[int]
    dropped: list[dict[str, Any]]
    bytes_up: int
    bytes_down: int
    accuracy: float
    model: str


class Server:
    """The chain on the server, and what it knows of the nodes.

    Args:
      test: Images and labels of the test.
      seed: Of weights and sketches; public.
      clients: How many partitions there are.
    """

    def __init__(self, test: task.Data, *, seed: int, clients: int) -> None:
        self.test, self.seed, self.clients = test, seed, clients
        weights = task.start(seed, test.images.shape[1])
        self.state = fed.init(task.STRATEGY, weights, key=seed)
        self.stamp = fed.stamp_of(task.STRATEGY, weights)
        self.steps: list[fed.Step] = []
        self.stands: dict[int, int] = {}  # by node id: a link the node has reached
        self.partition: dict[int, int] = {}  # by node id, from its first answer

    @property
    def link(self) -> int:
        """The link that runs."""
        return len(self.steps)

    def run_link(self, grid: Grid, nodes: Iterable[int], timeout: float) -> LinkLog:
        """One link: ask, collect, merge the mean of what can be used."""
        begun, link, nodes = time.monotonic(), self.link, list(nodes)
        questions = {node: self._question(node) for node in nodes}
        messages = [
            Message(
                pack(question),
                message_type=MessageType.TRAIN,
                dst_node_id=node,
                group_id=str(link),
                ttl=timeout,
            )
            for node, question in questions.items()
        ]
        ids = zip(grid.push_messages(messages), nodes, strict=True)
        asked = {sent: node for sent, node in ids if sent}  # none if it was not sent
        replies = collect(grid, set(asked), timeout)
        answers, dropped = self._sorted(replies, asked, nodes)
        step, log = fed.aggregate(task.STRATEGY, self.state, answers)
        self.state, _, step = fed.server_step(task.STRATEGY, self.state, step)
        self.steps.append(step)
        for node in nodes:
            if self.partition.get(node) in log.accepted:
                self.stands[node] = link
        return LinkLog(
            link,
            round(time.monotonic() - begun, 1),
            [self._name(node) for node in nodes],
            list(log.accepted),
            [drop._asdict() for drop in (*log.dropped, *dropped)],
            log.bytes_up,
            sum(fed.nbytes(question.factors) for question in questions.values()),
            float(task.accuracy(self.state, self.test)),
            task.digest(self.state),
        )

    def _question(self, node: int) -> Question:
        since = self.stands.get(node, 0)
        factors = arrays_of(self.steps, since)
        return Question(self.seed, self.link, self.stamp, since, factors)

    def _sorted(
        self, replies: Iterable[Message], asked: dict[str, int], nodes: list[int]
    ) -> tuple[list[fed.Message], list[fed.Drop]]:
        """(what may go to ``aggregate``, what may not and why)."""
        answers: list[fed.Message] = []
        dropped: list[fed.Drop] = []
        silent = dict.fromkeys(nodes)
        for reply in replies:
            sender = reply.metadata.src_node_id
            node = asked.get(reply.metadata.reply_to_message_id)
            # What the SuperLink says for a node that cannot has its own sender.
            if node is None or not (reply.has_error() or sender == node):
                line = f"node {sender} answers what it was not asked"
                dropped.append(fed.Drop(None, "unasked", line))
                continue
            silent.pop(node, None)
            if reply.has_error():
                dropped.append(self._failed(node, reply.error.code, reply.error.reason))
            elif not len(reply.content):
                dropped.append(self._drop(node, "nothing", "sent nothing"))
            else:
                try:
                    answers.append(self._message(node, reply))
                except NotOursError as error:
                    dropped.append(self._drop(node, "not ours", str(error)))
        late = "did not answer in time"
        dropped += [self._drop(node, "late", late) for node in silent]
        return answers, dropped

    def _message(self, node: int, reply: Message) -> fed.Message:
        answer = unpack(Answer, reply.content)
        known = self.partition.get(node, answer.client)
        if answer.client != known or answer.client not in range(self.clients):
            raise NotOursError(f"says it is client {answer.client}")
        self.partition[node] = known
        trained = fed.Trained(answer.factors, {})
        return fed.Message(
            trained, answer.client, answer.link, answer.count, answer.stamp
        )

    def _failed(self, node: int, code: int, said: str | None) -> fed.Drop:
        if code == REFUSED:
            # It may have lost its place: tell it everything next time.
            self.stands.pop(node, None)
        line = " ".join((said or f"error {code}").split())
        return self._drop(node, _REASONS.get(code, "failed"), line)

    def _drop(self, node: int, reason: str, line: str) -> fed.Drop:
        name = self._name(node)
        who = name if isinstance(name, str) else f"client {name}"
        return fed.Drop(self.partition.get(node), reason, f"{who}: {line}")

    def _name(self, node: int) -> int | str:
        return self.partition.get(node, f"node {node}")


def present(grid: Grid, least: int, timeout: float) -> list[int]:
    """The nodes that are there, once there are ``least`` of them or time is up."""
    until = time.monotonic() + timeout
    while len(nodes := sorted(grid.get_node_ids())) < least and time.monotonic() < until:
        time.sleep(POLL)
    return nodes


def collect(grid: Grid, waiting: set[str], timeout: float) -> list[Message]:
    """The replies to messages, by their ids, that come in time."""
    until, replies = time.monotonic() + timeout, []
    while waiting and time.monotonic() < until:
        come = list(grid.pull_messages(waiting))
        replies += come
        waiting = waiting - {reply.metadata.reply_to_message_id for reply in come}
        if waiting:
            time.sleep(POLL)
    return replies


def save(folder: pathlib.Path, server: Server, log: LinkLog) -> None:
    """Adds a line to the log, after the factors that it speaks of."""
    partial = folder / "steps.partial.npz"
    np.savez(partial, **arrays_of(server.steps, 0))
    partial.replace(folder / "steps.npz")
    with (folder / "log.jsonl").open("a") as lines:
        lines.write(json.dumps(log._asdict()) + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    _, test = task.load(str(config["data-dir"]))
    server = Server(test, seed=int(config["seed"]), clients=int(config["nodes"]))
    timeout, out = float(config["timeout"]), str(config["out"])
    for link in range(int(config["links"])):
        least = server.clients if link == 0 else 1
        log = server.run_link(grid, present(grid, least, timeout), timeout)
        print(log, flush=True)
        if out:
            save(pathlib.Path(out), server, log)
