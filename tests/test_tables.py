"""The verdict and the figures that the bench writes for README and docs."""

import re

import pytest

from benchmarks.tables import figures, verdict
from benchmarks.tables.names import named


@pytest.mark.parametrize(
    ("ours", "others", "said"),
    [
        ([3.0, 3.1, 3.2], [1.0, 1.0, 1.0], "ahead by 2.100"),
        ([1.0, 1.0, 1.0], [3.0, 3.1, 3.2], "behind by 2.100"),
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], "slightly ahead by 1.500"),
        ([1.0, 2.0, 3.0], [2.5, 2.5, 2.5], "level (-0.500)"),
    ],
)
def test_a_lead_is_said_with_its_spread_in_mind(ours, others, said):
    assert str(verdict.lead(ours, others)) == said


def test_losses_count_seed_by_seed():
    """The spread of seeds that both methods share is none of the difference."""
    assert str(verdict.lead([-1.0, -2.0], [-1.1, -2.1], 1)) == "ahead by 0.1"


def test_verdict_has_a_row_for_each_situation():
    head, _, *lines = verdict.table("docs/").splitlines()
    assert len(lines) == 15
    assert {line.count("|") for line in (head, *lines)} == {5}
    assert [line.replace("(docs/", "(") for line in lines] == (
        verdict.table("").splitlines()[2:]
    )


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_those_of_the_result_files(name, tmp_path):
    """Every word and number in them."""
    figures.draw(tmp_path)
    drawn, kept = (
        re.findall(">([^<>]+)</(?:text|tspan)>", (folder / f"{name}.svg").read_text())
        for folder in (tmp_path, figures.FOLDER)
    )
    assert drawn
    assert drawn == kept, "run: python -m benchmarks.tables"


def test_pages_name_the_method():
    assert named("ours, left") == "RAC-LoRA, left"
    assert named("hours of four") == "hours of four"
