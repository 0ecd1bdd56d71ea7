"""The paper's theory: rates, constants, and a certificate for a run.

A rate is a frozen object of plain numbers, with the ``largest_step`` that it allows and a
``bound`` that refuses a larger one: ``Gd``, ``GdPl``, ``Sgd``, ``SgdPl``, ``Page``,
``Mvr``, ``Marina``, ``Ef21``, ``FedRacLora``, ``Orthogonal`` and ``BlockPl``.
``lambdas``, ``smoothness`` and ``lazy_check`` measure what they need. ``certify`` looks
at a run link by link, and ``report`` says what broke.

Read in this order: ``_descent`` (the inequality that carries every rate), then
``_variance_reduced``, ``_compressed``, ``_local`` and ``_steps``, a family of rates each;
``_lambda``, ``_smoothness`` and ``_lazy`` measure; ``_captured`` is what ``_certificate``
judges and ``_report`` shows. ``_numbers`` has the range of every constant.
"""

from raclora_jax.theory._captured import Captured, captured, captured_by_probe, probe
from raclora_jax.theory._certificate import Certificate, certify
from raclora_jax.theory._compressed import Ef21, Marina
from raclora_jax.theory._descent import Gd, GdPl, Sgd, SgdPl, gamma_of
from raclora_jax.theory._lambda import (
    bernoulli_lambda,
    draws_for,
    estimate_lambda,
    lambdas,
)
from raclora_jax.theory._lazy import capacity_rank, lazy_check, ntk_rank
from raclora_jax.theory._local import FedRacLora
from raclora_jax.theory._report import report
from raclora_jax.theory._smoothness import smoothness
from raclora_jax.theory._steps import BlockPl, Orthogonal
from raclora_jax.theory._variance_reduced import Mvr, Page

__all__ = [
    "BlockPl",
    "Captured",
    "Certificate",
    "Ef21",
    "FedRacLora",
    "Gd",
    "GdPl",
    "Marina",
    "Mvr",
    "Orthogonal",
    "Page",
    "Sgd",
    "SgdPl",
    "bernoulli_lambda",
    "capacity_rank",
    "captured",
    "captured_by_probe",
    "certify",
    "draws_for",
    "estimate_lambda",
    "gamma_of",
    "lambdas",
    "lazy_check",
    "ntk_rank",
    "probe",
    "report",
    "smoothness",
]
