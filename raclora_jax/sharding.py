"""Where a run's arrays live on a mesh: the shardings of its state and of its factors."""

from raclora_jax._forms.shardings import factor_shardings, state_shardings

__all__ = ["factor_shardings", "state_shardings"]
