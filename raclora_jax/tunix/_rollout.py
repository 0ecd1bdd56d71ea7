"""A rollout worker whose weights are a follower's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from raclora_jax import flax as rl_flax
from raclora_jax import follow
from raclora_jax._core import paths
from raclora_jax._core.digest import digests
from raclora_jax._core.types import PyTree
from raclora_jax._extras import extra

with extra("tunix"):
    from flax import nnx
    from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
    from tunix.rl.rollout.vanilla_rollout import VanillaRollout


class FollowerRollout(VanillaRollout):  # type: ignore[misc]
    """Tunix's ``VanillaRollout`` on weights of its own, which messages move.

    It is the ``rollout_engine`` of a ``ClusterConfig``: Tunix makes one, and
    ``RacLoraRLCluster`` hands it a message for each step in the place of the weights. It
    samples on the mesh of ``Role.ROLLOUT``, from a copy that is equal to the bit.

    A worker elsewhere, as in ``examples/grpo``, is a ``BaseRollout`` that has ``begin``
    and ``follow`` too.

    Args:
      rollout_actor: The model that the run begins with.
      tokenizer: As Tunix has it.
      mesh: Where the copy is.
      rollout_config: As Tunix has it.

    Example:
      >>> config = ClusterConfig(  # doctest: +SKIP
      ...     role_to_mesh=role_to_mesh,
      ...     rollout_engine=FollowerRollout,
      ...     training_config=training_config,
      ...     rollout_config=rollout_config,
      ... )
    """

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        mesh: Mesh,
        rollout_config: RolloutConfig,
    ) -> None:
        graph, state = nnx.split(rollout_actor)
        if not mesh.empty:
            specs = nnx.get_partition_spec(state)
            state = jax.device_put(
                state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            )
        model: Any = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        config = model.config
        cache = CacheConfig(
            cache_size=rollout_config.kv_cache_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        super().__init__(model, tokenizer, cache)
        self.position: follow.Position | None = None

    def begin(self, params: PyTree, position: follow.Position) -> None:
        """Takes the trainer's weights, once, when a run begins or goes on.

        Args:
          params: The plain tree of the actor.
          position: Where they stand.
        """
        own, restore = rl_flax.to_tree(self.model())
        copied = jax.tree.map(
            lambda new, old: jnp.copy(jax.device_put(new, old.sharding)), params, own
        )
        self._take(restore(copied))
        self.position = position

    def follow(self, message: bytes) -> None:
        """Moves the weights by one message.

        Args:
          message: The next one of the run.

        Raises:
          ValueError: If it does not fit, as ``raclora_jax.follow.apply`` says.
        """
        if self.position is None:
            raise ValueError(
                "this FollowerRollout has no position: expected begin(params, position) "
                "before the first message; RacLoraRLCluster does that"
            )
        own, restore = rl_flax.to_tree(self.model())
        moved, self.position = follow.apply(own, message, self.position)
        self._take(restore(moved))

    def update_params(
        self, params: PyTree, filter_types: tuple[Any, ...] | None = None
    ) -> None:
        """Holds the trainer's weights against its own, and copies nothing.

        Args:
          params: The weights of the actor, as ``sync_weights`` hands them over.
          filter_types: As Tunix has it.

        Raises:
          ValueError: If one has other bits than the messages brought.
        """
        del filter_types
        wanted = digests(paths.flatten(rl_flax.to_tree(params)[0])[0])
        own = digests(paths.flatten(rl_flax.to_tree(self.model())[0])[0])
        other = [path for path in wanted if own.get(path) != wanted[path]]
        if other:
            raise ValueError(
                f"leaf {paths.show(other[0])} of the rollout: expected digest "
                f"{wanted[other[0]]}, which the actor has, got {own.get(other[0])}; a "
                "FollowerRollout moves by messages alone: train with RacLoraRLCluster, "
                "or take rollout_engine='vanilla'"
            )

    def _take(self, model: nnx.Module) -> None:
        super().update_params(nnx.state(model, nnx.Param))
