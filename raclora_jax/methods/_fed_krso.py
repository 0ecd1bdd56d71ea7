"""FedKRSO, one client of it: a chain whose sketches come from a few shared seeds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import checks
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike
from raclora_jax.methods._method import Method
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Pieces
from raclora_jax.methods._rso import gaussian


def fed_krso(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec | int,
    *,
    seeds: int,
    links: int,
    inner: optax.GradientTransformation | None = None,
    key: KeyLike,
) -> Method:
    """FedKRSO with one client: ``rso`` whose P come from a few seeds a round.

    There is no proximal term.     A round has ``links`` links and its own seeds; each
    link draws one of them, with replacement, and trains B from zero in it. The change of
    a round is then ``sum_k P_k B_k`` with B_k the sum over the links of seed k, which is
    all that a client sends: ``raclora_jax.federated.fedkrso`` is that, with many
    clients. With one client seeds matter only in that links of a round may share a
    subspace.

    From the abstract: that seeds are new in each round is unverified, and so is Adam.

    Args:
      learning_rate: A float or a schedule of the steps.
      spec: Which leaves, ranks and length of a link; its ``sketch`` is replaced, and it
        has no ``alpha``.
      seeds: K, how many subspaces a round has.
      links: How many links a round has.
      inner: Preconditioner without learning rate; Adam by default.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      A ``Method``.

    Raises:
      ValueError: If a count is below 1, or ``alpha`` is given.

    Example:
      >>> import jax.numpy as jnp
      >>> method = fed_krso(1e-3, Spec(2), seeds=4, links=8, key=0)
      >>> method.trained({"kernel": jnp.zeros((6, 4))})
      12

    References:
      Yang et al., `FedKRSO: Communication and Memory Efficient Federated Fine-Tuning of
      Large Language Models <https://arxiv.org/abs/2602.03019>`_, 2026.
    """
    checks.count("seeds", seeds)
    checks.count("links", links)
    data = key_data(key)

    def number(link: Array) -> Array:
        own = jax.random.fold_in(leaf_key(data, "seeds", ""), link)
        drawn = jax.random.randint(own, (), 0, seeds)
        return (link // links * seeds + drawn).astype(jnp.int32)

    pieces = Pieces(inner=inner, train_drawn=False, chain=True, number=number)
    return pair_method(learning_rate, gaussian(spec, "FedKRSO"), pieces, key=key)
