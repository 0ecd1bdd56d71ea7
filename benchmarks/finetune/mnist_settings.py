"""Which settings of RAC-LoRA come closest to full fine-tuning on MNIST at rank 1.

The experiment of ``python -m benchmarks.finetune --data mnist`` with 912 trained numbers
(the columns sketched): link lengths, what a link does to the moments, the distribution,
and a head whose steps are scaled down to the size of the others'.

    python -m benchmarks.finetune.mnist_settings --data-dir DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

import optax
from jax import Array

import raclora_jax as rl
from benchmarks.finetune import data, entries, report
from benchmarks.finetune import study as finetune
from benchmarks.shared import rows as result_rows
from raclora_jax import methods

SEEDS = range(3)
RATES = (1e-3, 3e-3, 6e-3, 1e-2)
LINKS = (25, 50, 100, 200)
# Adam's step has the size lr / sqrt(dim) per weight: sqrt(5 / 64) brings the head, which
# sketches its 5 classes, to the step of the hidden layers, which sketch 64 units.
SMALL_HEAD = (rl.Rule("Dense_2/kernel", alpha=(5 / 64) ** 0.5),)


def variant(name: str, moments: str = "reset", **fields: Any) -> entries.Entry:
    """One line of the table: RAC-LoRA with some fields of its spec replaced."""

    def make(schedule: optax.Schedule, spec: rl.Spec, key: Array) -> methods.Method:
        spec = dataclasses.replace(spec, **fields)
        return methods.raclora(schedule, spec, moments=moments, key=key)

    spec = rl.Spec(1, side="right", rest="frozen")
    return entries.Entry(name, make, spec, True)


# Each with its link length; full fine-tuning has none.
VARIANTS: list[tuple[entries.Entry, int | None]] = [
    (entries.adam()[0], None),
    *((variant(f"link {link}"), link) for link in LINKS),
    (variant("link 100, moments kept", "keep"), 100),
    (variant("link 100, moments transported", "transport"), 100),
    (variant("link 100, coordinate sketches", sketch="coordinate"), 100),
    (variant("link 100, small head", rules=SMALL_HEAD), 100),
    (variant("link 200, small head", rules=SMALL_HEAD), 200),
]


def main() -> None:
    """Tunes and measures every variant, full fine-tuning beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=result_rows.folder(__file__))
    options = parser.parse_args()
    before, after = data.mnist(options.data_dir)
    base = finetune.mnist_setting(after)
    params = finetune.pretrain(before, base.steps // 4, base.batch)
    results: list[dict[str, Any]] = []
    for entry, link in VARIANTS:
        setting = base._replace(links=(link,), learning_rates=RATES)
        table, _ = finetune.compare(params, after, setting, [entry], SEEDS)
        results += table
    for row in results:
        del row["curves"], row["steps"]
    report.print_table(results, "RAC-LoRA on MNIST, 912 trained numbers, 3 seeds")
    result_rows.save(
        options.out / "mnist_settings.json",
        "python -m benchmarks.finetune.mnist_settings",
        results,
        seeds=list(SEEDS),
        tuning_seeds=base.tuning_seeds,
        learning_rates=RATES,
        steps=base.steps,
        batch=base.batch,
    )


if __name__ == "__main__":
    main()
