"""Studies that run several jobs at once."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STUDY = """
import os, pathlib, sys, time
from benchmarks.shared.results import side_by_side

def work(folder):
    (pathlib.Path(folder) / "worker").write_text(str(os.getpid()))
    while True:
        (pathlib.Path(folder) / "beat").write_text(str(time.monotonic()))
        time.sleep(0.05)

if __name__ == "__main__":
    list(side_by_side(work, [sys.argv[1]], 1))
"""


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_study_that_is_killed_leaves_no_worker(tmp_path):
    """One in the middle of a job would go on for as long as that takes."""
    (tmp_path / "study.py").write_text(STUDY)
    beat = tmp_path / "beat"
    study = subprocess.Popen(
        [sys.executable, tmp_path / "study.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    wait_for(beat.exists, 60)
    study.send_signal(signal.SIGKILL)
    study.wait()

    def still():
        before = beat.read_text()
        time.sleep(1)
        return beat.read_text() == before

    try:
        wait_for(still, 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
