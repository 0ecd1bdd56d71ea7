"""SIGKILL at random moments: what a run loses, and whether it ends at the same bits.

examples/pod.py is started, killed and started again in one directory until it has been
killed often enough, then left to end. Every second kill waits for a save to be under way.
A run that nobody kills says what the bits should be. A second study goes on with another
number of devices after every kill, where the order of sums, and so the last bits, differ.

    python -m benchmarks.pods.kills [--kills 100]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.shared import rows

PROGRAM = rows.ROOT / "examples" / "pod.py"
TINY = ["--layers=1", "--width=32", "--length=16", "--rank=4", "--log-every=1"]
STEPS, SAVE_EVERY = 400, 5


def start(
    folder: pathlib.Path,
    *words: str,
    devices: int = 1,
    cache: pathlib.Path | None = None,
) -> subprocess.Popen:
    """The program in a process of its own, with compiled programs kept in ``cache``."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(rows.ROOT),
    }
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), "--directory", str(folder), *TINY, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen, timeout: float = 240) -> list[str]:
    """What they said, when all have ended well."""
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {text[-3000:]}")
    return said


def steps_in(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that are whole by their names, oldest first."""
    found = folder.iterdir() if folder.exists() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def saves_under_way(folder: pathlib.Path, since: float) -> int:
    """Checkpoints half written since a moment, not those that kills before it left."""
    found = folder.iterdir() if folder.exists() else ()
    count = 0
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # renamed or swept meanwhile
            count += "tmp" in path.name and path.stat().st_ctime > since
    return count


def killed(
    process: subprocess.Popen, folder: pathlib.Path, rng: random.Random, in_a_save: bool
) -> dict[str, Any]:
    """Kills a process some time after its first step, and says what that left."""
    assert process.stdout is not None
    said = ""
    while not re.search(r"^step \d+ loss", said, re.MULTILINE):
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended before its first step: {said[-3000:]}")
        said += line
    before, since = steps_in(folder), time.time()
    if in_a_save:
        wait_for(lambda: saves_under_way(folder, since))
        time.sleep(rng.uniform(0, 0.02))
    else:
        wait_for(lambda: steps_in(folder)[-1:] != before[-1:])
        time.sleep(rng.uniform(0, 0.1))
    process.kill()
    said += process.communicate()[0]
    return left(folder, said, since)


def wait_for(happened: Callable[[], Any], seconds: float = 20) -> None:
    """Looks very often, for some time."""
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.0002)


def left(folder: pathlib.Path, said: str, since: float) -> dict[str, Any]:
    """What a process began with, by its own words, and what it left."""
    restored = re.search(r"restored step (\d+)", said)
    return {
        "restored": int(restored[1]) if restored else 0,
        "whole": steps_in(folder),
        "half_written": saves_under_way(folder, since),
        "fell_back": said.count("not whole"),
    }


def killed_often(
    folder: pathlib.Path,
    times: int,
    seed: int,
    words: tuple[str, ...],
    cache: pathlib.Path,
    devices: tuple[int, ...] = (1,),
) -> list[dict[str, Any]]:
    """A run killed some times and then left to end; a dict per kill, and one at the end.

    Args:
      folder: Its checkpoints.
      times: How often.
      seed: Of the moments.
      words: Arguments of the program.
      cache: Where compiled programs are kept.
      devices: How many it has, one start after the other, over and over.
    """
    rng, seen = random.Random(seed), []
    for index in range(times):
        process = start(
            folder, *words, devices=devices[index % len(devices)], cache=cache
        )
        seen.append(killed(process, folder, rng, in_a_save=index % 2 == 1))
    last = start(folder, *words, devices=devices[times % len(devices)], cache=cache)
    (said,) = finish(last, timeout=600)
    seen.append(left(folder, said, time.time()))
    return seen


def lost(seen: list[dict[str, Any]]) -> int:
    """Starts that did not go on from the newest checkpoint that the kill before left."""
    pairs = itertools.pairwise(seen)
    return sum(
        after["restored"] != max(before["whole"] or [0]) for before, after in pairs
    )


def digests(folder: pathlib.Path, step: int) -> dict[str, int]:
    """Of every array of a checkpoint."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["digests"]


def weights(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, on the host, as orbax alone reads them."""
    import orbax.checkpoint as ocp

    where = folder / str(step)
    table = json.loads((where / "meta" / "metadata").read_text())["leaves"]
    into = {p: np.zeros(shape, jnp.dtype(dtype)) for p, (dtype, shape) in table.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(where / "state", into)
    return {path: leaf for path, leaf in found.items() if path.startswith("0/")}


def study(
    name: str, times: int, seed: int, devices: tuple[int, ...], scratch: pathlib.Path
) -> dict[str, Any]:
    """A row: a killed run beside one that was not."""
    words = ("--steps", str(STEPS), "--save-every", str(SAVE_EVERY))
    alone, often, cache = scratch / "alone", scratch / name, scratch / "compiled"
    if not alone.exists():
        finish(start(alone, *words, devices=devices[0], cache=cache), timeout=600)
    began = time.monotonic()
    seen = killed_often(often, times, seed, words, cache, devices)
    a, b = weights(alone, STEPS), weights(often, STEPS)
    return {
        "study": name,
        "devices": list(devices),
        "kills": times,
        "kills_in_a_save": sum(one["half_written"] > 0 for one in seen[:-1]),
        "starts_that_lost_a_checkpoint": lost(seen),
        "checkpoints_not_whole": sum(one["fell_back"] for one in seen),
        "same_bits": digests(alone, STEPS) == digests(often, STEPS),
        "largest_difference": float(max(np.abs(a[p] - b[p]).max() for p in a)),
        "largest_weight": float(max(np.abs(a[p]).max() for p in a)),
        "last_kill_at_step": max(seen[-2]["whole"] or [0]),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    """Kills, compares, writes the rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=rows.folder(__file__) / "kills.json")
    options = parser.parse_args()
    found = []
    for name, times, devices in (
        ("same devices", options.kills, (1,)),
        ("other device counts", max(3, options.kills // 10), (8, 4, 1)),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            row = study(name, times, options.seed, devices, pathlib.Path(scratch))
        print(json.dumps(row), flush=True)
        found.append(row)
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "seeds": [options.seed]}
    rows.save(
        options.out,
        f"python -m benchmarks.pods.kills --kills {options.kills}",
        found,
        **settings,
    )


if __name__ == "__main__":
    main()
