"""Certificates for people: one line, and a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from raclora_jax._core import paths
from raclora_jax._extras import extra
from raclora_jax.theory._certificate import THRESHOLD, Certificate

# Lines of one panel that can still be told apart.
_SHOWN = 8


def report(
    certificates: Sequence[Certificate],
    *,
    bound: Sequence[float] | None = None,
    optimum: float = 0.0,
    out: str | os.PathLike[str] | None = None,
) -> str:
    """Says in one line what broke first, or that nothing did, and draws the run.

    The figure has the mean share of the gradient so far over lambda, for the leaves of
    lowest z, above the line of four standard deviations; and the gap of the loss beside
    what the descents guarantee and, where it is given, a bound.

    Args:
      certificates: Those of a run, link by link.
      bound: Bound on the gap after each link, such as ``GdPl(...).bound(..., links=t)``
        for ``t = 1, 2, ...``.
      optimum: ``f*``, subtracted from the losses.
      out: Where to draw the figure; needs matplotlib. None draws nothing.

    Returns:
      The line.

    Raises:
      ValueError: If there are no certificates, or ``bound`` has another length.
      ImportError: If a figure is asked for and matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from raclora_jax.theory import Captured, certify
      >>> half = {"kernel": jnp.array(0.5)}
      >>> seen = Captured(jnp.array(1.0), share=half, lam=half, variance=half)
      >>> link = certify(None, seen, loss_before=1.0, loss_after=2.0, learning_rate=0.1)
      >>> report([link]).partition(";")[0]
      'link 1 does not descend: the loss went from 1 to 2, and 0.95 was due'
    """
    if not certificates:
        raise ValueError("report needs the certificate of one link at least, got none")
    if bound is not None and len(bound) != len(certificates):
        raise ValueError(
            f"bound has {len(bound)} numbers for {len(certificates)} certificates; give "
            "one for each link"
        )
    links = [jax.tree.map(np.asarray, certificate) for certificate in certificates]
    if out is not None:
        _draw(links, bound, optimum, out)
    for link in links:
        if not link.sound:
            return _broken(link)
    last = links[-1]
    path, z = _lowest(last)
    return (
        f"sound: {int(last.links)} links, loss {links[0].loss_before:.4g} to "
        f"{last.loss_after:.4g}, lowest z {z:.2f} at {paths.show(path)}"
    )


def _broken(link: Certificate) -> str:
    number = int(link.links)
    if not link.finite:
        lost = [
            paths.show(p) for p, share in link.share.items() if not np.isfinite(share)
        ]
        where = f"; the gradient of {', '.join(lost)}" if lost else ""
        return (
            f"link {number} is not finite: loss {link.loss_before:.4g} to "
            f"{link.loss_after:.4g}{where}"
        )
    if not link.covers:
        path, z = _lowest(link)
        if z > THRESHOLD:
            return (
                f"link {number} does not cover: no leaf alone is out of range, but all "
                f"together are at z = {float(link.z_together):.1f}; the sketches stay "
                "the same, or their law leaves directions out"
            )
        lam = float(link.lam[path])
        mean = lam + float(link.excess[path]) / number
        return (
            f"link {number} does not cover {paths.show(path)}: its sketches held "
            f"{mean:.2g} of the gradient where lambda is {lam:.2g}, z = {z:.1f}; the "
            "sketch stays the same, or its law leaves directions out"
        )
    due = float(link.loss_before) - float(link.guaranteed)
    return (
        f"link {number} does not descend: the loss went from {link.loss_before:.4g} to "
        f"{link.loss_after:.4g}, and {due:.4g} was due; the step is too large for "
        "the curvature, or the inner rule is not plain SGD"
    )


def _lowest(link: Certificate) -> tuple[str, float]:
    path = min(link.z, key=lambda path: float(link.z[path]))
    return path, float(link.z[path])


def _draw(
    links: list[Certificate],
    bound: Sequence[float] | None,
    optimum: float,
    out: str | os.PathLike[str],
) -> None:
    with extra("report"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    shares, losses = figure.subplots(1, 2)
    _draw_shares(shares, links)
    _draw_losses(losses, links, bound, optimum)
    figure.savefig(out, dpi=100)


def _draw_shares(panel: Any, links: list[Certificate]) -> None:
    number = np.array([int(link.links) for link in links])
    last = links[-1]
    lowest = sorted(last.z, key=lambda path: float(last.z[path]))[:_SHOWN]
    for path in lowest:
        lam = float(last.lam[path])
        mean = np.array([float(link.excess[path]) for link in links]) / number
        panel.plot(number, 1 + mean / lam, label=paths.show(path))
    spread = np.array([float(link.variance[lowest[0]]) for link in links])
    band = 1 + THRESHOLD * np.sqrt(spread) / number / float(last.lam[lowest[0]])
    panel.plot(number, band, "k:", label=f"z = {THRESHOLD:g} of the first")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(xlabel="links", ylabel="mean share / lambda", ylim=(0, None))
    panel.legend(fontsize=8)


def _draw_losses(
    panel: Any, links: list[Certificate], bound: Sequence[float] | None, optimum: float
) -> None:
    number = np.array([0, *(int(link.links) for link in links)])
    first = float(links[0].loss_before)
    after = np.array([first, *(float(link.loss_after) for link in links)]) - optimum
    due = first - optimum - np.cumsum([0.0, *(float(link.guaranteed) for link in links)])
    panel.plot(number, after, label="measured")
    panel.plot(number, due, "--", label="due by descent at least")
    if bound is not None:
        panel.plot(number[1:], bound, "k:", label="bound")
    panel.set(xlabel="links", ylabel="gap", yscale="log")
    panel.legend(fontsize=8)
