"""The folders of the bench import one way, and what measures the house counts right."""

import ast
import pathlib

import pytest

from benchmarks.shared import structure

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


HOUSE = {
    "rooms/__init__.py": "from rooms.top import first",
    "rooms/low.py": """
def last(x: "second"):  # of the chain
    '''A docstring
    of two lines.'''
    return x

class Base:
    def shared(self):
        return last(self)
""",
    "rooms/top.py": """
import rooms
from rooms import low as below
from rooms.low import Base

# Of its own.
TABLE = {"lost": below.last}

class Room(Base):
    def enter(self):  # noqa: F
        return self.shared(), self.enter()

def first():
    def inner():
        return Room.enter, rooms.first
    return inner()
""",
}


def test_a_step_is_followed_over_imports_self_and_bases(tmp_path):
    (tmp_path / "rooms").mkdir()
    for name, text in HOUSE.items():
        (tmp_path / name).write_text(text)
    found = structure.modules(tmp_path, "rooms")
    names = structure.Names(found)
    assert structure.walk(names, names.edges(), "rooms.top.first") == {
        "depth": 4,
        "functions": 4,
        "modules": 2,
        "chain": "first > enter > shared > last",
    }
    shape = structure.shape(found)
    assert shape["lines_a_body"] == [1, 3, 3]
    assert shape["comments_percent"] == round(100 * 2 / shape["lines"], 2)
