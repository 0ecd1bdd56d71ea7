"""The command that needs neither checkpoint nor data: small, from start to end."""

import pathlib
import re

import pytest
from programs import ended, launch

pytest.importorskip("tunix")
pytest.importorskip("tokenizers")
finetune_text = pytest.importorskip("finetune_text")  # an example beside the tests
fresh = pytest.importorskip("finetuning.fresh")


@pytest.fixture
def small(monkeypatch):
    """Less text and one narrow layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"head_dim": 8, "vocab_size": 300}
    monkeypatch.setattr(fresh, "CONFIG", fresh.CONFIG | sizes)
    monkeypatch.setattr(fresh, "VOCABULARY", 300)
    for name in ("reference", "library"):
        text = getattr(fresh, name)()[:60_000]
        monkeypatch.setattr(fresh, name, lambda text=text: text)


def test_it_ends_with_a_lower_loss(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "text"
    words = ["--start-steps=30", "--steps=60", f"--out={out}"]
    launch(monkeypatch, finetune_text, *words)
    said = capsys.readouterr().out
    before, after = map(
        float, re.search(r"code: ([\d.]+) before, ([\d.]+) after", said).groups()
    )
    assert after < before - 0.005
    for name in ("reference", "library"):
        assert (out / name / "report.html").exists()
        assert (out / name / "model" / "tokenizer.json").exists()
    assert ended(monkeypatch, finetune_text, *words) == 2
    assert re.fullmatch(r".* exists; name another .*\n", capsys.readouterr().err)
    launch(monkeypatch, finetune_text, *words, "--resume")
    assert f"code: {before:.3f} before, {after:.3f} after" in capsys.readouterr().out


def test_the_texts_are_those_of_python():
    assert "assignment" in fresh.reference()
    assert "def " in fresh.library()
    assert len(fresh.library()) <= 2**21


def test_the_makefile_runs_it():
    root = pathlib.Path(finetune_text.__file__).parents[1]
    makefile = (root / "Makefile").read_text()
    assert "finetune-text: $(VENV)/.installed-finetuning" in makefile
    assert "examples/finetune_text.py" in makefile
