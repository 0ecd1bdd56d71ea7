"""Tunix's RL cluster with an actor in factor form, and rollouts that follow it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import optax

from raclora_jax import flax as rl_flax
from raclora_jax import follow
from raclora_jax._chain.state import find_state
from raclora_jax._core.spec import Spec
from raclora_jax._extras import extra
from raclora_jax.tunix._trainers import FactorForm

with extra("tunix"):
    from flax import nnx
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster
    from tunix.rl.trainer import Trainer


class _Actor(FactorForm, Trainer):  # type: ignore[misc]
    """Tunix's RL trainer in factor form, which makes a message of each step.

    Attributes:
      outbox: The messages since the last sync; none where nobody follows.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        *,
        log: follow.Log | None,
        sends: bool,
        **kwargs: Any,
    ) -> None:
        self.outbox: list[bytes] = []
        self._moves_by_messages = sends
        base, _ = rl_flax.to_tree(model)  # before Tunix restores its checkpoint
        super().__init__(model, optimizer, **kwargs)
        if not sends:
            return
        self._log = log
        key = find_state(nnx.as_pure(self.optimizer.opt_state)).key_data
        self.position = follow.start(base, key=key)
        if self.iter_steps and log is None:
            raise ValueError(
                f"the checkpoint is of step {self.iter_steps}: expected log=Log(...) "
                "with the messages before it, got none; hand over the log of the run"
            )
        for step in range(self.iter_steps):
            self.position = follow.passed(self.position, log.read(step))  # type: ignore[union-attr]

    def _post_process_train_step(self, aux: Any) -> None:
        if self._moves_by_messages:
            aux, updates = aux
            self._send(updates)
        super()._post_process_train_step(aux)

    def _send(self, updates: Any) -> None:
        """Makes the message of the step that was taken, and moves by it."""
        params, restore = rl_flax.to_tree(self.model)
        opt_state, at = nnx.as_pure(self.optimizer.opt_state), self.position
        if self._log is not None and at.step in self._log.steps():
            # Written before the trainer was killed, and perhaps sent: it stands.
            message = self._log.read(at.step)
        elif self._fused:
            message = follow.encode_fused(params, opt_state, self.optimizer.tx, at)
        else:
            message = follow.encode(params, updates, opt_state, at)
        if self._log is not None:
            self._log.write(message)
        # A fused step has moved the weights. Its message, which holds the new rows,
        # leaves them so, or makes them those that were written before a kill.
        moved, self.position = follow.apply(params, message, at)
        nnx.update(self.model, nnx.state(restore(moved), nnx.Param))
        self.outbox.append(message)


class RacLoraRLCluster(RLCluster):  # type: ignore[misc]
    """``tunix.RLCluster`` whose actor steps in factor form, for any learner on it.

    A run is Tunix's own: ``GRPOLearner(cluster, GRPOConfig(...), reward_fns).train(ds)``,
    or another of its learners. No gradient of an adapted weight is formed. With
    ``rollout_engine=FollowerRollout``, or another engine that has ``begin`` and
    ``follow``, each step is a message, by which actor and rollout both move, and
    ``sync_weights`` sends no weights; any other engine gets weights as Tunix has it.

    It is named after the class it stands for, since GRPO's learner is not changed: what
    Tunix builds in the cluster is the trainer of the actor.

    Args:
      spec: The spec that ``raclora`` was given.
      fused: Whether a step updates inside the backward pass, as in ``RacLoraTrainer``; to
        be followed its sketch has to pick rows, as ``sketch="block"`` does.
      log: Where each message is written before it is sent. With Tunix's checkpoints, a
        run that was killed goes on by it.
      **kwargs: The arguments of ``RLCluster``, keyword only as there. The
        ``actor_optimizer`` has one ``raclora(...)`` in it. Micro-batches are accumulated
        by its inner rule, ``optax.MultiSteps(rule, k)``, with ``k`` that of
        ``mini_batch_size`` over ``train_micro_batch_size``.

    Raises:
      ValueError: If the actor has LoRA modules, weights are to be offloaded under a
        rollout that follows, gradients are to be accumulated around ``raclora``, or a
        checkpoint is there without a log.

    Example:
      >>> cluster = RacLoraRLCluster(  # doctest: +SKIP
      ...     actor=model,
      ...     tokenizer=tokenizer,
      ...     cluster_config=config,  # with rollout_engine=FollowerRollout
      ...     spec=spec,
      ...     fused=True,
      ... )
      >>> GRPOLearner(cluster, GRPOConfig(), reward).train(ds)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        spec: Spec | int,
        cluster_config: ClusterConfig,
        fused: bool = False,
        log: follow.Log | None = None,
        **kwargs: Any,
    ) -> None:
        engine = cluster_config.rollout_engine
        follows = hasattr(getattr(engine, "func", engine), "follow")
        if follows and cluster_config.offload_to_cpu:
            raise ValueError(
                "offload_to_cpu=True hands weights to the rollout, which takes messages: "
                f"expected False with rollout_engine={engine!r}"
            )
        if log is not None and not follows:
            raise ValueError(
                "log= is for messages: expected a rollout_engine that follows, such as "
                f"FollowerRollout, got {engine!r}"
            )
        self._actor: _Actor | None = None
        # Tunix makes its trainer of the actor here; without an optimizer, accumulation
        # and checkpoints it is a stand-in that holds nothing.
        config = cluster_config.training_config
        bare = copy.copy(config)
        bare.actor_optimizer = optax.set_to_zero()
        bare.gradient_accumulation_steps = None
        bare.checkpoint_root_directory = None
        stand_in = dataclasses.replace(cluster_config, training_config=bare)
        super().__init__(cluster_config=stand_in, **kwargs)
        self.cluster_config = cluster_config
        plain = self.actor_trainer
        own = copy.copy(config)
        own.metrics_prefix = plain.config.metrics_prefix
        own.pbar_description = plain.config.pbar_description
        if config.checkpoint_root_directory is not None:
            own.checkpoint_root_directory = f"{config.checkpoint_root_directory}/actor"
        plain.checkpoint_manager.close()
        self._actor = _Actor(
            plain.model,
            config.actor_optimizer,
            spec=spec,
            fused=fused,
            log=log,
            sends=follows,
            training_config=own,
            custom_checkpoint_metadata_fn=plain.custom_checkpoint_metadata_fn,
            metrics_logger=plain.metrics_logger,
            perf_tracer=self.perf,
            perf_tracer_v2=self.perf_v2,
        )
        if follows:
            params, _ = rl_flax.to_tree(self._actor.model)
            self.rollout.begin(params, self._actor.position)

    @property
    def actor_trainer(self) -> Trainer:
        """The trainer of the actor, in factor form once it is there."""
        return self._actor or super().actor_trainer

    def sync_weights(self) -> None:
        """Hands the rollout the messages since the last sync."""
        outbox = self.actor_trainer.outbox
        for message in outbox:
            self.rollout.follow(message)
        outbox.clear()
        super().sync_weights()
