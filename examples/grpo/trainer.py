"""Trains by GRPO on what a sampler in another process answers.

python examples/grpo/trainer.py --port 6500 --folder run

Every message is on disk before it is sent. A trainer that was killed goes on from Tunix's
checkpoint, and by the messages it has written since.
"""

import argparse
import functools
import pathlib
from multiprocessing.connection import Listener

import jax
import numpy as np
import orbax.checkpoint as ocp
import task
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutOutput

import raclora_jax as rl
from raclora_jax.tunix import RacLoraRLCluster


class RemoteRollout(BaseRollout):
    """Tunix's rollout worker at the end of a wire.

    The sampler gets the messages that it lacks, then the prompts; should it be killed,
    the next one that connects gets the same.
    """

    def __init__(self, rollout_actor, tokenizer, mesh, rollout_config, *, listener, log):
        del rollout_actor, mesh, rollout_config  # the sampler has its own
        self._tokens, self._listener, self._log = tokenizer, listener, log
        self._connection = None

    def begin(self, params, position):
        del params  # the sampler says where it is
        self._step = position.step

    def follow(self, message):
        self._step += 1  # the message is in the log

    def generate(self, prompts, rollout_config, **_):
        asked = {"prompts": [str(one) for one in prompts], "seed": rollout_config.seed}
        said = task.from_wire(self._answered(b"?" + task.to_wire(asked)))
        return RolloutOutput(
            text=said["text"],
            logits=None,
            tokens=[np.array(one, np.int32) for one in said["tokens"]],
            left_padded_prompt_tokens=np.array(said["prompts"], np.int32),
            logprobs=None,
        )

    def close(self):
        self._answered(b"")

    def _answered(self, raw):
        """Sends what is missing and some bytes, to one sampler after another."""
        while True:
            try:
                if self._connection is None:
                    self._connection = self._listener.accept()
                    position = task.from_wire(self._connection.recv_bytes())
                    self._sent = rl.follow.Position(*position).step
                # A sampler may be ahead of a trainer that was set back to a checkpoint.
                for step in range(self._sent, self._step):
                    self._connection.send_bytes(self._log.read(step))
                self._sent = max(self._sent, self._step)
                self._connection.send_bytes(raw)
                return self._connection.recv_bytes() if raw else None
            except (EOFError, OSError):
                print("trainer lost its sampler", flush=True)
                self._connection = None

    def update_params(self, params, filter_types=None):
        """Nothing: messages brought all there is."""

    def get_per_token_logps(self, prompt_tokens, completion_tokens):
        raise NotImplementedError("this worker samples for num_iterations=1 only")

    def model(self):
        return None

    def pad_id(self):
        return self._tokens.pad_id()

    def eos_id(self):
        return self._tokens.eos_id()


def batches(steps):
    for step in range(steps):
        task.SAMPLING.seed = step  # or Tunix samples every step by the same
        yield {"prompts": np.array(task.prompts(step))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    log = rl.follow.Log(args.folder / "messages")
    tx = rl.raclora(1e-2, task.SPEC, inner=rl.orthogonal(), key=task.KEY)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), auto)
    with Listener(("127.0.0.1", args.port), authkey=b"grpo") as listener:
        cluster = RacLoraRLCluster(
            actor=task.base(),
            tokenizer=task.Tokens(),
            cluster_config=ClusterConfig(
                role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
                rollout_engine=functools.partial(
                    RemoteRollout, listener=listener, log=log
                ),
                training_config=RLTrainingConfig(
                    actor_optimizer=tx,
                    eval_every_n_steps=10**9,
                    max_steps=args.steps,
                    checkpoint_root_directory=str(args.folder.resolve() / "run"),
                    checkpointing_options=ocp.CheckpointManagerOptions(
                        save_interval_steps=10, max_to_keep=2
                    ),
                ),
                rollout_config=task.SAMPLING,
            ),
            spec=task.SPEC,
            fused=True,
            log=log,
        )
        trainer = cluster.actor_trainer
        if trainer.train_steps:
            print(f"trainer goes on from step {trainer.train_steps}", flush=True)

        def reward(prompts, completions, **more):
            found = task.reward(prompts, completions)
            said = f"reward {np.mean(found):.2f}"
            print(f"trainer at step {trainer.train_steps}: {said}", flush=True)
            return found

        if trainer.train_steps < args.steps:
            config = GRPOConfig(num_generations=8, beta=0.0)
            GRPOLearner(cluster, config, reward).train(batches(args.steps))
        digest = task.digest(trainer.model)
        print(f"trainer ends at {trainer.train_steps} {digest}", flush=True)
        cluster.rollout.close()


if __name__ == "__main__":
    main()
