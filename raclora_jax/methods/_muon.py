"""Muon: momentum made orthogonal by Newton-Schulz, on full gradients."""

from __future__ import annotations

import optax
from optax.contrib import MuonDimensionNumbers

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import OptState, PyTree
from raclora_jax.methods._method import Method, from_transform
from raclora_jax.methods._projected import size_of_moved


def muon(learning_rate: optax.ScalarOrSchedule, spec: Spec | int) -> Method:
    """Muon: ``W <- W - lr * 0.2 sqrt(max(in, out)) NS(M)``.

    M is Nesterov's momentum of 0.95. NS takes five Newton-Schulz steps towards the polar
    factor. This is ``optax.contrib.muon`` with its ``consistent_rms=0.2``, so that the
    other leaves, which get AdamW without decay, have the same learning rate. One moment
    of each matrix is kept.

    Args:
      learning_rate: A float or a schedule.
      spec: Its views: the leaves it adapts are the matrices, those it trains in full get
        AdamW. Rank, scaling and sketch are not used.

    Returns:
      A ``Method``.

    Example:
      >>> import jax.numpy as jnp
      >>> method, params = muon(1e-3, 1), {"kernel": jnp.zeros((6, 4))}
      >>> method.trained(params)
      24

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024; Liu et
      al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025,
      for the scale.
    """

    def of(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        plans, (_, treedef) = plan_tree(spec, tree), paths.flatten(tree)
        views = {path: _view(plan) for path, plan in plans.items()}
        modes = {
            path: "frozen" if plan.mode == "frozen" else "trained"
            for path, plan in plans.items()
        }
        trained = optax.contrib.muon(
            learning_rate,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=paths.unflatten(treedef, views),
        )
        rules = {"trained": trained, "frozen": optax.set_to_zero()}
        return optax.partition(rules, paths.unflatten(treedef, modes))

    def init(params: PyTree) -> OptState:
        return of(params).init(params)

    def update(
        grads: PyTree, state: OptState, params: PyTree = None
    ) -> tuple[PyTree, OptState]:
        updates, after = of(grads).update(grads, state, params)
        return updates, after

    return from_transform(
        optax.GradientTransformation(init, update),
        trained=lambda params: size_of_moved(plan_tree(spec, params).values()),
        moments=lambda opt_state: opt_state,
    )


def _view(plan: LeafPlan) -> MuonDimensionNumbers | None:
    """Which axes are in and out, ``None`` for what is no matrix."""
    if not plan.adapted:
        return None
    return MuonDimensionNumbers(reduction_axis=plan.rows, output_axis=plan.cols)
