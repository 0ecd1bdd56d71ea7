"""Inner rules that are only compared: in the place of the polar factor of a factor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from raclora_jax._chain.inner import ADAM, OrthogonalState
from raclora_jax._core.whiten import polar_factor

HASHED, DECAY = 64, 0.95  # what a measured softness keeps
BETA = 0.9  # of a momentum

Rule = Callable[[], optax.GradientTransformation]


def rule_of(
    start: Callable[[Array], Any],
    step: Callable[[Array, Any], Any],
    head: optax.GradientTransformation = ADAM,
) -> Rule:
    """An inner rule of functions of one factor.

    Args:
      start: What is kept for an array ``(rank, n)``; a new link begins with it.
      step: ``step(factor, kept)``, the direction and what is kept.
      head: The rule of a head and its bias.
    """

    def init(params: Any) -> Any:
        return head.init(params) if _dense(params) else jax.tree.map(start, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if _dense(updates):
            return head.update(updates, state, params)
        found = {path: step(updates[path], state[path]) for path in updates}
        return tuple({path: found[path][i] for path in found} for i in (0, 1))

    return lambda: optax.GradientTransformation(init, update)


def matrix_rule(direction: Callable[[Array], Array]) -> Rule:
    """An inner rule of a function of one factor, as long as the polar factor is.

    Args:
      direction: Of an array ``(rank, n)``.
    """

    def step(factor: Array, kept: Any) -> tuple[Array, Any]:
        return _sized(direction(factor)), kept

    return rule_of(lambda factor: (), step)


def _sized(found: Array) -> Array:
    """Of root mean square 1, as the polar factor."""
    length = jnp.linalg.norm(found)
    return found * jnp.sqrt(1.0 * found.size) / jnp.where(length > 0, length, 1)


def _dense(tree: Any) -> bool:
    """Whether it is what the head trains, and not factors."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return any("head" in jax.tree_util.keystr(path) for path, _ in leaves)


def _spectral(change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``f(F F^T)^(-1/2) F`` by the eigenvalues of the Gram matrix."""

    def direction(factor: Array) -> Array:
        gram = jnp.matmul(factor, factor.T, precision="highest")
        values, vectors = jnp.linalg.eigh(gram)
        values = jnp.maximum(values, 1e-10 * values[-1:])
        roots = jnp.where(values > 0, change(values), 0)
        return (vectors * roots) @ (vectors.T @ factor)

    return direction


def soft(kappa: float) -> Rule:
    """``(F F^T + kappa |F|^2 / rank I)^(-1/2) F``."""
    return matrix_rule(_spectral(lambda s: (s + kappa * s.mean()) ** -0.5))


def power(p: float) -> Rule:
    """``(F F^T)^((p - 1) / 2) F``: the polar factor at 0, the gradient at 1."""
    return matrix_rule(_spectral(lambda s: s ** ((p - 1) / 2)))


def mixed(share: float) -> Rule:
    """``(1 - s) msign(F) + s sqrt(rank) F / |F|``."""

    def direction(factor: Array) -> Array:
        length = jnp.linalg.norm(factor)
        along = factor * jnp.sqrt(1.0 * min(factor.shape)) / jnp.where(length, length, 1)
        return (1 - share) * polar_factor(factor, 0) + share * along

    return matrix_rule(direction)


def equal_rows() -> optax.GradientTransformation:
    """Rows of one length, then the polar factor: SWAN, https://arxiv.org/abs/2412.13148."""

    def direction(factor: Array) -> Array:
        lengths = jnp.linalg.norm(factor, axis=1, keepdims=True)
        return polar_factor(factor / jnp.where(lengths > 0, lengths, 1), 0)

    return matrix_rule(direction)()


def half_batches(gain: float) -> Rule:
    """``(F F^T + g^2 D D^T)^(-1/2) F`` of the gradients of two half batches.

    They come one after the other, and every second call is a step: ``F`` is half their
    sum and ``D`` half their difference, of which the noise of ``F`` is expected to be as
    long. A head gets Adam on the mean.

    Args:
      gain: ``g``; at 0 it is the polar factor of the whole batch.
    """

    def step(factor: Array, kept: tuple[Array, Array]) -> tuple[Array, Any]:
        first, second = kept
        mean, apart = (first + factor) / 2, gain * (first - factor) / 2
        whitened = polar_factor(jnp.concatenate([mean, apart], axis=1), 0)
        found = _sized(whitened[:, : factor.shape[1]])
        return jnp.where(second, found, 0), (factor, ~second)

    def start(factor: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(factor), jnp.zeros((), bool)

    return rule_of(start, step, optax.MultiSteps(ADAM, 2).gradient_transformation())


def prism() -> optax.GradientTransformation:
    """``(M M^T + D D^T)^(-1/2) M`` with ``M`` the momentum and ``D = F - M``: PRISM.

    With its damping at 1, and the momentum free of its bias towards zero, since links
    begin it again.

    References:
      Yang, `PRISM <https://arxiv.org/abs/2602.03096>`_, 2026.
    """

    def step(factor: Array, kept: tuple[Array, Array]) -> tuple[Array, Any]:
        count = kept[1] + 1
        mean = BETA * kept[0] + (1 - BETA) * factor
        now = mean / (1 - BETA**count)
        both = jnp.concatenate([now, factor - now], axis=1)
        whitened = polar_factor(both, 0)[:, : factor.shape[1]]
        return whitened * max(factor.shape) ** 0.5, (mean, count)

    return rule_of(lambda factor: (jnp.zeros_like(factor), jnp.zeros(())), step)()


def variance_scaled() -> optax.GradientTransformation:
    """The polar factor of a momentum over its entries' deviation: Muon-VS.

    ``M' = F + b / (1 - b) mean(F)`` is divided, entry by entry, by the root of the
    variance of ``F`` around its running mean; the first step of a link has none, and
    takes the polar factor of ``F``.

    References:
      Li et al., `Variance-Adaptive Muon <https://arxiv.org/abs/2601.14603>`_, 2026.
    """

    def step(factor: Array, kept: tuple[Array, Array, Array]) -> tuple[Array, Any]:
        mean, variance, count = kept
        variance = BETA * (variance + (1 - BETA) * (mean - factor) ** 2)
        mean, count = BETA * mean + (1 - BETA) * factor, count + 1
        unbiased = 1 - BETA**count
        ahead = factor + BETA / (1 - BETA) * mean / unbiased
        root = jnp.sqrt(variance / unbiased)
        scaled = ahead / jnp.where((count > 1) & (root > 0), root, 1)
        return polar_factor(scaled, 0) * max(factor.shape) ** 0.5, (mean, variance, count)

    def start(factor: Array) -> tuple[Array, Array, Array]:
        return jnp.zeros_like(factor), jnp.zeros_like(factor), jnp.zeros(())

    return rule_of(start, step)()


def measured() -> optax.GradientTransformation:
    """A soft polar factor, as soft as the gradients of a link disagree.

    Two batches' gradients have the signal in common, ``p = E <F_k, F_{k+1}>``, and one
    has the noise, too, ``q = E |F|^2``. With ``t = (q - p) / p`` it is
    ``sqrt(1 + t) (F F^T + t q / rank I)^(-1/2) F``: the polar factor where all is signal,
    linear in ``F`` where all is noise. A leaf keeps ``p``, ``q`` and 64 sums of its last
    gradient's entries with signs, whose products are those of gradients in expectation.
    """

    def init(params: Any) -> OrthogonalState:
        none, zero = {}, jnp.zeros((), jnp.int32)
        if _dense(params):
            return OrthogonalState(ADAM.init(params), none, zero, none, zero, none, none)
        # By the names of fields: a new link forgets the last gradient, not the means.
        last = {path: jnp.zeros(HASHED) for path in params}
        means = {path: jnp.zeros(2) for path in params}
        return OrthogonalState((), last, zero, means, zero, none, none)

    def update(
        updates: Any, state: OrthogonalState, params: Any = None
    ) -> tuple[Any, OrthogonalState]:
        del params
        if _dense(updates):
            answer, adam = ADAM.update(updates, state.adam)
            return answer, state._replace(adam=adam)
        hashed = {path: _hashed(factor) for path, factor in updates.items()}
        follows = state.seen > 0
        count = state.count + follows
        answer, means = {}, {}
        for path, factor in updates.items():
            own = hashed[path]
            now = jnp.stack([own @ state.momentum[path], own @ own])
            old = state.second_moment[path]
            means[path] = jnp.where(follows, DECAY * old + (1 - DECAY) * now, old)
            p, q = means[path] / jnp.where(count, 1 - DECAY**count, 1)
            signal = jnp.where(q > 0, jnp.clip(p / jnp.where(q > 0, q, 1), 1e-3, 1), 1)
            ratio = (1 - signal) / signal
            soft = functools.partial(_softened, ratio, ratio * q / len(factor))
            answer[path] = _spectral(soft)(factor) * max(factor.shape) ** 0.5
        new = state._replace(
            momentum=hashed, second_moment=means, count=count, seen=state.seen + 1
        )
        return answer, new

    return optax.GradientTransformation(init, update)


def _softened(ratio: Array, floor: Array, squares: Array) -> Array:
    return jnp.sqrt((1 + ratio) / (squares + floor))


def _hashed(factor: Array) -> Array:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], factor.shape)
    signed = jnp.ravel(factor * signs.astype("f"))
    return jnp.pad(signed, (0, -len(signed) % HASHED)).reshape(-1, HASHED).sum(0)
