"""Copies of the weights that stay equal to the bit by messages of a few kilobytes.

``pip install 'raclora-jax[follow]'``. Trainer and followers do the same thing: they hold
weights and a ``Position``, and ``apply`` each message. ``encode`` makes one of an update
in factor form, ``encode_fused`` of a fused step.

Read in this order: ``_position``, ``_message`` (the wire format), ``_numbers`` (fewer
bits), ``_size``, ``_sketches`` and ``_exact`` (why the bits are the same), ``_checks``,
``_encode``, ``_fused`` and ``_apply``, ``_log``.
"""

from raclora_jax.follow._apply import apply, join, passed
from raclora_jax.follow._encode import encode
from raclora_jax.follow._fused import encode_fused
from raclora_jax.follow._log import Log
from raclora_jax.follow._position import Position, start
from raclora_jax.follow._size import message_bytes

__all__ = [
    "Log",
    "Position",
    "apply",
    "encode",
    "encode_fused",
    "join",
    "message_bytes",
    "passed",
    "start",
]
