"""A client's own process: data, weights and compiled program stay here.

Flower starts a new process for every message; it asks this one over a local socket, so
that no link waits for JAX to be imported and the program to be compiled.

python -m fedrac.trainer --partition 0 --partitions 3 --socket PATH
"""

from __future__ import annotations

import argparse
from multiprocessing.connection import Connection, Listener

import numpy as np

from fedrac import task
from fedrac.history import arrays_of, steps_of
from fedrac.wire import Answer, Question
from raclora_jax import federated as fed


class Trainer:
    """One client: it follows the chain from the seed and trains when asked.

    Args:
      data: What it holds.
      client: Its number.
    """

    def __init__(self, data: task.Data, client: int) -> None:
        self.data, self.client = data, client
        self.pixels = data.images.shape[1]
        self.stamp = fed.stamp_of(task.STRATEGY, task.start(0, self.pixels))
        self._restart(0, 0)

    def _restart(self, run: int, seed: int) -> None:
        weights = task.start(seed, self.pixels)
        self.chain = run, seed
        self.state = fed.init(task.STRATEGY, weights, key=seed)

    def answer(self, question: Question, run: int) -> Answer | str:
        """Its factors, or in one line why there are none.

        Args:
          question: What the server asks.
          run: Flower's number of the run: another run is another chain.
        """
        if question.stamp != self.stamp:
            return f"this node has stamp {self.stamp}, the server {question.stamp}"
        if (run, question.seed) != self.chain or self.link > question.link:
            self._restart(run, question.seed)
        if self.link < question.since:
            return (
                f"this node stands at link {self.link}, the factors begin at link "
                f"{question.since}"
            )
        span = question.since, question.link
        try:
            steps = steps_of(question.factors, *span, self.stamp)
            missed = steps[self.link - question.since :]
            self.state = fed.replay(task.STRATEGY, self.state, missed)
        except ValueError as error:
            return str(error)
        message = task.train(self.state, self.data, self.client)
        factors = {p: np.asarray(f) for p, f in message.trained.factors.items()}
        count = int(message.count)
        return Answer(self.client, self.link, count, message.stamp, factors)

    @property
    def link(self) -> int:
        """Where it stands."""
        return int(self.state.round)

    def warm(self) -> None:
        """Compiles what a link needs."""
        still = fed.Trained(self.state.factors, {})
        step = fed.Step(still, {}, self.state.round, self.stamp)
        self.answer(Question(0, 1, self.stamp, 0, arrays_of([step], 0)), run=0)
        self._restart(0, 0)


def serve(trainer: Trainer, listener: Listener) -> None:
    """Answers questions one after another, for as long as the process lives."""
    while True:
        with listener.accept() as connection:
            _answer_one(trainer, connection)


def _answer_one(trainer: Trainer, connection: Connection) -> None:
    # Whoever asked may be gone, before or after.
    try:
        connection.send(trainer.answer(*connection.recv()))
    except (EOFError, OSError):
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--partition", type=int, required=True)
    parser.add_argument("--partitions", type=int, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--data-dir", default="")
    options = parser.parse_args()
    train, _ = task.load(options.data_dir)
    own = task.part(train, options.partition, options.partitions)
    trainer = Trainer(own, options.partition)
    trainer.warm()
    # Who can open the socket is who can open its folder.
    with Listener(options.socket, "AF_UNIX") as listener:
        serve(trainer, listener)


if __name__ == "__main__":
    main()
