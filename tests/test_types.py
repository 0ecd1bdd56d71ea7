"""What a type checker sees of the package."""

import ast
import pathlib
from typing import get_args

import pytest

import raclora_jax as rl
from raclora_jax._core import types

SOURCES = sorted(pathlib.Path(rl.__file__).parent.rglob("*.py"))


def annotations(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
        if isinstance(node, ast.AnnAssign):
            yield node.annotation


def test_few_annotations_say_nothing():
    found = [
        ast.unparse(annotation)
        for source in SOURCES
        for annotation in annotations(ast.parse(source.read_text()))
    ]
    assert len(found) > 1000
    assert found.count("Any") < 0.1 * len(found)


def test_the_package_says_that_it_is_typed():
    assert (pathlib.Path(rl.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("side", types.Side),
        ("sketch", types.Sketch),
        ("rounding", types.Rounding),
        ("rest", types.Rest),
    ],
)
def test_the_literals_are_the_choices(field, choices):
    for choice in get_args(choices):
        assert getattr(rl.Spec(2, **{field: choice}), field) == choice
    with pytest.raises(ValueError, match=field) as refused:
        rl.Spec(2, **{field: "none of these"})
    assert all(repr(choice) in str(refused.value) for choice in get_args(choices))
