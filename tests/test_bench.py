"""The folders of the bench: each imports only from those it stands on."""

import ast
import pathlib

import pytest

BENCH = pathlib.Path(__file__).parent.parent / "benchmarks"
# Floor by floor, what each folder stands on; ``tables`` shows the rows of all.
BELOW = {
    "shared": set(),
    "pods": {"shared"},
    "pretrained": {"shared"},
    "rates": {"shared"},
    "finetune": {"shared", "pretrained"},
    "speed": {"shared", "pods"},
    "federated": {"shared", "finetune"},
    "field": {"shared", "pretrained", "rates", "finetune"},
    "tables": {"shared", "pods", "federated", "field"},
}

pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="no bench beside the tests")


def imported_folders(path: pathlib.Path) -> set[str]:
    """The folders of the bench that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in named if name.startswith("benchmarks.")}
    return found


def test_every_module_is_in_a_folder():
    assert {path.name for path in BENCH.glob("*.py")} == {"__init__.py"}
    assert {path.parent.name for path in BENCH.glob("*/__init__.py")} == set(BELOW)


def test_folders_stand_on_those_before_them():
    folders = list(BELOW)
    for place, (folder, below) in enumerate(BELOW.items()):
        assert below <= set(folders[:place]), folder


@pytest.mark.parametrize("folder", BELOW)
def test_folders_import_from_below_alone(folder):
    found = set()
    for path in (BENCH / folder).rglob("*.py"):
        found |= imported_folders(path) - {folder}
    assert found == BELOW[folder]
