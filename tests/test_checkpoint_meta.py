"""What a checkpoint says of itself: any change is found out, and the one before taken."""

import json
import shutil
import warnings

import jax.numpy as jnp
import pytest

import raclora_jax as rl
from raclora_jax import checkpoint
from raclora_jax.checkpoint import _everyone, _meta, _position

SPEC = rl.Spec(2, alpha=4.0, resample_every=25)
STATE = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
META = ("20", "meta", "metadata")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with checkpoint.Checkpointer(folder, SPEC) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, STATE, data={"next_index": 16 * step})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def restored(folder, spec=SPEC, **how):
    with checkpoint.Checkpointer(folder, spec) as checkpointer:
        return checkpointer.restore(STATE, **how)


def meant(found):
    """Whether it is one of the two that were saved, in all it says."""
    data = {"next_index": 16 * found.step}
    return (found.data, found.spec) == (data, SPEC) and found.step in (10, 20)


def flipped(raw, at, bit):
    return raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("word", "shift"), [("320", 0), ("4.0", 0), ("resample_every", 18), ('"step"', 8)]
)
def test_a_number_that_a_bit_has_changed_is_not_gone_on_with(word, shift, copy):
    """Of the data's position, alpha, the link's length, the step: JSON as good as any."""
    path = copy.joinpath(*META)
    raw = path.read_bytes()
    hurt = flipped(raw, raw.index(word.encode()) + shift, 1)
    assert json.loads(hurt) != json.loads(raw)
    path.write_bytes(hurt)
    with pytest.warns(UserWarning, match=r"step 20 \(.*meta is not what was written\)"):
        found = restored(copy)
    assert found.step == 10
    assert meant(found)


def test_a_flip_anywhere_falls_back(saved, tmp_path):
    raw = saved.joinpath(*META).read_bytes()
    for at in range(0, len(raw), 53):
        folder = tmp_path / str(at)
        shutil.copytree(saved, folder)
        folder.joinpath(*META).write_bytes(flipped(raw, at, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert meant(restored(folder)), at


def test_a_step_that_was_renamed_is_found_out(copy):
    (copy / "20").rename(copy / "30")
    with pytest.raises(
        ValueError, match=r"step 30: .*was saved as step 20 and has been renamed"
    ):
        restored(copy, step=30)
    with pytest.warns(UserWarning, match=r"step 30 \(.*saved as step 20"):
        assert restored(copy).step == 10


def test_halves_of_two_steps_are_no_step(copy):
    """The arrays of another step, and of another checkpoint's meta."""
    shutil.rmtree(copy / "20" / "meta")
    shutil.copytree(copy / "10" / "meta", copy / "20" / "meta")
    with pytest.warns(UserWarning, match=r"saved as step 10 and has been renamed"):
        assert restored(copy).step == 10


def test_one_of_before_the_digest_is_named(copy):
    path = copy.joinpath(*META)
    meta = json.loads(path.read_text())
    del meta["digest"]
    path.write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(ValueError, match="no digest: it is damaged, or of an older"):
        restored(copy, step=20)


def test_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(_meta, "_FORMAT", 99)
        with checkpoint.Checkpointer(tmp_path, SPEC) as checkpointer:
            checkpointer.save(1, STATE)
    with pytest.raises(ValueError, match="step 1 has format 99, this version"):
        restored(tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({1: 2}, "a key must be a str, got 1 of type int"),
        ({"a": [{"b": ({2.5: 0},)}]}, "a key must be a str, got 2.5"),
        (object(), "not JSON serializable"),
    ],
)
def test_a_position_that_would_come_back_otherwise_is_refused(data, said):
    with pytest.raises(TypeError, match=f"data must be bytes or what JSON.*{said}"):
        _position.as_text(data)


def test_processes_that_differ_are_refused(monkeypatch):
    """One array is written for all; digests as two processes would tell them."""
    mine, yours = {"w": 1, "count": 2}, {"w": 1, "count": 3}
    said = [json.dumps(mine), json.dumps(yours)]
    monkeypatch.setattr(_everyone, "everyone", lambda text: said)
    with pytest.raises(ValueError, match="leaf 'count' has other numbers in another"):
        _everyone.agreed(mine)
    said[1] = said[0]
    assert _everyone.agreed(mine) == mine
