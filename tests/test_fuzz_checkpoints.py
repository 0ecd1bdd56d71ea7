"""Damaged checkpoints and logs: what was meant, an older one, or an error of ours."""

import collections
import pathlib
import traceback

import pytest

import raclora_jax
from benchmarks.pods.fuzzing.checkpoints import checkpoint_cases, log_cases
from raclora_jax.checkpoint import _checkpointer
from raclora_jax.checkpoint._meta import opened

OURS = pathlib.Path(raclora_jax.__file__).parent

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def ended(case):
    """How a case ends, in a word; what is neither right nor refused by us is raised."""
    try:
        found = case.read()
    except (ValueError, TypeError, OSError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert OURS in pathlib.Path(frames[-1].filename).parents, case.name
        return "refused"
    return "right" if case.right(found) else "wrong"


def told(cases):
    return collections.Counter(map(ended, cases))


def test_checkpoints(tmp_path):
    ends = told(checkpoint_cases(0, 40, tmp_path))
    assert not ends["wrong"]
    assert ends["right"] > ends["refused"] > 0


def test_logs(tmp_path):
    ends = told(log_cases(0, 40, tmp_path))
    assert not ends["wrong"]
    assert ends["refused"] > ends["right"]


def test_what_is_wrong_is_found(tmp_path, monkeypatch):
    """Where nothing compares a step with its name, renamed ones are the wrong ones."""
    monkeypatch.setattr(
        _checkpointer, "opened", lambda meta, step: opened(meta, meta.get("step"))
    )
    assert told(checkpoint_cases(0, 32, tmp_path))["wrong"]
