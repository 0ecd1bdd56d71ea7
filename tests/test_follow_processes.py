"""A trainer and a sampler in processes of their own, killed and started again."""

import os
import pathlib
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

import raclora_jax as rl

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "follow"
STEPS = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.exists(), reason="no examples beside the tests"),
]


@pytest.fixture
def processes(tmp_path):
    """``start(program) -> process`` whose output goes to ``tmp_path / program``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start(program, *more):
        root = str(EXAMPLE.parent.parent)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])}
        with (tmp_path / program).open("a") as out:
            folder = ["--port", str(port), "--folder", str(tmp_path / f"of_{program}")]
            command = [sys.executable, f"{program}.py", *folder, *more]
            started.append(
                subprocess.Popen(command, cwd=EXAMPLE, env=env, stdout=out, stderr=out)
            )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def killed_at(process, file, step):
    """Ends a process with SIGKILL once it has said that it is at a step."""
    for _ in range(3000):
        said = file.read_text()
        if any(int(at) >= step for at in re.findall(r"at step (\d+)", said)):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        assert process.poll() is None, said
        time.sleep(0.02)
    raise AssertionError(f"never at step {step}: {said}")


def test_killed_on_either_side_and_nothing_lost(processes, tmp_path):
    steps = ["--steps", str(STEPS)]
    trainer, sampler = processes("trainer", *steps), processes("sampler")
    killed_at(sampler, tmp_path / "sampler", 40)
    sampler = processes("sampler")
    killed_at(trainer, tmp_path / "trainer", 100)
    trainer = processes("trainer", *steps)
    killed_at(trainer, tmp_path / "trainer", 160)
    killed_at(sampler, tmp_path / "sampler", 140)
    trainer, sampler = processes("trainer", *steps), processes("sampler")
    for process in (sampler, trainer):
        assert process.wait(timeout=300) == 0
    ends = [
        re.search(rf"ends at {STEPS} (\w+)", (tmp_path / name).read_text())[1]
        for name in ("trainer", "sampler")
    ]
    assert ends[0] == ends[1]
    task = types.SimpleNamespace(**runpy.run_path(str(EXAMPLE / "task.py")))
    log, base = rl.follow.Log(tmp_path / "of_trainer" / "messages"), task.base_params()
    assert log.steps() == [*range(STEPS)]
    params, _ = log.replay(base, rl.follow.start(base, key=task.KEY))
    assert task.digest(params) == ends[0]
