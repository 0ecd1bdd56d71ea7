"""The paper's theory as functions: rates, constants, and a certificate for a run.

Bounds take plain numbers and give plain numbers, each beside the largest step it allows:
``gd_nonconvex``, ``gd_pl``, ``links_for``, ``sgd_nonconvex``, ``sgd_pl``, ``page``,
``mvr``, ``marina``, ``ef21``, ``fed_link``, ``fed_nonconvex``, ``orthogonal_nonconvex``
and ``block_pl``. ``lambdas``, ``smoothness`` and ``lazy_check`` measure what they need.
``certify`` looks at a run link by link, and ``report`` says what broke.
"""

from raclora_jax.theory._captured import Captured, captured, captured_by_probe, probe
from raclora_jax.theory._certificate import Certificate, certify
from raclora_jax.theory._compressed import ef21, ef21_step, marina, marina_step
from raclora_jax.theory._descent import (
    gamma_of,
    gd_nonconvex,
    gd_pl,
    gd_step,
    links_for,
    sgd_nonconvex,
    sgd_pl,
    sgd_step,
)
from raclora_jax.theory._lambda import (
    bernoulli_lambda,
    draws_for,
    estimate_lambda,
    lambdas,
)
from raclora_jax.theory._lazy import capacity_rank, lazy_check, ntk_rank
from raclora_jax.theory._local import fed_link, fed_nonconvex, fed_step
from raclora_jax.theory._report import report
from raclora_jax.theory._smoothness import smoothness
from raclora_jax.theory._steps import block_pl, orthogonal_nonconvex, orthogonal_step
from raclora_jax.theory._variance_reduced import mvr, mvr_step, page, page_step

__all__ = [
    "Captured",
    "Certificate",
    "bernoulli_lambda",
    "block_pl",
    "capacity_rank",
    "captured",
    "captured_by_probe",
    "certify",
    "draws_for",
    "ef21",
    "ef21_step",
    "estimate_lambda",
    "fed_link",
    "fed_nonconvex",
    "fed_step",
    "gamma_of",
    "gd_nonconvex",
    "gd_pl",
    "gd_step",
    "lambdas",
    "lazy_check",
    "links_for",
    "marina",
    "marina_step",
    "mvr",
    "mvr_step",
    "ntk_rank",
    "orthogonal_nonconvex",
    "orthogonal_step",
    "page",
    "page_step",
    "probe",
    "report",
    "sgd_nonconvex",
    "sgd_pl",
    "sgd_step",
    "smoothness",
]
