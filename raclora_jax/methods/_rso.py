"""RSO: a chain of proximal subproblems, each in a random subspace."""

from __future__ import annotations

import dataclasses
import math

import optax

from raclora_jax._core import checks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Rule, Spec, as_spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._algebra import refuse_alpha
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces


def rso(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    proximal: float,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """RSO: ``W <- W + P B``, B from 0 on ``f(W + P B) + proximal / 2 |B|^2``.

    P has entries N(0, 1 / rank), so that ``E P P^T = I``, and is drawn anew for every
    subproblem of ``spec.resample_every`` steps; the moments of B start again with it.
    ``raclora`` differs in two things: its law is orthonormal, so that ``P P^T`` is a
    projector, and it has no proximal term, with which the paper's guarantee holds for any
    inner solver (``proximal`` is its ``1 / eta``, at least twice the smoothness of f).
    The paper's code was not read: what its runs of Adam take for it is unverified, and
    there is no default.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and length of a subproblem; its ``sketch`` is replaced,
        and it has no ``alpha``.
      proximal: Weight of the proximal term, at least 0.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Raises:
      ValueError: If ``proximal`` is below 0, or ``alpha`` is given.

    Example:
      >>> import jax.numpy as jnp
      >>> rso(1e-3, Spec(2), proximal=0.1, key=0).trained({"kernel": jnp.zeros((6, 4))})
      12

    References:
      Chen et al., `A Memory Efficient Randomized Subspace Optimization Method for
      Training Large Language Models <https://arxiv.org/abs/2502.07222>`_, 2025.
    """
    checks.number("proximal", proximal, checks.NOT_NEGATIVE)

    def drawn_back(plan: LeafPlan, gradients: Pair, pair: Pair) -> Pair:
        return {"zero": gradients["zero"] + proximal * pair["zero"]}

    pieces = Pieces(
        inner=inner,
        train_drawn=False,
        chain=True,
        gradient=drawn_back if proximal else None,
    )
    return pair_method(learning_rate, gaussian(spec, "RSO"), pieces, key=key)


def gaussian(spec: Spec | int, method: str) -> Spec:
    """The spec with N(0, 1 / rank) for its law: raw draws over the root of the rank."""
    spec = as_spec(spec)
    refuse_alpha(spec, f"{method} draws P")

    def of(rule: Rule) -> Rule:
        if rule.mode != "lowrank":
            return rule
        alpha = math.sqrt(rule.rank or spec.rank)
        return dataclasses.replace(rule, alpha=alpha, sketch=None)

    return dataclasses.replace(
        spec,
        alpha=math.sqrt(spec.rank),
        sketch="gaussian_raw",
        rules=tuple(map(of, spec.rules)),
    )
