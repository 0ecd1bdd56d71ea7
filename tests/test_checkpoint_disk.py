"""Directories of checkpoints: names, what is left in them, full disks, read-only ones."""

import os
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raclora_jax import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STATE = {"w": jnp.arange(6.0).reshape(2, 3)}


def saved(folder, *steps):
    with checkpoint.Checkpointer(folder, 2) as checkpointer:
        for step in steps:
            checkpointer.save(step, STATE, data=step)
    return folder


def restored(folder):
    with checkpoint.Checkpointer(folder, 2) as checkpointer:
        return checkpointer.restore(STATE)


@pytest.mark.parametrize("name", ["run[1]", "lr=[1e-3]", "a\\b", "**", "a*", "a?", "a["])
def test_a_name_that_is_a_pattern_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"takes for a pattern.*choose a name without"):
        checkpoint.Checkpointer(tmp_path / name / "run", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["lr=1e-3,seed=0", "a b", "~", "$HOME", "{a}!", "日", "5", "a%20#b;c'"]
)
def test_any_other_name_is_read_back(name, tmp_path):
    folder = saved(tmp_path / name / "run", 1)
    assert restored(folder).step == 1
    assert restored(os.fsencode(folder)).step == 1


def test_a_save_that_cannot_be_read_is_seen(tmp_path, monkeypatch):
    """As where orbax saves what it cannot find again."""
    monkeypatch.setattr(checkpoint._checkpointer, "_check_name", lambda where: None)
    checkpointer = checkpoint.Checkpointer(tmp_path / "run[1]", 2)
    checkpointer.save(1, STATE)
    with pytest.raises(
        OSError, match=r"step 1 was not written.*cannot be read back.*no earlier one"
    ):
        checkpointer.wait()
    assert checkpointer.steps() == []
    checkpointer.close()


def test_a_save_that_was_taken_away_is_seen(tmp_path):
    checkpointer = checkpoint.Checkpointer(saved(tmp_path, 1), 2)
    checkpointer.save(2, STATE)
    checkpointer._manager.wait_until_finished()
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(
        OSError, match=r"step 2 was not written.*read back.*last is step 1"
    ):
        checkpointer.save(3, STATE)
    checkpointer.save(3, STATE)
    checkpointer.close()
    assert restored(tmp_path).step == 3


def test_one_that_reads_leaves_a_save_alone(tmp_path):
    """And one that saves takes away what killed saves have left."""
    half = saved(tmp_path, 1) / "2.orbax-checkpoint-tmp"
    half.mkdir()
    assert restored(tmp_path).step == 1
    assert half.exists()
    saved(tmp_path, 3)
    assert not half.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_other_folders_are_no_steps(tmp_path):
    saved(tmp_path, 1)
    for name in ("002", "copy_3", "1 (copy)", "damaged"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    assert restored(tmp_path).step == 1
    assert checkpoint.Checkpointer(tmp_path, 2).steps() == [1]


def test_numbers_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoint.Checkpointer(tmp_path, 2, keep=0)
    with pytest.raises(TypeError, match=r"keep must be an int, got 1\.5"):
        checkpoint.Checkpointer(tmp_path, 2, keep=1.5)
    checkpointer = checkpoint.Checkpointer(tmp_path, 2)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        checkpointer.save(-1, STATE)
    with pytest.raises(TypeError, match="step must be an int, got '3'"):
        checkpointer.save("3", STATE)
    assert checkpointer.steps() == []


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_the_umask_is_kept(tmp_path):
    before = os.umask(0o077)
    try:
        folder = saved(tmp_path / "run", 1)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert modes == {0o700, 0o600}


def test_folders_are_flushed(tmp_path, monkeypatch):
    """All of a save, and the folder that names it, before ``wait`` returns."""
    flushed, real = set(), os.fsync

    def fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = saved(tmp_path, 1)
    assert {p.stat().st_ino for p in [folder, *folder.rglob("*")]} <= flushed


@pytest.fixture
def mounted(tmp_path):
    """``mount(options)`` of a file system in memory, taken away after."""
    folders = []

    def mount(folder, options):
        folder.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk(mounted, tmp_path):
    """The save that does not fit is an error that names the last one, which is whole."""
    folder = mounted(tmp_path / "small", "size=512k")
    noise = jax.random.normal(jax.random.key(0), (256, 256))  # 256 KiB, incompressible
    state = {"w": noise}
    checkpointer = checkpoint.Checkpointer(folder, 2)
    checkpointer.save(1, state)
    checkpointer.wait()

    def save_and_wait():
        checkpointer.save(2, {"w": -noise})
        checkpointer.wait()

    with pytest.raises(OSError, match=r"step 2 was not written.*the last is step 1"):
        save_and_wait()
    assert checkpointer.steps() == [1]
    np.testing.assert_array_equal(checkpointer.restore(state).state["w"], noise)
    checkpointer.close()
    with checkpoint.Checkpointer(folder, 2) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(state).state["w"], noise)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_no_permission_to_write(mounted, tmp_path):
    """Also for root: the file system is read-only."""
    folder = mounted(tmp_path / "still", "size=8m")
    saved(folder, 5)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with checkpoint.Checkpointer(folder, 2) as checkpointer:
        found = checkpointer.restore(STATE)
        with pytest.raises(OSError, match=r"step 6 was not.*Read-only.*last is step 5"):
            checkpointer.save(6, found.state)
    assert found.step == 5


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write")
def test_no_permission_for_a_user(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        checkpoint.Checkpointer(tmp_path / "run", 2)
    tmp_path.chmod(0o700)
