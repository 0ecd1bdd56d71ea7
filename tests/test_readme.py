"""The README's code runs and prints what it says; its tables are the result files'."""

import ast
import pathlib
import re

import pytest

import raclora_jax as rl
from benchmarks.tables import pages as tables
from raclora_jax import (
    checkpoint,
    estimators,
    federated,
    methods,
    peft,
    quantized,
    sharding,
    theory,
)

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README beside the tests")


def test_code_runs_and_prints_what_stands_beneath(capsys):
    """Blocks run one after the other; a text block is what the one before printed."""
    blocks = re.findall(r"```(python|text)\n(.*?)```", README.read_text(), re.DOTALL)
    names, said, first = {}, "", None
    for kind, block in blocks:
        if kind == "text":
            assert block == said
            assert names["loss"] < 0.1 * first
        else:
            exec(compile(block, "README.md", "exec"), names)
            said = capsys.readouterr().out
            first = first or names["loss_fn"](names["params"], names["x"], names["y"])
    assert [kind for kind, _ in blocks].count("text") == 1


def test_three_lines_train():
    """The trainer, the state, the step in its loop."""
    _, block, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    statements = ast.parse(block).body
    assert isinstance(statements.pop(), ast.For)
    assert len(statements) == 2


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run: python -m benchmarks.tables"


def test_every_table_stands_on_a_page():
    shown = [name for page in tables.PAGES for name in tables.marked(page.read_text())]
    assert set(shown) == set(tables.TABLES)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_and_links_exist(page):
    text = (ROOT / page).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"make ([a-z]\w+)", text):
        assert f"\n{command}:" in makefile
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_reference_has_every_public_name():
    reference = (ROOT / "docs" / "reference.md").read_text()
    shown = re.findall(r"auto(?:class|function):: (\w+)$", reference, re.MULTILINE)
    namespaces = (
        rl,
        checkpoint,
        estimators,
        federated,
        rl.flax,
        methods,
        peft,
        quantized,
        sharding,
        theory,
    )
    named = {name for namespace in namespaces for name in namespace.__all__}
    assert named - {*shown} == set(), "add them to docs/reference.md"
