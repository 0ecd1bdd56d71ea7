"""Fed-RAC-LoRA and its rivals: pure functions for clients and server, one interface.

A round is one exchange. In Fed-RAC-LoRA it is a link of the chain: all clients draw the
same sketch from (key, link), train the factor and send it; the server merges the mean and
sends that. Simulated and real clients call the same functions.

Read in this order: ``_messages`` (what travels), ``_strategies`` (what is trained, and
how one model is made of it; ``_pairs`` is its algebra), ``_state`` (how a step moves a
run), then the way up, ``_client`` and ``_aggregate``, and the way down, ``_server``.
``_krso`` is a strategy with a local rule of its own.
``_checks`` says what is refused, ``_robust`` and ``_privacy`` are other means, and
``_compression`` stands alone.
"""

from raclora_jax.federated._aggregate import aggregate, combine
from raclora_jax.federated._client import Local, client_update, client_updates
from raclora_jax.federated._compression import (
    Compression,
    Sparse,
    compress,
    ef21,
    estimate,
    is_full,
    marina,
    qgd,
)
from raclora_jax.federated._krso import fedkrso, one_seed
from raclora_jax.federated._messages import (
    Drop,
    Message,
    RoundLog,
    State,
    Step,
    Trained,
    nbytes,
)
from raclora_jax.federated._privacy import Privacy, epsilon
from raclora_jax.federated._robust import Robust, bounded_mean, median, trimmed_mean
from raclora_jax.federated._server import (
    replay,
    sample_clients,
    server_init,
    server_step,
)
from raclora_jax.federated._state import init, params_of, stamp_of
from raclora_jax.federated._strategies import (
    Strategy,
    fedavg,
    fedex,
    fedit,
    ffa_lora,
    flexlora,
    raclora,
)

__all__ = [
    "Compression",
    "Drop",
    "Local",
    "Message",
    "Privacy",
    "Robust",
    "RoundLog",
    "Sparse",
    "State",
    "Step",
    "Strategy",
    "Trained",
    "aggregate",
    "bounded_mean",
    "client_update",
    "client_updates",
    "combine",
    "compress",
    "ef21",
    "epsilon",
    "estimate",
    "fedavg",
    "fedex",
    "fedit",
    "fedkrso",
    "ffa_lora",
    "flexlora",
    "init",
    "is_full",
    "marina",
    "median",
    "nbytes",
    "one_seed",
    "params_of",
    "qgd",
    "raclora",
    "replay",
    "sample_clients",
    "server_init",
    "server_step",
    "stamp_of",
    "trimmed_mean",
]
