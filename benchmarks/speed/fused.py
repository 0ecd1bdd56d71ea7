"""The update inside the backward pass beside the same steps in factor form.

Per model the peak that the compiler plans, the seconds that it takes, and whole steps,
interleaved, over the floor. ``over_parts`` is a fused step's time over that of the same
rule in factor form. The last model has 200 MiB of weights and is compiled only.

    python -m benchmarks.speed.fused [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from benchmarks.pods import pod_steps
from benchmarks.shared import models, rivals, timing
from benchmarks.shared.models import Model
from benchmarks.shared.rivals import Method


def pairs(width: int) -> dict[str, tuple[dict[str, Any], optax.GradientTransformation]]:
    """The settings that both forms take: fields of the spec, and the rule."""

    def stateless(parts: int) -> tuple[dict[str, Any], Any]:
        options = pod_steps.stateless(parts)
        inner = options.pop("inner")
        return {"rank": width // max(parts, 2)} | options, inner

    return {
        "dim / 4": stateless(4),
        "whole": stateless(1),
        "Adam, rank 8": ({"rank": 8, "side": "left"}, optax.scale_by_adam()),
    }


def all_methods(model: Model, width: int) -> list[Method]:
    """The floor, and every setting in both forms."""
    forms: dict[str, Callable[..., Method]] = {
        "parts": rivals.ours,
        "fused": rivals.fused,
    }
    return [
        rivals.floor(model),
        *(
            make(model, f"{form}, {name}", inner=inner, **options)
            for name, (options, inner) in pairs(width).items()
            for form, make in forms.items()
        ),
    ]


def over_parts(rows: list[dict]) -> list[dict]:
    """The rows, those of the fused form with their time over the other form's."""
    times = {row["method"]: row.get("over_floor") for row in rows}

    def ratio(row: dict) -> dict:
        form, _, name = row["method"].partition(", ")
        other = times.get(f"parts, {name}")
        if form != "fused" or other is None:
            return row
        return row | {"over_parts": row["over_floor"] / other}

    return [ratio(row) for row in rows]


def main() -> None:
    """Runs and prints what was asked for."""
    options = timing.arguments(__doc__, __file__)
    width = models.TINY["width"] if options.quick else 512
    sizes = models.TINY if options.quick else {}
    times = {"rounds": 2, "runs": 1} if options.quick else {"rounds": 2, "runs": 3}
    results = []
    for scan, remat in ((False, False), (True, False), (True, True)):
        model = models.decoder(**sizes, scan=scan, remat=remat)
        rows = timing.compare(model, all_methods(model, width), **times)
        results += [{"study": "steps"} | row for row in over_parts(rows)]
    if not options.quick:
        large = models.decoder(layers=16, vocab=512, sequences=1, scan=True, remat=True)
        rows = [timing.Compiled.of(m, large).row() for m in all_methods(large, width)]
        floor = rows[0]["peak_mib"]
        results += [
            {"study": "large", "model": large.name}
            | row
            | {"peak_over_floor": row["peak_mib"] / floor}
            for row in rows
        ]
    timing.finish(options, "speed.fused", results, dtype="float32")


if __name__ == "__main__":
    main()
