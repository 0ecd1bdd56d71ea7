"""What a fused step can take, and what it refuses by name."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raclora_jax._autodiff.elementwise import joining
from raclora_jax._autodiff.uses import user_level
from raclora_jax._chain.inner import PROBE, as_rule, knowing
from raclora_jax._chain.separable import PerMatrix
from raclora_jax._chain.state import is_state
from raclora_jax._core.types import Leaves, OptState, PyTree
from raclora_jax._forms.descent import Descent
from raclora_jax._forms.optimizer import RacLora


def descent_of(tx: Any) -> Descent:
    """What a transformation was made of, if a fused step can take it."""
    if not isinstance(tx, RacLora):
        raise TypeError(
            f"a fused step takes what raclora(...) returned, got {type(tx).__name__}; "
            "nothing may stand around it, in a chain or as a wrapper, since no gradient "
            "is there for it: clip each matrix inside, as in inner=rl.per_matrix("
            "optax.chain(rl.clip_by_matrix_norm(1.0), rule)); what is not finite a fused "
            "step leaves out by itself; for all else use rl.value_and_grad, tx.update "
            "and rl.apply_updates"
        )
    descent = tx.descent
    _check_separable(descent.run.inner)
    if descent.clip_norm is not None:
        raise ValueError(
            "clip_norm needs the gradients of all leaves at once, which a fused step "
            "never has; clip each matrix, as in inner=rl.per_matrix(optax.chain("
            "rl.clip_by_matrix_norm(1.0), rule)), or use rl.value_and_grad, tx.update "
            "and rl.apply_updates"
        )
    return descent


def _check_separable(inner: optax.GradientTransformation) -> None:
    """Refuses a rule that is not known to act on each matrix by itself.

    Raises:
      ValueError: With the way out.
    """
    if isinstance(inner, PerMatrix):
        return
    found = _what_joins(inner)
    if found is not None:
        raise ValueError(
            "a fused step updates one matrix at a time, and inner does more than work "
            f"number by number ({found}); if it acts on each matrix by itself say so, "
            "with inner=rl.per_matrix(rule). What needs the gradients of all leaves at "
            "once (a clip by the global norm, MultiSteps, apply_if_finite) needs "
            "rl.value_and_grad, tx.update and rl.apply_updates in place of a fused step"
        )


def _what_joins(inner: optax.GradientTransformation) -> str | None:
    """The operation by which a rule joins numbers of a leaf, if there is one."""
    # Asked of its program for one small factor: a rule does not say what it joins.
    rule, plans = as_rule(inner), {PROBE.path: PROBE}
    gradient = {PROBE.path: jax.ShapeDtypeStruct(PROBE.factor_shape, jnp.float32)}

    def update(gradient: Any, state: OptState) -> Any:
        with knowing(plans):
            return rule.update(gradient, state, None, plans=plans)

    with knowing(plans):
        state = jax.eval_shape(inner.init, gradient)
    return joining(jax.make_jaxpr(update)(gradient, state), PROBE.factor_shape)


def tell_of_two_copies(leaves: Leaves) -> None:
    """Warns where nothing can be donated; inside ``jit`` that cannot be seen."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values()):
        return
    size = sum(leaf.nbytes for leaf in leaves.values()) / 2**20
    warnings.warn(
        "a fused step outside of jit holds the old weights beside the new ones, "
        f"{size:.1f} MiB more: call jax.jit(step, donate_argnums=(0, 1))",
        stacklevel=user_level(),
    )


def check_alone(opt_state: PyTree) -> None:
    """Refuses a state that other transformations have a part in."""
    others = [
        jax.tree_util.keystr(keypath)
        for keypath, node in jax.tree_util.tree_leaves_with_path(
            opt_state, is_leaf=is_state
        )
        if not is_state(node)
    ]
    if others:
        raise ValueError(
            f"opt_state holds {others[0]} beside the state of raclora, and a fused step "
            "would leave it as it is; pass the state of the raclora(...) it was made with"
        )
