"""FedKRSO: clients that walk through a few shared subspaces, and send each one's sum."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import as_rule, known_plans
from raclora_jax._core import checks, paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Rule, Spec, as_spec
from raclora_jax._core.types import OptState, PyTree
from raclora_jax.federated._strategies import Strategy, mean_rule


def fedkrso(spec: Spec | int, *, seeds: int) -> Strategy:
    """FedKRSO: K subspaces a round, each client in one of them at a time.

    ``W <- W + sum_k P_k mean_j A_jk``, where ``A_jk`` is all that client j gathered in
    subspace k, and P_k has entries N(0, 1 / rank). The K of a round are one sketch of
    rank K r here, so that accumulators are its factor and a local step of ``one_seed``
    moves the rows of one k: ``W + sum_k P_k A_k`` is where a client that merged and
    started from zero in its next subspace would stand. To be trained by
    ``Local(..., inner=one_seed(...))``; with any other rule it is Fed-RAC-LoRA of rank
    K r. The paper's client holds the gradient of one subspace, and this one of all K.

    From the abstract: that subspaces are new in each round is unverified.

    Args:
      spec: A ``Spec`` or a rank, r; ``sketch`` is replaced, and it has no ``alpha``.
      seeds: K; K r must stay below the sketched sides.

    Returns:
      A ``Strategy``.

    Raises:
      ValueError: If ``seeds`` is below 1, ``alpha`` is given, or a side is drawn.

    Example:
      >>> fedkrso(2, seeds=4).spec.rank
      8

    References:
      Yang et al., `FedKRSO: Communication and Memory Efficient Federated Fine-Tuning of
      Large Language Models <https://arxiv.org/abs/2602.03019>`_, 2026.
    """
    spec, seeds = as_spec(spec), checks.count("seeds", seeds)
    for alpha in (spec.alpha, *(rule.alpha for rule in spec.rules)):
        if alpha is not None:
            raise ValueError(
                f"alpha={alpha}: FedKRSO draws P to a fixed scale; leave it out"
            )

    def fields(rank: int) -> dict[str, Any]:
        # alpha / (K r) is the 1 / sqrt(r) that makes N(0, 1) an N(0, 1 / r).
        return {"rank": seeds * rank, "alpha": seeds * math.sqrt(rank)}

    def of(rule: Rule) -> Rule:
        if rule.mode != "lowrank":
            return rule
        return dataclasses.replace(rule, sketch=None, **fields(rule.rank or spec.rank))

    wide = dataclasses.replace(
        spec,
        sketch="gaussian_raw",
        rules=tuple(map(of, spec.rules)),
        **fields(spec.rank),
    )
    return Strategy("fedkrso", wide, mean_rule, 1, pair=False)


class OneSeedState(NamedTuple):
    """State of ``one_seed``.

    Attributes:
      inner: State of the rule, for the rows of one subspace and for dense leaves.
      count: int32 scalar, local steps taken.
    """

    inner: OptState
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def one_seed(
    inner: optax.GradientTransformation, *, seeds: int, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The local rule of FedKRSO: one subspace of K for some steps, then another.

    The subspace is drawn by client, round and interval; the moments start again with it.
    Dense leaves are trained in every step.

    Args:
      inner: The rule of a local step, without learning rate.
      seeds: K, as the strategy has it.
      steps: Local steps in one subspace.

    Returns:
      A rule for ``Local(..., inner=...)``, which is handed plans and the client's key.

    Raises:
      ValueError: If a count is below 1.

    Example:
      >>> import optax
      >>> rule = one_seed(optax.scale_by_adam(), seeds=4, steps=10)
    """
    rule = as_rule(inner)
    checks.count("seeds", seeds)
    checks.count("steps", steps)

    def rows(
        factors: PyTree, plans: dict[str, LeafPlan], seed: Array
    ) -> dict[str, Array]:
        leaves, _ = paths.flatten(factors)

        def live(leaf: Array, plan: LeafPlan) -> Array:
            if not plan.adapted:
                return leaf
            rank, axis = plan.rank // seeds, len(plan.batch)
            return lax.dynamic_slice_in_dim(leaf, seed * rank, rank, axis)

        return {path: live(leaf, plans[path]) for path, leaf in leaves.items()}

    def init(factors: PyTree) -> OneSeedState:
        plans, zero = known_plans(), jnp.zeros((), jnp.int32)
        assert plans is not None
        return OneSeedState(rule.init(rows(factors, plans, zero)), zero)

    def update(
        updates: PyTree,
        state: OneSeedState,
        params: PyTree = None,
        *,
        plans: dict[str, LeafPlan],
        key: Array,
        **extra: Any,
    ) -> tuple[PyTree, OneSeedState]:
        del params, extra
        leaves, treedef = paths.flatten(updates)
        own = jax.random.fold_in(
            leaf_key(key_data(key), "seeds", ""), state.count // steps
        )
        seed = jax.random.randint(own, (), 0, seeds, jnp.int32)
        live = rows(updates, plans, seed)
        begins = state.count % steps == 0
        held = jax.tree.map(
            lambda new, old: jnp.where(begins, new, old), rule.init(live), state.inner
        )
        moved, held = rule.update(live, held)
        for path, step in moved.items():
            plan = plans[path]
            if plan.adapted:
                rank, axis = plan.rank // seeds, len(plan.batch)
                still = jnp.zeros_like(leaves[path])
                step = lax.dynamic_update_slice_in_dim(still, step, seed * rank, axis)
            leaves[path] = step
        after = OneSeedState(held, optax.safe_increment(state.count))
        return paths.unflatten(treedef, leaves), after

    return optax.GradientTransformationExtraArgs(init, update)
