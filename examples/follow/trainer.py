"""Trains, and sends each step to whoever follows.

python examples/follow/trainer.py --port 6500 --folder run

Every message is on disk before it is applied or sent. A trainer that was killed goes on
from its checkpoint, and by the messages it has written since.
"""

import argparse
import pathlib
import threading
import time
from multiprocessing.connection import Listener

import jax
import jax.numpy as jnp
import numpy as np
import optax
import task

import raclora_jax as rl
from raclora_jax.checkpoint import Checkpointer


def loss_fn(params, codes):
    scores = task.logits(params, codes[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, codes[:, -1]).mean()


def batch_of(step):
    """The same for a step whenever it is asked for."""
    starts = np.random.default_rng(step).integers(len(task.CODES) - task.CONTEXT, size=64)
    return jnp.array([task.CODES[at : at + task.CONTEXT + 1] for at in starts])


class Sender(threading.Thread):
    """Sends a follower the messages after its position, as they are written."""

    def __init__(self, connection, log, last):
        super().__init__(daemon=True)
        self._connection, self._log, self._last = connection, log, last

    def run(self):
        try:
            position = task.from_wire(self._connection.recv_bytes())
            for step in range(position.step, self._last):
                while step not in self._log.steps():
                    time.sleep(0.01)
                self._connection.send_bytes(self._log.read(step))
            self._connection.send_bytes(b"")  # the end of the run
            self._connection.recv_bytes()
        except (EOFError, OSError):
            pass  # a follower that was killed comes back with its position


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--numbers", default="int8")
    args = parser.parse_args()

    params = task.base_params()
    spec = rl.trace_spec(
        loss_fn, params, batch_of(0), rank=4, resample_every=25, alpha="dim"
    )
    tx = rl.raclora(1e-2, spec, key=task.KEY)
    grad_fn = rl.value_and_grad(loss_fn, spec)

    @jax.jit
    def step_fn(params, opt_state, batch):
        loss, grads = grad_fn(params, opt_state, batch)
        return loss, *tx.update(grads, opt_state, params)

    log = rl.follow.Log(args.folder / "messages")
    position = rl.follow.start(params, key=task.KEY)
    opt_state = tx.init(params)
    with (
        Checkpointer(args.folder / "checkpoints", spec) as checkpointer,
        Listener(("127.0.0.1", args.port), authkey=b"followers") as listener,
    ):
        if checkpointer.steps():
            found = checkpointer.restore((params, opt_state))
            (params, opt_state), position = found.state, rl.follow.Position(*found.data)
            print(f"trainer goes on from step {position.step}", flush=True)

        senders = []

        def accept():
            while True:
                senders.append(Sender(listener.accept(), log, args.steps))
                senders[-1].start()

        threading.Thread(target=accept, daemon=True).start()
        while position.step < args.steps:
            at = position.step
            loss, updates, opt_state = step_fn(params, opt_state, batch_of(at))
            if at in log.steps():
                # Written before the trainer was killed, and perhaps sent: it stands.
                message = log.read(at)
            else:
                message = rl.follow.encode(
                    params, updates, opt_state, position,
                    numbers=args.numbers, digest_every=10,
                )  # fmt: skip
                log.write(message)
            params, position = rl.follow.apply(params, message, position)
            if position.step % 20 == 0:
                checkpointer.save(position.step, (params, opt_state), data=position)
                said = f"loss {loss:.3f}, {len(message):,} bytes a step"
                print(f"trainer at step {position.step}: {said}", flush=True)
        print(f"trainer ends at {position.step} {task.digest(params)}", flush=True)
        for _ in range(600):  # whoever is still behind, or on the way back
            if senders and not any(sender.is_alive() for sender in senders):
                break
            time.sleep(0.1)


if __name__ == "__main__":
    main()
