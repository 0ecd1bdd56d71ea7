"""HeteroLoRA: a budget of pairs, spent on the leaves that score highest."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pair, Pieces, Subset


def heterolora(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    score: Literal["constant", "grad_norm", "snip"] = "grad_norm",
    budget: float = 0.25,
    search: int = 32,
    every: int | None = None,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """HeteroLoRA: after a search, only the best ``budget`` of the pairs are trained.

    Scores of a leaf are summed over the batches since the last choice: ``"snip"`` is
    ``sum |theta * gradient|`` over both factors, ``"grad_norm"`` the norm of their
    gradients (which norm the authors take is unverified), ``"constant"`` a choice at
    random, as ties are. The ``floor(budget * leaves)`` highest are trained and the
    others rest as they are. While the first search runs all leaves are trained, because
    at the start the zero factor and the gradient of the drawn one are zero: ``snip`` is 0
    everywhere then, and ``grad_norm`` sees one factor.

    Two scores of the paper are left out, since they ask for more than the loss of a
    batch: SYNFLOW for a pass with the weights' absolute values over an input of ones,
    and ALPHA-TEST for the metric of the task.

    A stacked leaf is one leaf. Moments of leaves at rest keep their place in memory, are
    counted, and decay as with zero gradients.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and scaling; ``side`` is the side of the drawn factor.
      score: ``"grad_norm"``, ``"snip"`` or ``"constant"``.
      budget: Which part of the adapted leaves is trained, above 0 and at most 1.
      search: Steps of the first search; 32 in the authors' code, 2 or more for ``snip``.
      every: Steps between later choices, a tenth or a fifth of an epoch in the authors'
        code; by default the first choice stays.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``; its trained numbers are the most that the budget can buy, as after
      the first search.

    Raises:
      ValueError: If an argument is out of range; from ``init``, if the budget is below
        one leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> W = {f"layer{i}": jnp.zeros((6, 4)) for i in range(8)}
      >>> heterolora(1e-3, Spec(2), key=0).trained(W)
      40

    References:
      Zhang et al., `Unlocking the Global Synergies in Low-Rank Adapters
      <https://arxiv.org/abs/2406.14956>`_, 2024.
    """
    data = key_data(key)
    checks.choice("score", score, _SCORES)
    checks.number("budget", budget, checks.SHARE, way_out="it is a part of the leaves")
    checks.count("search", search)
    if every is not None:
        checks.count("every", every)
    if score == "snip" and search < 2:
        raise ValueError(
            "search=1 sees the start only, where snip is 0 for every leaf; search for 2 "
            "steps or more, or take score='grad_norm'"
        )

    def size(known: int) -> int:
        chosen = math.floor(budget * known)
        if chosen < 1:
            raise ValueError(
                f"budget={budget} of {known} leaves is below one leaf; raise it to "
                f"{1 / known:.3g} or more"
            )
        return chosen

    def init(known: int) -> PyTree:
        size(known)
        return {"scores": jnp.zeros(known), "live": jnp.ones(known, bool)}

    def update(
        state: PyTree, count: Array, gradients: dict[str, Pair], pairs: dict[str, Pair]
    ) -> tuple[Array, PyTree]:
        since = count - search
        ends = since == 0 if every is None else (since >= 0) & (since % every == 0)
        own = jax.random.fold_in(leaf_key(data, "ties", ""), count)
        best = highest(state["scores"], size(len(pairs)), own)
        live = jnp.where(ends, best, state["live"])
        new = [_SCORES[score](gradients[path], pair) for path, pair in pairs.items()]
        scores = jnp.where(ends, 0, state["scores"]) + jnp.stack(new)
        return live, {"scores": scores, "live": live}

    pieces = Pieces(inner=inner, subset=Subset(size, init, update))
    return pair_method(learning_rate, spec, pieces, key=key)


def highest(scores: Array, count: int, key: Array) -> Array:
    """Which are the ``count`` highest, ties broken at random."""
    order = jax.random.permutation(key, scores.size)
    ranked = order[jnp.argsort(-scores[order], stable=True)]
    return jnp.zeros(scores.size, bool).at[ranked[:count]].set(True)


def _constant(gradients: Pair, pair: Pair) -> Array:
    del gradients, pair
    return jnp.ones(())


def _grad_norm(gradients: Pair, pair: Pair) -> Array:
    del pair
    return optax.tree.norm(gradients)


def _snip(gradients: Pair, pair: Pair) -> Array:
    products = [jnp.abs(pair[name] * g) for name, g in gradients.items()]
    return jnp.sum(jnp.stack([jnp.sum(one) for one in products]))


_SCORES = {"constant": _constant, "grad_norm": _grad_norm, "snip": _snip}
