"""The curves and the table of the GRPO study, from its rows."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np

from benchmarks.shared import rows as result_rows

LORA = "qwix LoRA r8 AdamW"


class Curve(NamedTuple):
    """A method at its rate.

    Attributes:
      method: Its name.
      rate: The learning rate that the tuning seed chose.
      steps: Where the reward was measured.
      rewards: ``(seeds, steps)``.
      seconds: Of a step, the median.
      sync_bytes: From trainer to sampler.
    """

    method: str
    rate: float
    steps: np.ndarray
    rewards: np.ndarray
    seconds: float
    sync_bytes: int

    def at(self, seconds: float) -> list[float]:
        """The reward of every seed after so many seconds, between two judgements."""
        step = seconds / self.seconds
        return [float(np.interp(step, self.steps, one)) for one in self.rewards]


def curves() -> list[Curve]:
    """Every method at the rate that its tuning seed chose."""
    record = result_rows.record("pretrained/grpo")
    tuning, every = (record["settings"][n] for n in ("tuning_seed", "judged_every"))
    timed = {r["method"]: r["seconds"] for r in record["rows"] if r["study"] == "time"}
    found = []
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        own = [row for row in record["rows"] if row["method"] == method]
        rows = [row for row in own if row["study"] != "time"]
        tried = [row for row in rows if row["seed"] == tuning]
        rate = max(tried, key=lambda row: row["reward"])["rate"]
        kept = [r for r in rows if r["seed"] != tuning and r["rate"] == rate]
        kept.sort(key=lambda row: row["seed"])
        rewards = np.array([row["rewards"] for row in kept])
        found.append(
            Curve(
                method,
                rate,
                every * np.arange(rewards.shape[1]),
                rewards,
                timed[method],
                kept[0]["sync_bytes"],
            )
        )
    return found


def table() -> str:
    """Rewards at equal steps and in equal time, and what a sync sends."""
    found = curves()
    last = result_rows.record("pretrained/grpo")["settings"]["last"]
    lora = next(curve for curve in found if curve.method == LORA)
    # The longest time that every method was run for.
    seconds = min(curve.seconds * curve.steps[-1] for curve in found)
    first, final = lora.steps[-last], lora.steps[-1]
    lines = [
        f"| method | rate | reward, steps {first} to {final} | over LoRA "
        f"| in {seconds:.0f} s | over LoRA | seconds a step | bytes a sync |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = lora.rewards[:, -last:].mean(1), lora.at(seconds)
    for curve in found:
        own = curve.rewards[:, -last:].mean(1), curve.at(seconds)
        cells = [curve.method, f"{curve.rate:.0e}"]
        for mine, others in zip(own, base, strict=True):
            over = "" if curve is lora else _spread(np.subtract(mine, others), "+")
            cells += [_spread(mine, ""), over]
        cells += [f"{curve.seconds:.2f}", f"{curve.sync_bytes:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Any, sign: str) -> str:
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values):.3f}"
