"""What plain numbers must satisfy before a formula is worth computing."""

from __future__ import annotations

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


def check_lam(lam: float, lam_max: float | None = None) -> float:
    """The largest eigenvalue of the mean projector: ``lam`` where none is given."""
    way_out = (
        "it is the smallest eigenvalue of the mean projector, and a law with lam = 0 "
        "never trains some direction"
    )
    checks.number("lam", lam, checks.SHARE, way_out=way_out)
    if lam_max is None:
        return lam
    between = checks.Range(f"between lam = {lam} and 1", lambda x: lam <= x <= 1)
    checks.number("lam_max", lam_max, between)
    return lam_max


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


def check_sample_smoothness(smoothness: float, sample_smoothness: float) -> None:
    """Refuses samples or clients that are smoother than their mean."""
    check_positive(smoothness=smoothness, sample_smoothness=sample_smoothness)
    if sample_smoothness < smoothness * (1 - _ROUNDING):
        raise ValueError(
            f"sample_smoothness = {sample_smoothness:g} is below smoothness = "
            f"{smoothness:g}: a mean is at least as smooth as the root mean square of "
            "its members"
        )


def check_pl(gamma: float, mu: float, smoothness: float | None) -> None:
    """Refuses mu and L that contradict, and a step above 1 / L or 1 / mu."""
    check_positive(mu=mu)
    if smoothness is not None:
        check_positive(smoothness=smoothness)
        if mu > smoothness * (1 + _ROUNDING):
            raise ValueError(
                f"mu = {mu:g} is above smoothness = {smoothness:g}: no function has that"
            )
    # Without L: it is at least mu, so 1 / L is at most 1 / mu.
    check_step(gamma, 1 / (mu if smoothness is None else smoothness))
