"""How large the house is, and how far one step goes through it, commit by commit.

Files, lines, bodies of functions and comments of each part; the longest chain of
functions from one step, and how many it reaches; what the bench's folders import of each
other. All by the standard library's parser, so a function reaches those that it names:
names are followed over imports and ``self``, and lost where a table or another object
holds them. A function within another is part of that one.

    python -m benchmarks.shared.structure [COMMIT ...]
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import pathlib
import re
import statistics
import subprocess
import tarfile
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.shared import rows, timing

PARTS = ("raclora_jax", "benchmarks", "examples", "tests")
STEPS = ("Run.step", "Descent.update", "apply.apply_updates", "gradient.value_and_grad")
_DIRECTIVE = re.compile(r"#!|#\s*(type:|noqa|ruff:|mypy:|fmt:|pragma|codespell)")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Edges = dict[str, set[str]]


class Module(NamedTuple):
    """A file of Python, by the name that imports it."""

    name: str
    text: str
    tree: ast.Module


def modules(root: pathlib.Path, part: str) -> list[Module]:
    """All modules of a part of the tree."""
    found = []
    for path in sorted((root / part).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        text = path.read_text()
        found.append(Module(name.removesuffix(".__init__"), text, ast.parse(text)))
    return found


# Shape -------------------------------------------------------------------------------


def shape(found: list[Module]) -> dict[str, Any]:
    """Lines of files and bodies, each as median, ninth tenth and most; comments."""
    lengths = [len(module.text.splitlines()) for module in found]
    bodies = [
        body_lines(node)
        for module in found
        for node in ast.walk(module.tree)
        if isinstance(node, _FUNCTIONS)
    ]
    comments = sum(comment_lines(module.text) for module in found)
    return {
        "files": len(found),
        "lines": sum(lengths),
        "lines_a_file": spread(lengths),
        "lines_a_body": spread(bodies),
        "comments_percent": round(100 * comments / sum(lengths), 2),
    }


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement behind the docstring to the end."""
    documented = ast.get_docstring(function, clean=False) is not None
    statements = function.body[documented:]
    return (function.end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def comment_lines(text: str) -> int:
    """Lines with a comment for readers, of its own or behind code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(_DIRECTIVE.match(comment) is None for comment in comments)


def spread(values: Iterable[int]) -> list[int]:
    """Median, ninth tenth and most."""
    values = sorted(values)
    return [int(statistics.median(values)), values[len(values) * 9 // 10], values[-1]]


# One step ----------------------------------------------------------------------------


class Names:
    """What the names in a package's functions stand for.

    Args:
      found: Its modules.

    Attributes:
      nodes: Functions, methods and classes by full name.
    """

    def __init__(self, found: list[Module]):
        self.nodes: dict[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef] = {}
        self._modules = {module.name for module in found}
        self._imports: dict[str, str] = {}
        for module in found:
            self._define(module.tree, module.name)
            for name, full in imports(module.tree):
                self._imports[f"{module.name}.{name}"] = full

    def _define(self, node: ast.AST, scope: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                self.nodes[f"{scope}.{child.name}"] = child
            if isinstance(child, ast.ClassDef):
                self._define(child, f"{scope}.{child.name}")
            elif not isinstance(child, _FUNCTIONS):
                self._define(child, scope)

    def edges(self) -> Edges:
        """The functions that each function names, itself left out."""
        return {
            name: set(self._reached(name, node)) - {name}
            for name, node in self.nodes.items()
            if isinstance(node, _FUNCTIONS)
        }

    def module(self, name: str) -> str:
        """The module that a full name is of."""
        while name not in self._modules:
            name = name.rpartition(".")[0]
        return name

    def _reached(self, function: str, node: ast.AST) -> Iterator[str]:
        scope = function.rpartition(".")[0]
        for said in spoken(node):
            first, _, rest = said.partition(".")
            if first in ("self", "cls"):
                full = self._full(f"{scope}.{rest.partition('.')[0]}")
            else:
                full = self._full(f"{self.module(function)}.{said}")
            if full and isinstance(self.nodes[full], _FUNCTIONS):
                yield full

    def _full(self, name: str) -> str | None:
        """What a name leads to, over imports and base classes."""
        scope, _, last = name.rpartition(".")
        node = self.nodes.get(scope)
        if name in self.nodes:
            return name
        if name in self._imports:
            return self._full(self._imports[name])
        if scope in self._imports:
            return self._full(f"{self._imports[scope]}.{last}")
        if isinstance(node, ast.ClassDef):
            bases = filter(None, map(dotted, node.bases))
            places = (f"{self.module(scope)}.{base}.{last}" for base in bases)
            return next(filter(None, map(self._full, places)), None)
        return None


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that a module imports, each with its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name, alias.name


def dotted(node: ast.AST) -> str | None:
    """``a.b.c`` of an expression that is no more than that."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def spoken(node: ast.AST) -> Iterator[str]:
    """The names in a function, its annotations left out."""
    name = dotted(node)
    if name:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        annotates = child in (getattr(node, "annotation", 0), getattr(node, "returns", 0))
        if not annotates:
            yield from spoken(child)


def walk(names: Names, edges: Edges, entry: str) -> dict[str, Any]:
    """The longest chain from a function, and all that it reaches, itself counted."""
    reached = {entry} | above(edges, entry)
    chain = longest(edges, entry)
    return {
        "depth": len(chain),
        "functions": len(reached),
        "modules": len({names.module(name) for name in reached}),
        "chain": " > ".join(name.rpartition(".")[2] for name in chain),
    }


def above(edges: Edges, entry: str) -> set[str]:
    """All that one leads to."""
    seen: set[str] = set()
    waiting = [entry]
    while waiting:
        new = edges[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def longest(edges: Edges, entry: str) -> list[str]:
    """The longest chain, no link of which leads back."""
    chain: list[str] = []

    @functools.cache
    def onwards(name: str) -> list[str]:
        chain.append(name)
        ways = [onwards(other) for other in sorted(edges[name] - set(chain))]
        chain.pop()
        return [name, *max(ways, key=len, default=[])]

    return onwards(entry)


# Imports of the bench ----------------------------------------------------------------


def folders(found: list[Module]) -> dict[str, Any]:
    """What stands at the top of the bench, folders or modules, and who imports whom."""
    edges: Edges = {}
    for module in found:
        _, _, name = module.name.partition(".")
        full = (full for _, full in imports(module.tree))
        named = {one.split(".")[1] for one in full if one.startswith("benchmarks.")}
        if name:
            edges.setdefault(name.split(".")[0], set()).update(named)
    edges = {box: others - {box} for box, others in edges.items()}
    return {
        "boxes": len(edges),
        "arrows": sum(map(len, edges.values())),
        "floors": max(len(longest(edges, box)) for box in edges),
        "in_circles": sum(box in above(edges, box) for box in edges),
    }


def measure(root: pathlib.Path) -> list[dict[str, Any]]:
    """All rows of a tree."""
    parts = {part: modules(root, part) for part in PARTS}
    names = Names(parts["raclora_jax"])
    edges = names.edges()
    entries = {name: [e for e in edges if e.endswith(f".{name}")] for name in STEPS}
    return [
        *({"study": "shape", "of": part} | shape(own) for part, own in parts.items()),
        *(
            {"study": "one step", "of": name} | walk(names, edges, entry)
            for name, (entry,) in entries.items()
        ),
        {"study": "imports", "of": "benchmarks"} | folders(parts["benchmarks"]),
    ]


def git(*words: str) -> bytes:
    """What git says of this repository."""
    return subprocess.run(
        ["git", *words], cwd=rows.ROOT, capture_output=True, check=True
    ).stdout


def main() -> None:
    """Measures the commits, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="*", default=["HEAD"])
    parser.add_argument("--out", type=pathlib.Path, default=rows.folder(__file__))
    options = parser.parse_args()
    found = []
    for commit in options.commits:
        short = git("rev-parse", "--short=12", commit).decode().strip()
        with (
            tempfile.TemporaryDirectory() as root,
            tarfile.open(fileobj=io.BytesIO(git("archive", short))) as archive,
        ):
            archive.extractall(root, filter="data")
            found += [{"tree": short} | row for row in measure(pathlib.Path(root))]
    for study in dict.fromkeys(row["study"] for row in found):
        timing.print_rows([row for row in found if row["study"] == study], study)
    words = " ".join(["python -m benchmarks.shared.structure", *options.commits])
    rows.save(options.out / "structure.json", words, found)


if __name__ == "__main__":
    main()
