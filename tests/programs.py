"""The examples as programs: run, stopped, and killed until they are done."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
PATIENCE = 600.0


def options(settings):
    """Words of a command line, without those that are None."""
    given = {f"--{n.replace('_', '-')}": v for n, v in settings.items() if v is not None}
    return [word for pair in given.items() for word in pair]


def launch(monkeypatch, program, *words):
    """Runs a program in this process."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    program.main()


def ended(monkeypatch, program, *words):
    """The exit code of a run that does not come to its end."""
    with pytest.raises(SystemExit) as stopped:
        launch(monkeypatch, program, *words)
    return stopped.value.code


def finished(program, words, out, kills=(), seed=0):
    """Runs a program of the examples to its end, in spite of some SIGKILLs.

    Args:
      program: Its file.
      words: Its arguments, without ``--out`` and ``--resume``.
      out: The run's folder.
      kills: After how many rows of metrics each process dies, at a moment of the time
        that a row takes.
      seed: Of the moments.
    """
    draw = random.Random(seed)
    for rows in (*kills, None):
        command = [sys.executable, EXAMPLES / program, *words, "--out", out, "--resume"]
        process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            if rows is not None:
                kill_after(process, out / "metrics.jsonl", rows, draw)
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        expected = 0 if rows is None else -signal.SIGKILL
        assert process.returncode == expected, said.decode()


def press_ctrl_c(patch, problem, calls):
    """Sends SIGINT to this process when a problem is asked for its so many-th batch."""
    batch, seen = problem.batch, []

    def pressing(self, step, size, seed):
        seen.append(step)
        if len(seen) == calls:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step, size, seed)

    patch.setattr(problem, "batch", pressing)


def kill_after(process, file, rows, draw):
    """SIGKILL within the time of one row after the file has some rows."""
    begun = seen = time.monotonic()
    count = len(read(file))
    while count < rows:
        time.sleep(0.005)
        now = len(read(file))
        if now > count:
            count, begun, seen = now, seen, time.monotonic()
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() - seen < PATIENCE
    time.sleep(draw.random() * min(seen - begun, 1.0))
    process.send_signal(signal.SIGKILL)


def rows_of(out):
    """The rows of a run's metrics, without their times."""
    return read(out / "metrics.jsonl")


def read(file):
    """Whole rows of metrics, without their times."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def assert_same_run(one, other):
    """The same metrics to the last digit, and the same written model."""
    assert rows_of(one) == rows_of(other)
    assert (one / "report.html").exists()
    assert (other / "report.html").exists()
    ours, theirs = (
        load_file(folder / "model" / "model.safetensors") for folder in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
