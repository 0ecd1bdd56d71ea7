"""The program examples/finetune_llm.py on a small Llama, by ours, by LoRA and in full.

stories260K on tiny Shakespeare, 300 steps of 8 rows of 64 tokens. Each run is the command
that a user would type, in a process of its own; its processor seconds are those of the
whole command, loading, compiling, judging and saving included. The learning rate of every
method is searched on one grid of powers of two, on seed 0.

    python -m benchmarks.programs --data-dir DIR [--quick]
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import contest, rows, timing

ROOT = pathlib.Path(__file__).parent.parent
SEEDS = (0, 1, 2)
STEPS = 300
# Name, method, rank, and where the search of its rate starts.
METHODS = (
    ("RAC-LoRA r16, orthogonal", "raclora-orthogonal", 16, 2e-3),
    ("RAC-LoRA r32, orthogonal", "raclora-orthogonal", 32, 2e-3),
    ("RAC-LoRA r12, Adam", "raclora", 12, 4e-3),
    ("LoRA r8, Adam", "lora", 8, 8e-3),
    ("full, Adam", "full", 8, 2e-3),
)


def command(
    data: pathlib.Path, method: str, rank: int, rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """Runs it, and reads what its folder says."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) / "run"
        words = {
            "model": data / "stories260k" / "stories260K.bin",
            "tokenizer": data / "stories260k" / "tok512.bin",
            "train": data / "tinyshakespeare" / "input.txt.gz",
            "method": method,
            "rank": rank,
            "learning-rate": rate,
            "steps": steps,
            "eval-every": steps // 2,
            "seed": seed,
            "out": out,
        }
        subprocess.run(
            [
                sys.executable,
                ROOT / "examples" / "finetune_llm.py",
                *(part for k, v in words.items() for part in (f"--{k}", str(v))),
            ],
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        page = (out / "report.html").read_text()
    size = re.search(r"optimizer bytes\D*([\d,]+)", page)
    assert size is not None
    return {
        "loss": min(json.loads(line)["dev_loss"] for line in lines),
        "optimizer_bytes": int(size[1].replace(",", "")),
        "cpu_seconds": sum(
            getattr(after, part) - getattr(before, part)
            for part in ("ru_utime", "ru_stime")
        ),
    }


def main() -> None:
    """Tunes, then takes every seed of every method in turn."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    options = timing.parse(parser)
    steps, seeds = (10, SEEDS[:1]) if options.quick else (STEPS, SEEDS)
    rates, tried = {}, {}
    for name, method, rank, guess in METHODS:

        def score(rate: float, method: str = method, rank: int = rank) -> float:
            return command(options.data_dir, method, rank, rate, steps, 0)["loss"]

        found = {guess: 0.0} if options.quick else contest.search(score, guess)
        rates[name], tried[name] = min(found, key=lambda rate: found[rate]), found
        print(name, found, flush=True)
    ends: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in METHODS}
    for seed in seeds:  # in turn, so that a busy machine is busy for all
        for name, method, rank, _ in METHODS:
            end = command(options.data_dir, method, rank, rates[name], steps, seed)
            ends[name].append(end)
            print(seed, name, end, flush=True)
    table = [
        {
            "method": name,
            "optimizer_bytes": found[0]["optimizer_bytes"],
            "rate": rates[name],
            "tried": list(tried[name].items()),
            "loss": [end["loss"] for end in found],
            "loss_mean": statistics.mean(end["loss"] for end in found),
            "loss_std": statistics.stdev(e["loss"] for e in found) if seeds[1:] else None,
            "cpu_seconds": statistics.median(end["cpu_seconds"] for end in found),
        }
        for name, found in ends.items()
    ]
    if options.out is not None:
        path, program = options.out / "programs.json", "python -m benchmarks.programs"
        rows.save(path, program, table, steps=steps, seeds=list(seeds))


if __name__ == "__main__":
    main()
