"""The two fine-tuning programs of the examples, by the commands that a user would type.

The decoder's: stories260K on tiny Shakespeare, 300 steps of 8 rows of 64 tokens, by ours,
by LoRA and in full; the learning rate of every method is searched on one grid of powers
of two, on seed 0. The encoder's: MiniLM on SST-2, all settings the program's own, one
run. Each run is a process of its own; its seconds are those of the whole command,
loading, compiling, judging and saving included.

    python -m benchmarks.pretrained.programs --data-dir DIR [--quick]
    python -m benchmarks.pretrained.programs --data-dir DIR --encoder MINILM [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from benchmarks.pretrained.run import search
from benchmarks.shared import rows, timing

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


class Run(NamedTuple):
    """What a command left and took.

    Attributes:
      metrics: The rows of its ``metrics.jsonl``.
      report: Its report, a page.
      seconds: From its start to its end.
      cpu_seconds: Of all its processor cores.
    """

    metrics: list[dict[str, Any]]
    report: str
    seconds: float
    cpu_seconds: float


def command(program: str, words: dict[str, Any], keep: pathlib.Path | None = None) -> Run:
    """Runs an example, and reads what its folder says; it is thrown away unless named."""
    with tempfile.TemporaryDirectory() as scratch:
        out = keep or pathlib.Path(scratch) / "run"
        words = words | {"out": out}
        before, begun = _cpu_seconds(), time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                rows.ROOT / "examples" / program,
                *(part for k, v in words.items() for part in (f"--{k}", str(v))),
            ],
            check=True,
            env=os.environ | {"PYTHONPATH": str(rows.ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
        )
        seconds, cpu_seconds = time.perf_counter() - begun, _cpu_seconds() - before
        lines = (out / "metrics.jsonl").read_text().splitlines()
        report = (out / "report.html").read_text()
    return Run([json.loads(line) for line in lines], report, seconds, cpu_seconds)


def optimizer_bytes(run: Run) -> int:
    """What its report says of the optimizer's state."""
    size = re.search(r"optimizer bytes\D*([\d,]+)", run.report)
    assert size is not None
    return int(size[1].replace(",", ""))


def _cpu_seconds() -> float:
    """Of the processes that this one started and that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def decode(
    data: pathlib.Path, method: str, rank: int, rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """The decoder's program, once."""
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
    }
    run = command("finetune_llm.py", words)
    return {
        "loss": min(row["dev_loss"] for row in run.metrics),
        "optimizer_bytes": optimizer_bytes(run),
        "cpu_seconds": run.cpu_seconds,
    }


def encode(options: argparse.Namespace) -> None:
    """The encoder's program, once, and its row."""
    words = {"model": options.encoder, "task": "sst2", "data-dir": options.data_dir}
    if options.quick:
        words |= {"steps": 10, "eval-every": 5}
    run = command("finetune_glue.py", words)
    best = max(run.metrics, key=lambda row: row["dev_metric"])
    row = {
        "method": "RAC-LoRA r16, Adam, links of 100",
        "dev_accuracy": best["dev_metric"],
        "at_step": best["step"],
        "steps": run.metrics[-1]["step"],
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
    }
    print(row)
    if options.out is not None:
        path = options.out / "encoder_program.json"
        rows.save(
            path, "python -m benchmarks.pretrained.programs --encoder", [row], task="sst2"
        )


def main() -> None:
    """Reads the options and makes the rows of one of the programs."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--encoder", type=pathlib.Path, help="folder of MiniLM")
    options = timing.parse(parser, __file__)
    if options.encoder:
        encode(options)
    else:
        decoders(options)


def decoders(options: argparse.Namespace) -> None:
    """Tunes, then takes every seed of every method in turn."""
    steps, seeds = (10, SEEDS[:1]) if options.quick else (STEPS, SEEDS)
    rates, tried = {}, {}
    for name, method, rank, guess in METHODS:

        def score(rate: float, method: str = method, rank: int = rank) -> float:
            return decode(options.data_dir, method, rank, rate, steps, 0)["loss"]

        found = {guess: 0.0} if options.quick else search(score, guess)
        rates[name], tried[name] = min(found, key=lambda rate: found[rate]), found
        print(name, found, flush=True)
    ends: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in METHODS}
    for seed in seeds:  # in turn, so that a busy machine is busy for all
        for name, method, rank, _ in METHODS:
            end = decode(options.data_dir, method, rank, rates[name], steps, seed)
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
        path = options.out / "programs.json"
        program = "python -m benchmarks.pretrained.programs"
        rows.save(path, program, table, steps=steps, seeds=list(seeds))


if __name__ == "__main__":
    main()
