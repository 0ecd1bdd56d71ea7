"""The README's code runs, and its tables are those of the result files."""

import pathlib
import re

import pytest

from benchmarks import tables

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README beside the tests")


def test_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"] < 0.1  # it started at 1
    assert "dense/kernel" in capsys.readouterr().out


def test_tables_are_those_of_the_result_files():
    text = README.read_text()
    assert tables.filled(text) == text, "run: python -m benchmarks.tables"


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"`?make (\w+)", README.read_text()):
        assert f"\n{command}:" in makefile
