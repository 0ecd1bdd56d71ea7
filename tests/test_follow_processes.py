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

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.exists(), reason="no examples beside the tests"),
]


@pytest.fixture
def processes(tmp_path, request):
    """``start(program) -> process`` whose output goes to ``tmp_path / program``."""
    example = EXAMPLES / request.param
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []

    def start(program, *more):
        root = str(EXAMPLES.parent)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])}
        with (tmp_path / program).open("a") as out:
            folder = ["--port", str(port), "--folder", str(tmp_path / f"of_{program}")]
            command = [sys.executable, f"{program}.py", *folder, *more]
            started.append(
                subprocess.Popen(command, cwd=example, env=env, stdout=out, stderr=out)
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


def both_end(trainer, sampler, folder, steps):
    """The digest that trainer and sampler end with."""
    for process in (sampler, trainer):
        assert process.wait(timeout=300) == 0
    trained, followed = (
        re.search(rf"ends at {steps} (\w+)", (folder / name).read_text())[1]
        for name in ("trainer", "sampler")
    )
    assert trained == followed
    return trained


def task_of(example):
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / example / "task.py")))


@pytest.mark.parametrize("processes", ["follow"], indirect=True)
def test_killed_on_either_side_and_nothing_lost(processes, tmp_path):
    steps = ["--steps", "240"]
    trainer, sampler = processes("trainer", *steps), processes("sampler")
    killed_at(sampler, tmp_path / "sampler", 40)
    sampler = processes("sampler")
    killed_at(trainer, tmp_path / "trainer", 100)
    trainer = processes("trainer", *steps)
    killed_at(trainer, tmp_path / "trainer", 160)
    killed_at(sampler, tmp_path / "sampler", 140)
    trainer, sampler = processes("trainer", *steps), processes("sampler")
    digest = both_end(trainer, sampler, tmp_path, 240)
    task = task_of("follow")
    log, base = rl.follow.Log(tmp_path / "of_trainer" / "messages"), task.base_params()
    assert log.steps() == [*range(240)]
    params, _ = log.replay(base, rl.follow.start(base, key=task.KEY))
    assert task.digest(params) == digest


@pytest.mark.parametrize("processes", ["grpo"], indirect=True)
def test_grpo_goes_on_when_trainer_or_sampler_is_killed(processes, tmp_path):
    pytest.importorskip("tunix")
    steps = ["--steps", "60"]
    trainer, sampler = processes("trainer", *steps), processes("sampler")
    killed_at(sampler, tmp_path / "sampler", 10)
    sampler = processes("sampler")
    killed_at(trainer, tmp_path / "trainer", 26)  # its checkpoint is of step 20
    trainer = processes("trainer", *steps)
    killed_at(trainer, tmp_path / "trainer", 44)
    killed_at(sampler, tmp_path / "sampler", 35)
    trainer, sampler = processes("trainer", *steps), processes("sampler")
    digest = both_end(trainer, sampler, tmp_path, 60)
    said = (tmp_path / "trainer").read_text()
    assert "goes on from step 20" in said
    assert "lost its sampler" in said
    assert "goes on from step" in (tmp_path / "sampler").read_text()
    rewards = [float(one) for one in re.findall(r"reward (\S+)", said)]
    assert sum(rewards[-10:]) > 3 * sum(rewards[:10])
    task = task_of("grpo")
    log, (base, restore) = (
        rl.follow.Log(tmp_path / "of_trainer" / "messages"),
        rl.flax.to_tree(task.base()),
    )
    assert log.steps() == [*range(60)]
    params, _ = log.replay(base, rl.follow.start(base, key=task.KEY))
    assert task.digest(restore(params)) == digest
