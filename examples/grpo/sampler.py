"""Samples answers by weights that follow the trainer's.

python examples/grpo/sampler.py --port 6500 --folder run

A sampler that was killed goes on from the weights it saved last; the trainer sends what
came after them, and asks again.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import jax
import safetensors
import task
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import load_file, save_file

import raclora_jax as rl
from raclora_jax import flax as rl_flax
from raclora_jax.tunix import FollowerRollout

SAVED = 5  # messages between two files


def save(file, rollout):
    partial = file.with_suffix(".partial")
    params = flatten_dict(rl_flax.to_tree(rollout.model())[0], sep="/")
    save_file(params, partial, metadata={"position": json.dumps(rollout.position)})
    os.replace(partial, file)


def load(file):
    with safetensors.safe_open(file, "numpy") as opened:
        position = json.loads(opened.metadata()["position"])
    return unflatten_dict(load_file(file), sep="/"), rl.follow.Position(*position)


def connected(port):
    """A connection, as soon as there is a trainer."""
    while True:
        try:
            return Client(("127.0.0.1", port), authkey=b"grpo")
        except (OSError, EOFError, AuthenticationError):
            time.sleep(0.2)


def answer(rollout, asked):
    """What Tunix's sampler says, as plain data."""
    config = dataclasses.replace(task.SAMPLING, seed=asked["seed"])
    said = rollout.generate(asked["prompts"], config)
    return {
        "text": said.text,
        "tokens": [one.tolist() for one in said.tokens],
        "prompts": said.left_padded_prompt_tokens.tolist(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()

    base, auto = task.base(), (jax.sharding.AxisType.Auto,) * 2
    rollout = FollowerRollout(
        rollout_actor=base,
        tokenizer=task.Tokens(),
        mesh=jax.make_mesh((1, 1), ("fsdp", "tp"), auto),
        rollout_config=task.SAMPLING,
    )
    file = args.folder / "sampler.safetensors"
    args.folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
        rollout.begin(*load(file))
        print(f"sampler goes on from step {rollout.position.step}", flush=True)
    else:
        params = rl_flax.to_tree(base)[0]
        rollout.begin(params, rl.follow.start(params, key=task.KEY))

    ended = False
    while not ended:
        with connected(args.port) as connection:
            try:
                connection.send_bytes(task.to_wire(rollout.position))
                while raw := connection.recv_bytes():
                    if raw[:1] == b"?":
                        said = answer(rollout, task.from_wire(raw[1:]))
                        connection.send_bytes(task.to_wire(said))
                        continue
                    rollout.follow(raw)
                    if rollout.position.step % SAVED == 0:
                        save(file, rollout)
                        print(f"sampler at step {rollout.position.step}", flush=True)
                ended = True
            except (EOFError, OSError):
                print(f"sampler lost its trainer at {rollout.position.step}", flush=True)
    step, digest = rollout.position.step, task.digest(rollout.model())
    print(f"sampler ends at {step} {digest}", flush=True)


if __name__ == "__main__":
    main()
