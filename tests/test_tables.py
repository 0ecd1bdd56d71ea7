"""The verdict that the bench writes for README and docs."""

import pytest

from benchmarks.tables import verdict
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
    assert len(lines) == 12
    assert {line.count("|") for line in (head, *lines)} == {5}
    assert [line.replace("(docs/", "(") for line in lines] == (
        verdict.table("").splitlines()[2:]
    )


def test_pages_name_the_method():
    assert named("ours, left") == "RAC-LoRA, left"
    assert named("hours of four") == "hours of four"
