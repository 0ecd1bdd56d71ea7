"""Copies of the weights that stay equal to the bit by messages of a few kilobytes.

``pip install 'raclora-jax[follow]'``. Trainer and followers do the same thing: they hold
weights and a ``Position``, and ``apply`` each message. ``encode`` makes one of an update
in factor form, ``encode_fused`` of a fused step, ``encode_adapter`` of a run in the
adapter form, over quantised weights too.

Read in this order: ``_adapted`` (a run in the adapter form), ``_position``, ``_message``
(the wire format), ``_numbers`` (fewer bits), ``_size``, ``_sketches`` and ``_exact`` (why
the bits are the same), ``_checks``, ``_encode``, ``_fused``, ``_adapter`` and ``_apply``,
``_log``.
"""

from raclora_jax._extras import extra

with extra("follow"):
    from raclora_jax.follow._adapted import Adapted, begin, next_link
    from raclora_jax.follow._adapter import encode_adapter
    from raclora_jax.follow._apply import apply, join, passed
    from raclora_jax.follow._encode import encode
    from raclora_jax.follow._fused import encode_fused
    from raclora_jax.follow._log import Log
    from raclora_jax.follow._position import Position, start
    from raclora_jax.follow._size import message_bytes

__all__ = [
    "Adapted",
    "Log",
    "Position",
    "apply",
    "begin",
    "encode",
    "encode_adapter",
    "encode_fused",
    "join",
    "message_bytes",
    "next_link",
    "passed",
    "start",
]
