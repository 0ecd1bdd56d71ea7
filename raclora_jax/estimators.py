"""Gradient estimators without a noise floor, to stand in front of ``raclora``.

Under minibatch noise a chain stops at a floor that the learning rate and the noise set.
``page`` and ``mvr`` answer each gradient with an estimate that is corrected from step to
step, at the price of a second gradient: at the previous weights, on the same samples.
Estimates are kept at full size and in front of the sketch: sketch and side change with
every link, so no factor could hold one. Gradients must therefore be dense, those of
``jax.value_and_grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._core import checks, keys, paths
from raclora_jax._core.factor import is_factor
from raclora_jax._core.types import KeyLike, Leaf, OptState, PyTree, widened

__all__ = ["MvrState", "PageState", "mvr", "next_is_full", "page"]


class PageState(NamedTuple):
    """State of ``page``.

    Attributes:
      count: int32 scalar, updates so far.
      key_data: uint32 of shape (2,), what the coins come from.
      is_full: Bool scalar, whether the next update takes its gradient as the estimate.
      estimate: The estimate so far, a tree like the params, at least float32.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    key_data: Array
    is_full: Array
    estimate: PyTree


class MvrState(NamedTuple):
    """State of ``mvr``.

    Attributes:
      begun: Bool scalar, whether there is an estimate yet.
      estimate: The estimate so far, a tree like the params, at least float32.
    """

    begun: Array
    estimate: PyTree


def page(
    probability: float | Array, *, key: KeyLike
) -> optax.GradientTransformationExtraArgs:
    """PAGE: a large batch now and then, corrected by small ones in between.

    With probability q the estimate is the gradient itself, which should then be one of
    all samples or of a large batch; otherwise, with G of a small batch at the weights and
    G' of the same batch at the previous weights, ``g <- g + G - G'``. The first update is
    of the first kind. ``next_is_full`` tells which gradient the next update wants.

    In front of ``raclora(gamma, spec, inner=optax.identity(), ...)`` with a new sketch in
    every step, mean ``E |G|^2 <= 2 gap / (lambda gamma T)`` if
    ``gamma <= 1 / (L + Lhat sqrt(lambda_max (1 - q) / (q b)))``, with b the size of the
    small batch and Lhat the mean-square smoothness of the samples: no term of the noise.
    This derivation is ours.

    Args:
      probability: q, above 0 and at most 1.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      An optax transformation whose ``update`` takes the extra argument
      ``grad_at_previous``, a tree like the gradients; where the gradient is taken as it
      is, anything of that form.

    Raises:
      ValueError: If the probability is out of range; from ``update``, if
        ``grad_at_previous`` is missing or of another form.
      TypeError: If the probability is no number.

    Example:
      >>> import jax, jax.numpy as jnp, optax, raclora_jax as rl
      >>> targets = jnp.linspace(-1, 1, 64)
      >>> grad = jax.grad(lambda W, batch: jnp.mean((jnp.sum(W) - batch) ** 2))
      >>> inner = optax.identity()
      >>> spec = rl.Spec(1, side=0.5, resample_every=1)
      >>> tx = optax.chain(page(0.2, key=0), rl.raclora(0.1, spec, inner=inner, key=1))
      >>> W = before = jnp.ones((3, 2))
      >>> state = tx.init(W)
      >>> for step in range(8):
      ...     batch = targets if next_is_full(state) else targets[step::8]
      ...     updates, state = tx.update(
      ...         grad(W, batch), state, W, grad_at_previous=grad(before, batch)
      ...     )
      ...     before, W = W, optax.apply_updates(W, updates)

    References:
      Li et al., `PAGE <https://arxiv.org/abs/2008.10898>`_, 2021. Sokolov et al.,
      `Bernoulli-LoRA <https://arxiv.org/abs/2508.03820>`_, 2025.
    """
    checks.scalar("page: probability", probability, checks.SHARE)
    data = keys.key_data(key)

    def init(params: PyTree) -> PageState:
        zero = jnp.zeros((), jnp.int32)
        return PageState(zero, data, jnp.asarray(True), _zeros(params))

    def update(
        updates: PyTree,
        state: PageState,
        params: PyTree = None,
        *,
        grad_at_previous: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, PageState]:
        del params, extra

        def estimate(new: Array, before: Array, old: Array) -> Array:
            return jnp.where(state.is_full, new, old + (new - before))

        answer, kept = _estimated(
            "page", estimate, updates, grad_at_previous, state.estimate
        )
        count = optax.safe_increment(state.count)
        # The coin of the next step: the loop must know which batch to draw before it.
        is_full = _coin(state.key_data, count) < probability
        return answer, PageState(count, state.key_data, is_full, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def next_is_full(opt_state: OptState) -> Array:
    """Whether the next update of ``page`` wants a gradient of all samples.

    Args:
      opt_state: State of any optax transformation that contains ``page`` once.

    Returns:
      A bool scalar, which ``jax.lax.cond`` takes in a compiled step.

    Raises:
      ValueError: If there is no state of ``page``, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> bool(next_is_full(page(0.1, key=0).init(jnp.zeros((3, 2)))))
      True
    """

    def is_page(node: Leaf) -> bool:
        return isinstance(node, PageState)

    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_page) if is_page(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one PageState, found {len(found)}; pass what tx.init "
            "or tx.update returned, where tx contains page(...) once"
        )
    return found[0].is_full


def mvr(weight: float | Array) -> optax.GradientTransformationExtraArgs:
    """Momentum with variance reduction: one small batch in every step.

    With G of a batch at the weights and G' of the same batch at the previous weights,
    ``g <- G + (1 - b) (g - G')``. The first estimate is G.

    In front of ``raclora`` as in ``page``, mean
    ``E |G|^2 <= 2 Phi / (lambda gamma T) + 2 b sigma^2 lambda_max / lambda_min`` if
    ``gamma <= 1 / (L + Lhat (1 - b) sqrt(2 lambda_max / b))``, with Phi the gap plus a
    multiple of the first estimate's error: the floor falls with b. This derivation is
    ours.

    Args:
      weight: b, the weight of the fresh gradient, above 0 and at most 1; at 1 every
        gradient is its own estimate.

    Returns:
      An optax transformation whose ``update`` takes the extra argument
      ``grad_at_previous``, a tree like the gradients.

    Raises:
      ValueError: If the weight is out of range; from ``update``, if ``grad_at_previous``
        is missing or of another form.
      TypeError: If the weight is no number.

    Example:
      >>> import jax.numpy as jnp, optax, raclora_jax as rl
      >>> tx = optax.chain(mvr(0.1), rl.raclora(0.1, 1, key=0))
      >>> W = jnp.ones((3, 2))
      >>> updates, state = tx.update(W, tx.init(W), W, grad_at_previous=W)
      >>> bool(jnp.allclose(state[0].estimate, W))
      True

    References:
      Cutkosky and Orabona, `Momentum-based variance reduction
      <https://arxiv.org/abs/1905.10018>`_, 2019. Sokolov et al., `Bernoulli-LoRA
      <https://arxiv.org/abs/2508.03820>`_, 2025.
    """
    checks.scalar("mvr: weight", weight, checks.SHARE)

    def init(params: PyTree) -> MvrState:
        return MvrState(jnp.asarray(False), _zeros(params))

    def update(
        updates: PyTree,
        state: MvrState,
        params: PyTree = None,
        *,
        grad_at_previous: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, MvrState]:
        del params, extra

        def estimate(new: Array, before: Array, old: Array) -> Array:
            memory = jnp.asarray(1 - weight, new.dtype)
            return jnp.where(state.begun, new + memory * (old - before), new)

        answer, kept = _estimated(
            "mvr", estimate, updates, grad_at_previous, state.estimate
        )
        return answer, MvrState(jnp.asarray(True), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(params: PyTree) -> PyTree:
    # Wide: corrections are added up, and in 16 bits small ones would be lost.
    return jax.tree.map(
        lambda leaf: jnp.zeros(jnp.shape(leaf), widened(jnp.result_type(leaf))), params
    )


def _coin(data: Array, count: Array) -> Array:
    """A number in [0, 1) for one update."""
    key = keys.step_keys(data, "page", [""], count)[""]
    # The process-wide flag changes the bits of every draw; a run must not depend on it.
    with jax.threefry_partitionable(True):
        return jax.random.uniform(key, (), jnp.float32)


def _estimated(
    name: str,
    estimate: Callable[[Array, Array, Array], Array],
    updates: PyTree,
    before: PyTree,
    kept: PyTree,
) -> tuple[PyTree, PyTree]:
    """The estimates in the dtypes of the gradients, and as they are kept."""
    news, treedef = paths.flatten(updates, is_leaf=is_factor)
    if before is None:
        raise ValueError(
            f"{name} needs the gradient at the previous weights on the same samples: "
            "call tx.update(grads, state, params, grad_at_previous=...)"
        )
    earlier, _ = paths.flatten(before, is_leaf=is_factor)
    olds, structure = paths.flatten(kept)
    for path, new in news.items():
        if is_factor(new) or is_factor(earlier.get(path)):
            raise ValueError(
                f"leaf {paths.show(path)}: {name} keeps estimates at full size and takes "
                "no Factor; take gradients with jax.value_and_grad"
            )
        if path not in earlier or path not in olds:
            lacks = "the state" if path in earlier else "grad_at_previous"
            raise ValueError(
                f"leaf {paths.show(path)} has a gradient but no entry in {lacks}; "
                "gradients, grad_at_previous and the params of tx.init are trees of one "
                "form"
            )
        if not jnp.shape(new) == jnp.shape(earlier[path]) == jnp.shape(olds[path]):
            raise ValueError(
                f"leaf {paths.show(path)}: the gradient has shape {jnp.shape(new)}, "
                f"grad_at_previous {jnp.shape(earlier[path])} and the state "
                f"{jnp.shape(olds[path])}; all three are of the leaf's shape"
            )
    wide = {
        path: estimate(
            jnp.asarray(new, olds[path].dtype),
            jnp.asarray(earlier[path], olds[path].dtype),
            olds[path],
        )
        for path, new in news.items()
    }
    answer = {p: lax.convert_element_type(wide[p], new.dtype) for p, new in news.items()}
    return paths.unflatten(treedef, answer), paths.unflatten(
        structure, {path: wide.get(path, old) for path, old in olds.items()}
    )
