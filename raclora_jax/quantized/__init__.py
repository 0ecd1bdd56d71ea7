"""Quantised bases: weights held in a few bits, merged into without losing small steps.

The sum of a quantised weight and the update of a link falls between two codes, and
rounded to the nearest an update below half a step would vanish, link after link. So the
rounding error is carried: with ``e`` the error of the last merge,

    ``W' = Q(W + e + lift(F))``,   ``e' = W + e + lift(F) - W'``.

The error is held in 8 bits, in units of the largest of its block, and brought to them by
drawing a neighbour, so that what it cannot hold is right on average. It is read once a
link and by no step: between merges it may lie in the memory of the host.

Read in this order: ``_codes`` (one leaf: its codes, and its error in codes), ``_merge``
(a tree, from ``quantize`` over ``next_link`` to ``exact_params``).

References:
  Seide et al., `1-Bit Stochastic Gradient Descent
  <https://doi.org/10.21437/Interspeech.2014-274>`_, 2014, for error feedback; Dettmers
  et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, for nf4 and low-rank
  training beside it. The code of the error is our own.
"""

from raclora_jax._extras import extra

with extra("quantized"):
    from raclora_jax.quantized._merge import (
        Held,
        exact_params,
        held,
        merge,
        next_link,
        quantize,
        zero_error,
    )

__all__ = [
    "Held",
    "exact_params",
    "held",
    "merge",
    "next_link",
    "quantize",
    "zero_error",
]
