"""What stands around ``raclora`` in an optimizer, as its state shows it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

from raclora_jax._chain.state import is_state
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import PyTree


def check_takes_factors(opt_state: PyTree, plans: dict[str, LeafPlan]) -> None:
    """Refuses transformations around ``raclora`` that keep leaf-shaped state.

    ``MultiSteps``, ``schedule_free``, ``ema`` and their like add gradients or updates to
    arrays of the leaf's shape, which a ``Factor`` has not.
    """
    around = _holder(opt_state)
    for keypath, leaf in jax.tree_util.tree_leaves_with_path(around, is_leaf=is_state):
        if is_state(leaf):
            continue
        parts = paths.canonical(keypath).split("/")
        ends = ("/".join(parts[at:]) for at in range(len(parts)))
        for plan in (plans[end] for end in ends if end in plans):
            if plan.adapted and jnp.shape(leaf) == plan.shape:
                raise ValueError(
                    f"leaf {paths.show(plan.path)}: opt_state holds an array of its full "
                    f"shape {plan.shape} at {jax.tree_util.keystr(keypath)}, outside "
                    "raclora, so a transformation around raclora cannot take its "
                    "factors; put it inside, as in raclora(..., "
                    "inner=optax.MultiSteps(optax.scale_by_adam(), k)"
                    ".gradient_transformation()), or use jax.value_and_grad with it"
                )


def _holder(opt_state: PyTree) -> PyTree:
    """The part of an optimizer state that one transformation keeps around the chain.

    Transformations keep tuples; dicts and lists outside of those are the user's own, and
    what else they hold belongs to other optimizers.
    """
    while isinstance(opt_state, dict | list):
        parts = opt_state.values() if isinstance(opt_state, dict) else opt_state
        opt_state = next(part for part in parts if _holds_state(part))
    return opt_state


def _holds_state(tree: PyTree) -> bool:
    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def check_neighbours(opt_state: PyTree) -> None:
    """Speaks of rules before and after ``raclora`` that mean another thing for factors.

    A rule with no state cannot be told from a harmless one, so that those before get a
    warning, and those after are left to ``apply_updates``.
    """
    before, after = (list(part) for part in zip(*_neighbours(opt_state), strict=True))
    late, early = (jax.tree.leaves(part, is_leaf=_is_known) for part in (after, before))
    if any(isinstance(node, optax.AddNoiseState) for node in late):
        raise ValueError(
            "optax.add_noise after raclora would add noise to what its updates carry for "
            "the weights; put it inside, as in raclora(..., inner=optax.chain("
            "optax.add_noise(...), optax.scale_by_adam()))"
        )
    if any(map(_is_known, early)):
        warnings.warn(
            "a rule stands before raclora in its chain: in factor form it is given the "
            "gradients of the factors, whose norm is some sqrt(rank / dim) of the whole "
            "gradient's, so that one which clips, centres or adds noise does another "
            "thing than on dense gradients; to clip alike in both forms write "
            "raclora(..., clip_norm=1.0), and put other rules inside, as in "
            "inner=optax.chain(rule, optax.scale_by_adam())",
            stacklevel=3,
        )


def _neighbours(opt_state: PyTree) -> Iterator[tuple[PyTree, PyTree]]:
    """What precedes and what follows the state, in each chain around it."""
    yield (), ()
    while not is_state(opt_state):
        if isinstance(opt_state, tuple | list):
            parts = list(opt_state)
        elif isinstance(opt_state, dict):
            parts = list(opt_state.values())
        else:
            return
        at = next((i for i, part in enumerate(parts) if _holds_state(part)), None)
        if at is None:
            return
        if type(opt_state) is tuple:  # as ``optax.chain`` has it; wrappers name theirs
            yield parts[:at], parts[at + 1 :]
        opt_state = parts[at]


def _is_known(node: PyTree) -> bool:
    return isinstance(node, optax.EmptyState | optax.AddNoiseState)
