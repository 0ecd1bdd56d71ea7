"""The certificate: at the end of a link, whether it did what the theory asks of it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._core.types import Scalar
from raclora_jax.theory._captured import Captured
from raclora_jax.theory._numbers import check_not_negative

# A score below it is no chance: 3e-5 for one look at a normal one.
THRESHOLD = -4.0
# Rounding of a loss, in units in the last place; standard errors of a measured one.
_ULPS, _ERRORS = 8, 4


class Certificate(NamedTuple):
    """What one link did, and the coverage of all links so far: plain arrays.

    Attributes:
      links: int32 scalar, links certified so far, this one included.
      loss_before: Loss at the start of the link.
      loss_after: Loss at its end, on the same data.
      guaranteed: ``learning_rate / 2 * energy``, the descent that the theory asks for.
      tolerance: What rounding and noise may take from it.
      share: ``{path: share}`` of the gradient that this link's sketch held.
      lam: ``{path: lambda}``, the mean that the law promises.
      excess: ``{path: sum of share - lambda}`` over the links so far.
      variance: ``{path: sum of the variances}`` of these.
      z: ``{path: excess / sqrt(variance)}``, in standard deviations.
      z_together: The same of all leaves as one, each in units of its lambda.
      finite: Whether every number of this link was.
      descends: Whether this link's loss fell as it should.
      covers: Whether no z is at the threshold of -4 or below, nor that of all leaves.
    """

    links: Array
    loss_before: Array
    loss_after: Array
    guaranteed: Array
    tolerance: Array
    share: dict[str, Array]
    lam: dict[str, Array]
    excess: dict[str, Array]
    variance: dict[str, Array]
    z: dict[str, Array]
    z_together: Array
    finite: Array
    descends: Array
    covers: Array

    @property
    def sound(self) -> Array:
        """Whether this link is finite, descends, and the links so far cover."""
        return self.finite & self.descends & self.covers


def certify(
    previous: Certificate | None,
    seen: Captured,
    *,
    loss_before: Scalar,
    loss_after: Scalar,
    learning_rate: Scalar,
    noise: Scalar = 0.0,
) -> Certificate:
    """Certifies a link that has ended: descent, coverage, and that all is finite.

    *Descent*: ``f(W+) <= f(W) - learning_rate / 2 * energy``, which is
    ``f(W) - gamma/2 |H G|^2`` with ``gamma = learning_rate * scaling^2 <= 1 / L``. It
    holds for plain SGD inside, for one step and for more on the same data, and fails
    where the step is too large. It does not notice a sketch that never changes: what is
    asked for shrinks with what is left to gain.

    *Coverage*: the mean share of the gradient that the sketches held, against lambda. z
    counts in standard deviations over the links so far, each with the variance it has
    given its gradient. A sketch that stays, or a law that leaves directions out, drives z
    down without end; a sound run is below -4 with a probability of about 3e-5 at a look.
    Sketches of the leaves are independent, so their sum tells of a fault that all share
    after a few links.

    Args:
      previous: The certificate of the link before, ``None`` for the first.
      seen: ``captured(...)`` or ``captured_by_probe(...)`` at the start of the link.
      loss_before: Loss at the start of the link, scalar.
      loss_after: Loss at its end, on the same data.
      learning_rate: That of the link, with ``optax.identity()`` inside; 0 asks only that
        the loss does not rise, for other inner rules.
      noise: Standard error of ``loss_after - loss_before`` where both come from a part
        of the data; four of them are forgiven.

    Returns:
      The certificate, for logging and for the next link. Runs under ``jit`` and ``scan``.

    Raises:
      ValueError: If ``learning_rate`` or ``noise`` is negative or not finite, or the
        leaves are not those of ``previous``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from raclora_jax.theory import captured
      >>> W, spec = jnp.ones((6, 4)), rl.Spec(2)
      >>> S = rl.sample_sketch(W, spec, key=0)
      >>> seen = captured(W, S, spec)  # of f = |W|^2 / 2, where L is 1
      >>> after = W - rl.lift(rl.project(W, S, spec), S, W, spec)
      >>> f = lambda W: jnp.sum(W**2) / 2
      >>> link = certify(
      ...     None, seen, loss_before=f(W), loss_after=f(after), learning_rate=1.0
      ... )
      >>> bool(link.sound)
      True

    References:
      The descent is that of Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Section 5; the test of coverage is ours.
    """
    for name, value in (("learning_rate", learning_rate), ("noise", noise)):
        if not isinstance(value, jax.core.Tracer):
            check_not_negative(**{name: float(value)})
    before, after = _floating(loss_before), _floating(loss_after)
    guaranteed = jnp.asarray(learning_rate, seen.energy.dtype) / 2 * seen.energy
    size = jnp.maximum(jnp.abs(before), jnp.abs(after))
    ulps = _ULPS * float(jnp.finfo(before.dtype).eps) * size
    tolerance = ulps + _ERRORS * jnp.asarray(noise, ulps.dtype)
    known = {path: jnp.isfinite(share) for path, share in seen.share.items()}
    numbers = jnp.stack([before, after, seen.energy.astype(before.dtype)])
    finite = jnp.all(jnp.isfinite(numbers)) & jnp.all(jnp.array([*known.values()]))
    excess, variance = _summed(previous, seen, known)
    z = {path: excess[path] / jnp.sqrt(variance[path]) for path in excess}
    together = _together(excess, variance, seen.lam)
    scores = jnp.array([*z.values(), together])
    links = jnp.zeros((), jnp.int32) if previous is None else previous.links
    return Certificate(
        links=links + 1,
        loss_before=before,
        loss_after=after,
        guaranteed=guaranteed,
        tolerance=tolerance,
        share=seen.share,
        lam=seen.lam,
        excess=excess,
        variance=variance,
        z=z,
        z_together=together,
        finite=finite,
        descends=after - before <= tolerance - guaranteed.astype(before.dtype),
        covers=jnp.all(scores > THRESHOLD),
    )


def _floating(loss: Scalar) -> Array:
    array = jnp.asarray(loss)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)


def _summed(
    previous: Certificate | None, seen: Captured, known: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Excess and variance over the links so far; a link that is not finite adds none."""
    if previous is not None and previous.excess.keys() != seen.share.keys():
        odd = sorted(previous.excess.keys() ^ seen.share.keys())
        raise ValueError(
            f"previous and this link differ in the leaves {odd}: certify a run with one "
            "spec and one tree, or start again from None"
        )
    excess, variance = {}, {}
    for path, share in seen.share.items():
        more = jnp.where(known[path], share - seen.lam[path], 0)
        spread = jnp.where(known[path], seen.variance[path], 0)
        if previous is None:
            # A first link that is not finite adds no variance: z is then 0 and not 0 / 0.
            tiny = jnp.finfo(spread.dtype).tiny
            excess[path], variance[path] = more, jnp.maximum(spread, tiny)
        else:
            excess[path] = previous.excess[path] + more
            variance[path] = previous.variance[path] + spread
    return excess, variance


def _together(
    excess: dict[str, Array], variance: dict[str, Array], lam: dict[str, Array]
) -> Array:
    """The score of all leaves: a sum of independent numbers, in units of lambda."""
    total = jnp.array([excess[path] / lam[path] for path in excess])
    spread = jnp.array([variance[path] / lam[path] ** 2 for path in variance])
    return jnp.sum(total) / jnp.sqrt(jnp.sum(spread))
