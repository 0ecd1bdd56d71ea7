"""Each example is short, runs as it is, and learns."""

import pathlib
import re
import runpy
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
# Tested by themselves: they take arguments and are longer.
PROGRAMS_OF_THEIR_OWN = {"pod", "finetune_glue", "finetune_llm", "finetune_text"}
OTHERS = PROGRAMS_OF_THEIR_OWN | {"needs"}
PROGRAMS = sorted(p for p in EXAMPLES.glob("*.py") if p.stem not in OTHERS)

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="no examples beside the tests")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_runs_and_learns(program, monkeypatch, tmp_path, capsys):
    assert len(program.read_text().splitlines()) <= 64
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(program))
    said = capsys.readouterr().out.strip().splitlines()
    assert float(re.search(r"[\d.]+$", said[-1])[0]) > 0.85  # chance is 0.1
    if program.stem == "adapter":
        saved = np.load("digits.npz")
        for name, weight in names["base_params"].items():
            np.testing.assert_array_equal(saved[name], weight)


@pytest.fixture
def unloaded():
    """The programs and their rooms are imported anew, and are later what they were."""

    def ours():
        return {n: m for n, m in sys.modules.items() if n.startswith("finetun")}

    held = ours()
    for name in held:
        del sys.modules[name]
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(held)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("program", "package", "extra"),
    [
        ("adapter", "sklearn", "examples"),
        ("dropin", "sklearn", "examples"),
        ("linen", "flax", "examples"),
        ("nnx", "flax", "examples"),
        ("pod", "grain", "pod"),
        ("finetune_glue", "tokenizers", "finetuning"),
        ("finetune_llm", "tunix", "finetuning"),
        ("finetune_text", "tunix", "finetuning"),
    ],
)
def test_a_missing_package_is_one_line(program, package, extra, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith(f"{package}."):  # would be found without its package
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [f"{program}.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{program}.py"), run_name="__main__")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    wanted = f"{program}.py: needs {package}: pip install 'raclora-jax[{extra}]'\n"
    assert said == wanted
