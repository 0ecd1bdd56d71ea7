"""What plain numbers must satisfy before a formula is worth computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raclora_jax._core import checks

# A step computed from the same numbers may round to just above the largest one.
_ROUNDING = 1e-9


def check_positive(**values: float) -> None:
    """Refuses what is not above zero."""
    for name, value in values.items():
        checks.number(name, value, checks.POSITIVE)


def check_not_negative(**values: float) -> None:
    """Refuses what is below zero."""
    for name, value in values.items():
        checks.number(name, value, checks.NOT_NEGATIVE)


def check_probability(**values: float) -> None:
    """Refuses what is outside [0, 1]."""
    for name, value in values.items():
        checks.number(name, value, checks.PROBABILITY)


def check_fraction(**values: float) -> None:
    """Refuses what is outside (0, 1]."""
    for name, value in values.items():
        checks.number(name, value, checks.SHARE)


def check_lam(lam: float) -> None:
    """Refuses a smallest eigenvalue outside (0, 1]."""
    way_out = (
        "it is the smallest eigenvalue of the mean projector, and a law with lam = 0 "
        "never trains some direction"
    )
    checks.number("lam", lam, checks.SHARE, way_out=way_out)


def check_lam_max(lam_max: float | None) -> None:
    """Refuses a largest eigenvalue outside (0, 1]; None stands for the smallest one."""
    if lam_max is not None:
        check_fraction(lam_max=lam_max)


def check_count(**values: int) -> None:
    """Refuses what is no int of at least 1."""
    for name, value in values.items():
        checks.count(name, value)


def check_step(gamma: float, largest: float, name: str = "gamma") -> None:
    """Refuses a step above what the bound allows."""
    check_positive(**{name: gamma})
    if gamma > largest * (1 + _ROUNDING):
        raise ValueError(
            f"{name} = {gamma:g} is above {largest:g}, the largest step for which this "
            "bound holds"
        )


# A name means the same in every rate, so its range is said once.
_NAMES: dict[Callable[..., None], str] = {
    check_positive: "smoothness sample_smoothness mu target eta",
    check_not_negative: "gap variance start_error compression captured dissimilarity",
    check_fraction: "refresh weight contraction",
    check_lam: "lam",
    check_lam_max: "lam_max",
    check_count: "links cycles batch clients local_steps dim rank",
}
_CHECKS = {name: check for check, names in _NAMES.items() for name in names.split()}


def check_range(**values: Any) -> None:
    """Refuses numbers of a rate that are outside the range of their name."""
    for name, value in values.items():
        _CHECKS[name](**{name: value})


def check_order(constants: Mapping[str, Any]) -> None:
    """Refuses constants of a rate that contradict each other."""
    lam, lam_max = constants.get("lam"), constants.get("lam_max")
    if lam_max is not None and lam_max < lam:
        raise ValueError(f"lam_max must be between lam = {lam} and 1, got {lam_max}")
    smoothness = constants["smoothness"]
    mu = constants.get("mu", smoothness)
    if mu > smoothness * (1 + _ROUNDING):
        raise ValueError(
            f"mu = {mu:g} is above smoothness = {smoothness:g}: no function has that"
        )
    sample_smoothness = constants.get("sample_smoothness", smoothness)
    if sample_smoothness < smoothness * (1 - _ROUNDING):
        raise ValueError(
            f"sample_smoothness = {sample_smoothness:g} is below smoothness = "
            f"{smoothness:g}: a mean is at least as smooth as the root mean square of "
            "its members"
        )
