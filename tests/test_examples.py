"""Each example is short, runs as it is, and learns."""

import pathlib
import re
import runpy

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
# Tested by themselves: they take arguments and are longer.
PROGRAMS_OF_THEIR_OWN = {"pod", "finetune_glue", "finetune_llm", "finetune_text"}
PROGRAMS = sorted(p for p in EXAMPLES.glob("*.py") if p.stem not in PROGRAMS_OF_THEIR_OWN)

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="no examples beside the tests")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_runs_and_learns(program, monkeypatch, tmp_path, capsys):
    assert len(program.read_text().splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(program))
    said = capsys.readouterr().out.strip().splitlines()
    assert float(re.search(r"[\d.]+$", said[-1])[0]) > 0.85  # chance is 0.1
    if program.stem == "adapter":
        saved = np.load("digits.npz")
        for name, weight in names["base_params"].items():
            np.testing.assert_array_equal(saved[name], weight)
