"""What clients train and how a server makes one model of it: one frozen object each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax import Array, lax

from raclora_jax._core import checks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.select import PICKING_LAWS
from raclora_jax._core.spec import Rule, Spec, as_spec, check_side_is_fixed
from raclora_jax.federated._messages import Arrays, Trained
from raclora_jax.federated._pairs import residual, truncated

Plans = dict[str, LeafPlan]
# (plans, stacked messages, weights that sum to 1) -> (what is trained, residual)
Combine = Callable[[Plans, Trained, Array], tuple[Trained, Arrays]]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What the clients of a federation train and how the server aggregates it.

    Frozen and hashable: a static argument of ``jax.jit``. Made by ``raclora``,
    ``fedavg``, ``ffa_lora``, ``fedit``, ``fedex`` and ``flexlora``.

    Args:
      name: Its name, part of the stamp.
      spec: Which leaves are adapted, and how.
      combine: The aggregation rule.
      rounds_per_link: Rounds until the factors are merged and a new sketch is drawn;
        ``None`` for never.
      pair: Whether both factors are trained.
      any_rank: Whether a client may send factors of a smaller rank than the spec's.
    """

    name: str
    spec: Spec
    combine: Combine
    rounds_per_link: int | None
    pair: bool
    any_rank: bool = False

    def __post_init__(self) -> None:
        check_side_is_fixed(self.spec, "a message carries one factor a leaf")


def raclora(spec: Spec | int, *, rounds_per_link: int = 1) -> Strategy:
    """Fed-RAC-LoRA: a sketch shared by all, one factor trained, the mean merged.

    ``W <- W + lift(sum_j w_j F_j)``: with one sketch S for all clients the mean of the
    products is the product with the mean, exactly. The sketch is a function of (key,
    link), so only factors travel. The paper states the algorithm without details; the
    order of these steps is our reading of it.

    Args:
      spec: A ``Spec`` or a rank; ``resample_every`` plays no part.
      rounds_per_link: Rounds that share a sketch.

    Returns:
      A ``Strategy``.

    Raises:
      TypeError: If ``rounds_per_link`` is not an int.
      ValueError: If it is not positive, or a side is drawn.

    Example:
      >>> raclora(4).rounds_per_link
      1

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024.
    """
    rounds = checks.count("rounds_per_link", rounds_per_link)
    return Strategy("raclora", as_spec(spec), mean_rule, rounds, pair=False)


def fedavg(spec: Spec | int) -> Strategy:
    """FedAvg of the weights: every leaf trained in full, differences averaged.

    Args:
      spec: Leaves that its rules freeze stay frozen; all others are dense.

    Returns:
      A ``Strategy``.

    Raises:
      ValueError: If the spec freezes its rest: rules alone say what stays frozen.

    Example:
      >>> fedavg(1).spec.rules[-1].mode
      'dense'

    References:
      McMahan et al., `Communication-Efficient Learning of Deep Networks from
      Decentralized Data <https://arxiv.org/abs/1602.05629>`_, 2017.
    """
    spec = as_spec(spec)
    if spec.rest == "frozen":
        raise ValueError(
            "rest='frozen' goes by the shape of a leaf, and FedAvg trains every leaf "
            "that no rule freezes; freeze leaves by Rule(..., mode='frozen')"
        )
    rules = [
        rule if rule.mode == "frozen" else Rule(rule.path, mode="dense")
        for rule in spec.rules
    ]
    spec = dataclasses.replace(spec, rules=[*rules, Rule(".*", mode="dense")])
    return Strategy("fedavg", spec, mean_rule, 1, pair=False)


def ffa_lora(spec: Spec | int) -> Strategy:
    """FFA-LoRA: one factor drawn once and never trained, the other averaged.

    Fed-RAC-LoRA with one endless link.

    Args:
      spec: A ``Spec`` or a rank.

    Returns:
      A ``Strategy``.

    Example:
      >>> ffa_lora(4).rounds_per_link is None
      True

    References:
      Sun et al., `Improving LoRA in Privacy-preserving Federated Learning
      <https://arxiv.org/abs/2403.12313>`_, 2024.
    """
    return Strategy("ffa_lora", as_spec(spec), mean_rule, None, pair=False)


def fedit(spec: Spec | int) -> Strategy:
    """FedIT: both factors trained, each averaged on its own.

    The product of the means is not the mean of the products; what it misses is the
    residual that ``fedex`` adds.

    Args:
      spec: A ``Spec`` or a rank; ``side`` is the side of the factor that starts random.

    Returns:
      A ``Strategy``.

    Raises:
      ValueError: If the law picks rows: its sketches are no arrays to train.

    Example:
      >>> fedit(4).pair
      True

    References:
      Zhang et al., `Towards Building the Federated GPT
      <https://arxiv.org/abs/2305.05644>`_, 2023.
    """
    return Strategy("fedit", _pair_spec(spec), mean_rule, None, pair=True)


def fedex(spec: Spec | int) -> Strategy:
    """FedEx-LoRA: FedIT, and what it misses is added to the weights every round.

    The residual ``sum_j w_j lift(F_j - F, S_j - S)``, with F and S the means, travels
    down as stacked factors, or dense where that is smaller.

    Args:
      spec: As in ``fedit``.

    Returns:
      A ``Strategy``.

    Raises:
      ValueError: As in ``fedit``.

    Example:
      >>> fedex(4).name
      'fedex'

    References:
      Singhal et al., `FedEx-LoRA <https://arxiv.org/abs/2410.09432>`_, 2024.
    """
    return Strategy("fedex", _pair_spec(spec), _mean_and_residual, None, pair=True)


def flexlora(spec: Spec | int) -> Strategy:
    """FlexLoRA: the mean of the products, truncated to the rank by an SVD.

    The SVD is of a core of size K rank, through QR of the stacked factors. A client may
    have any smaller rank (``client_update(..., rank=)``): it takes the leading
    components. The singular values are split evenly between the factors.

    Args:
      spec: As in ``fedit``; its ranks are those of the largest client.

    Returns:
      A ``Strategy``.

    Raises:
      ValueError: As in ``fedit``.

    Example:
      >>> flexlora(4).any_rank
      True

    References:
      Bai et al., `Federated Fine-tuning of Large Language Models under Heterogeneous
      Tasks and Client Resources <https://arxiv.org/abs/2402.11505>`_, 2024.
    """
    spec = _pair_spec(spec)
    return Strategy("flexlora", spec, _truncated, None, pair=True, any_rank=True)


def _pair_spec(spec: Spec | int) -> Spec:
    spec = as_spec(spec)
    for law in (spec.sketch, *(rule.sketch for rule in spec.rules)):
        if law in PICKING_LAWS:
            raise ValueError(
                f"sketch={law!r} picks rows, and a strategy that trains both factors "
                "needs arrays; use sketch='orthonormal'"
            )
    # Both factors live in the state, whatever a spec says of drawing sketches anew.
    return dataclasses.replace(spec, cache=True)


def mean_rule(plans: Plans, stacked: Trained, weights: Array) -> tuple[Trained, Arrays]:
    def mean(array: Array) -> Array:
        # weights (clients,), array (clients, ...). By default a TPU multiplies in
        # bfloat16, and factors would come back with 8 bits.
        dims = (((0,), (0,)), ((), ()))
        return lax.dot_general(
            weights.astype(array.dtype), array, dims, precision=lax.Precision.HIGHEST
        )

    return jax.tree.map(mean, stacked), {}


def _mean_and_residual(
    plans: Plans, stacked: Trained, weights: Array
) -> tuple[Trained, Arrays]:
    mean, _ = mean_rule(plans, stacked, weights)
    centred = jax.tree.map(lambda all_, one: all_ - one, stacked, mean)
    missed = {
        path: residual(centred.factors[path], sketches, weights, plans[path])
        for path, sketches in centred.sketches.items()
    }
    return mean, missed


def _truncated(plans: Plans, stacked: Trained, weights: Array) -> tuple[Trained, Arrays]:
    mean, _ = mean_rule(plans, stacked, weights)
    factors, sketches = dict(mean.factors), {}
    for path, drawn in stacked.sketches.items():
        factors[path], sketches[path] = truncated(
            stacked.factors[path], drawn, weights, plans[path]
        )
    return Trained(factors, sketches), {}
