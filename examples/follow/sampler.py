"""Answers prompts by weights that follow a trainer.

python examples/follow/sampler.py --port 6500 --folder run

A sampler that was killed goes on from the weights it saved last; the trainer sends what
came after them.
"""

import argparse
import json
import os
import pathlib
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import safetensors
import task
from safetensors.flax import load_file, save_file

import raclora_jax as rl

PROMPTS = ("the weigh", "a sketch ", "and a fac")


def save(file, params, position):
    partial = file.with_suffix(".partial")
    save_file(params, partial, metadata={"position": json.dumps(position)})
    os.replace(partial, file)


def load(file):
    with safetensors.safe_open(file, "numpy") as opened:
        position = json.loads(opened.metadata()["position"])
    return load_file(file), rl.follow.Position(*position)


def connected(port):
    """A connection, as soon as there is a trainer."""
    while True:
        try:
            return Client(("127.0.0.1", port), authkey=b"followers")
        except (OSError, EOFError, AuthenticationError):
            time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()

    file = args.folder / "sampler.safetensors"
    args.folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
        params, position = load(file)
        print(f"sampler goes on from step {position.step}", flush=True)
    else:
        params = task.base_params()
        position = rl.follow.start(params, key=task.KEY)

    ended = False
    while not ended:
        with connected(args.port) as connection:
            try:
                connection.send_bytes(task.to_wire(position))
                while message := connection.recv_bytes():
                    params, position = rl.follow.apply(params, message, position)
                    if position.step % 20 == 0:
                        save(file, params, position)
                        prompt = PROMPTS[position.step // 20 % len(PROMPTS)]
                        said = task.answer(params, prompt)
                        print(
                            f"sampler at step {position.step}: {prompt}|{said}",
                            flush=True,
                        )
                ended = True
                connection.send_bytes(b"done")
            except (EOFError, OSError):
                print(f"sampler lost its trainer at {position.step}", flush=True)
    print(f"sampler ends at {position.step} {task.digest(params)}", flush=True)


if __name__ == "__main__":
    main()
