"""The learning rate of a run: asked for, the method's default, or searched."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

import raclora_jax as rl
from finetuning import asked, jsonl, training

_TRIES = 7
_NAMES = "learning_rate", "dev_loss"


class Problem(Protocol):
    """A model, its data and its loss.

    Attributes:
      params: The weights before, a tree.
      length: Tokens a row.
      metric: What it is judged by: of ``dev_metric``, more is better; or ``"loss"``.
      defaults: Of its program.
      facts: What the report says of the data.
    """

    params: Any
    length: int
    metric: str
    defaults: asked.Defaults
    facts: dict[str, str]

    def loss(self, params: Any, *batch: Any) -> jax.Array:
        """Of a batch."""

    def trainer(
        self, method: str, rate: optax.Schedule, spec: rl.Spec, seed: int, fused: bool
    ) -> training.Trainer:
        """A method on this model."""

    def batch(self, step: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
        """The rows of a step, a function of its number."""

    def judge(self, params: Any) -> dict[str, float]:
        """``dev_loss``, and ``dev_metric`` where the metric is not the loss."""


class Rate(NamedTuple):
    """The peak of a learning rate, and why it is that."""

    peak: float
    why: str


def stated(options: argparse.Namespace, defaults: asked.Defaults) -> Rate:
    """What was asked for, else the method's default: a search begins there."""
    if isinstance(options.learning_rate, float):
        return Rate(options.learning_rate, "as asked for")
    return Rate(
        defaults.rates[options.method],
        f"the default of {options.method}, measured on {defaults.measured}",
    )


def searched(
    options: argparse.Namespace,
    problem: Problem,
    spec: rl.Spec,
    steps: int,
    interrupt: asked.Interrupt,
) -> Rate:
    """The rate with the lowest loss on held-out data behind a tenth of the steps.

    Every rate that was tried is a row of ``search.jsonl``, and is not tried again.

    Raises:
      ValueError: If training diverged at all of them.
      KeyboardInterrupt: On Ctrl-C; the rates that were tried are kept.
    """
    short = max(1, steps // 10)
    file = options.out / "search.jsonl"
    tried = {row["learning_rate"]: row["dev_loss"] for row in jsonl.rows(file, _NAMES)}

    def score(peak: float) -> float:
        if peak not in tried:
            tried[peak] = _short_run(options, problem, spec, short, peak, interrupt)
            rows = [dict(zip(_NAMES, pair, strict=True)) for pair in tried.items()]
            jsonl.write(file, rows)
        return tried[peak]

    found = grid(score, stated(options, problem.defaults).peak)
    best = min(found, key=lambda peak: found[peak])
    if not np.isfinite(found[best]):
        raise ValueError(
            f"the loss is not finite at any rate from {min(found):g} to {max(found):g}"
        )
    numbers = ", ".join(f"{peak:g}: {found[peak]:.4f}" for peak in sorted(found))
    return Rate(best, f"the best of a search, held-out loss at step {short}: {numbers}")


def grid(score: Callable[[float], float], guess: float) -> dict[float, float]:
    """Losses by rate, from a guess on by factors of 2 until the best has neighbours."""
    found: dict[int, float] = {}
    powers = [0, -1, 1]
    while powers:
        found |= {power: score(guess * 2.0**power) for power in powers}
        best = min(found, key=lambda power: (found[power], power))
        beside = [power for power in (best - 1, best + 1) if power not in found]
        powers = beside[: _TRIES - len(found)]
    return {guess * 2.0**power: loss for power, loss in found.items()}


def _short_run(
    options: argparse.Namespace,
    problem: Problem,
    spec: rl.Spec,
    steps: int,
    peak: float,
    interrupt: asked.Interrupt,
) -> float:
    """The loss on held-out data at its end."""
    rate = training.schedule(peak, steps)
    method = problem.trainer(options.method, rate, spec, options.seed, options.fused)
    step_fn = jax.jit(method.step, donate_argnums=0)
    state = jax.jit(method.init)(problem.params)
    for step in range(steps):
        state, _ = step_fn(state, *problem.batch(step, options.batch, options.seed))
        if interrupt.asked:
            raise KeyboardInterrupt("stopped in the search of the rate; go on with")
    loss = problem.judge(method.params(state))["dev_loss"]
    return loss if np.isfinite(loss) else float("inf")
