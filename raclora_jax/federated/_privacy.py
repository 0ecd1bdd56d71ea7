"""Differential privacy of clients: clip what each trained, add noise to the mean."""

from __future__ import annotations

import dataclasses

import jax
import optax
from jax import Array
from optax import contrib

from raclora_jax._core import checks
from raclora_jax._core.keys import folded, key_data
from raclora_jax._core.types import KeyLike, PyTree
from raclora_jax._extras import extra
from raclora_jax.federated._messages import Trained
from raclora_jax.federated._robust import clipped


@dataclasses.dataclass(frozen=True)
class Privacy:
    """The Gaussian mechanism on the clients' factors.

    Args:
      clip: Largest norm of what one client trained in a round, over all its arrays.
      noise_multiplier: Standard deviation of the noise on the sum, in units of ``clip``.
      take: How many clients are asked in a round; the sum is divided by this, whoever
        answers.
      key: The server's secret key: who knows it can take the noise away.

    Raises:
      ValueError: If ``clip`` or ``take`` is not positive, the noise is negative, or one
        of them is not finite.
      TypeError: If one of them is no number, or ``take`` no int.
    """

    clip: float
    noise_multiplier: float
    take: int
    key: KeyLike

    def __post_init__(self) -> None:
        noise = self.noise_multiplier
        checks.number("Privacy: clip", self.clip, checks.POSITIVE)
        checks.number("Privacy: noise_multiplier", noise, checks.NOT_NEGATIVE)
        checks.count("Privacy: take", self.take)


def private_mean(moved: Trained, privacy: Privacy, round: Array | int) -> PyTree:
    """``(sum_j clip(F_j) + noise) / take`` by optax's own transformation.

    Args:
      moved: Arrays ``(clients, ...)``: what each client trained, less where it started.
      privacy: Clip and noise.
      round: The round; the noise is a function of (key, round).

    Returns:
      Arrays ``(...)``.
    """
    words = jax.numpy.asarray([[round]], jax.numpy.uint32)
    key = folded(key_data(privacy.key), words)[0]
    mechanism = contrib.differentially_private_aggregate(
        privacy.clip, privacy.noise_multiplier, key=key
    )
    # The mechanism squares what it clips: numbers above 1e19 would weigh nothing.
    moved = clipped(moved, privacy.clip)
    leaves = jax.tree.leaves(moved)
    start = jax.tree.map(lambda leaf: leaf[0], moved)
    mean, _ = mechanism.update(moved, mechanism.init(start), start)
    # optax divides by the clients that answered. How many did may tell of one of them,
    # and the noise does not cover that.
    share = leaves[0].shape[0] / privacy.take
    return optax.tree.scale(share, mean)


def epsilon(privacy: Privacy, *, clients: int, rounds: int, delta: float) -> float:
    """What the rounds of a run have spent, for clients sampled without replacement.

    Two federations are neighbours if they differ in one client's data, which moves the
    sum by at most ``2 clip``. By ``dp-accounting``'s Renyi accountant.

    Args:
      privacy: Clip and noise of every round.
      clients: How many clients there are; ``privacy.take`` of them are asked in a round.
      rounds: How many rounds were run.
      delta: The probability the guarantee may fail with.

    Returns:
      epsilon of (epsilon, delta)-differential privacy.

    Raises:
      ImportError: Without ``dp-accounting`` (``pip install 'raclora-jax[privacy]'``).

    Example:
      >>> privacy = Privacy(clip=1.0, noise_multiplier=4.0, take=10, key=0)
      >>> few = epsilon(privacy, clients=1000, rounds=10, delta=1e-5)
      >>> few < epsilon(privacy, clients=1000, rounds=100, delta=1e-5)
      True

    References:
      McMahan et al., `Learning Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, 2018; Wang et al., `Subsampled Renyi
      Differential Privacy <https://arxiv.org/abs/1808.00087>`_, 2019.
    """
    with extra("privacy"):
        import dp_accounting
        from dp_accounting import rdp

    neighbours = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=neighbours)
    # The accountant's multiplier is in units of the sensitivity, 2 clip; ours of clip.
    noise = dp_accounting.GaussianDpEvent(privacy.noise_multiplier / 2)
    event = dp_accounting.SampledWithoutReplacementDpEvent(clients, privacy.take, noise)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))
