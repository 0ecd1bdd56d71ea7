"""The bench of the field: its entries, its budget, its runs and its ranking."""

import inspect

import jax
import numpy as np
import pytest
from field import PARTS

from benchmarks.field import entries, report, runs, study, tasks
from raclora_jax import methods

SEEDS = (0, 1, 2)


def runner(name, task, rank=1):
    return runs.Runner(task, study.entry_of(name), rank, SEEDS)


def test_every_public_method_has_an_entry():
    names = [entry.name for entry in entries.ENTRIES]
    assert len(set(names)) == len(names)
    source = inspect.getsource(entries)
    # Ours is built of the public functions, so that no gradient is at full size.
    for name in set(methods.__all__) - PARTS - {"raclora"}:
        assert f"methods.{name}" in source, name


@pytest.mark.parametrize("entry", entries.ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_fits_every_small_task(entry):
    for task in (tasks.counterexample(), tasks.logistic(), tasks.factorisation()):
        facts = runs.facts(task, entry, task.rank)
        assert facts["trained"] > 0
        assert facts["optimizer_bytes"] >= 0


def test_a_run_is_the_formula():
    """Full descent on the quadratic, its rate warmed up and cooled, by hand."""
    task, steps, rate = tasks.counterexample(), 40, 0.05
    (found,) = runner("full SGD", task).run([(rate, 1)], steps)
    start_key, _ = jax.random.split(jax.random.key(1))
    w = np.asarray(task.start(start_key)["w"], np.float64)
    diagonal = np.ones((3, 3))
    diagonal[0, 0] = 10
    for step in range(steps):
        warm = 0.1 * steps
        cooled = np.clip((step - warm) / (steps - warm), 0, 1)
        now = rate * min((step + 1) / warm, 1) * (1 + np.cos(np.pi * cooled)) / 2
        w = w - now * (diagonal * w + 1)
    gap = np.sum(diagonal * (w + 1 / diagonal) ** 2) / 2
    np.testing.assert_allclose(found, (gap, gap), rtol=1e-4)


def test_cases_do_not_know_each_other():
    one = runner("LoRA", tasks.counterexample())
    cases = [(0.01, 0), (0.02, 1), (1e6, 2), (0.02, 0)]
    together = one.run(cases, 30)
    for case, found in zip(cases, together, strict=True):
        np.testing.assert_allclose(one.run([case], 30), [found], rtol=1e-5)
    assert together[2][0] > 1e6 > together[1][0]


def test_measure_takes_the_best_rate_of_the_first_seed():
    one = runner("full SGD", tasks.counterexample())
    row = runs.measure(one, runs.RATES, 60, refine=True)
    best = min(row["tried"], key=lambda pair: pair[1])
    assert row["rate"] == best[0]
    assert row["loss"][0] == pytest.approx(best[1])
    tried = {rate for rate, _ in row["tried"]}
    assert len(tried) == len(runs.RATES) + 2
    assert {row["rate"] / 2, row["rate"] * 2} & tried
    assert len(row["loss"]) == len(SEEDS)


def test_rank_within_a_budget():
    """Rank r of LoRA keeps two moments of 44 r numbers and a counter of each side."""
    task = tasks.factorisation()._replace(top_rank=4)
    lora, adam = study.entry_of("LoRA"), study.entry_of("full Adam")
    bytes_of = [runs.facts(task, lora, rank)["optimizer_bytes"] for rank in (1, 2, 3)]
    assert runs.rank_within(task, lora, bytes_of[1]) == 2
    assert runs.rank_within(task, lora, bytes_of[2] - 1) == 2
    assert runs.rank_within(task, lora, bytes_of[0] - 1) is None
    assert runs.rank_within(task, adam, bytes_of[2]) is None
    free = study.entry_of("RAC-LoRA, orthogonal")
    assert runs.rank_within(task, free, 0) == 4


def test_places_share_ties_and_put_lost_runs_last():
    def row(method, *losses):
        return {"study": "toy, equal steps", "task": "toy", "method": method} | {
            "loss": losses
        }

    rows = [
        row("a", 1e-12, 2.0),
        row("b", 1e-15, 1.0),
        row("c", float("nan"), 3.0),
    ]
    found = report.places(rows, "toy", "equal steps")
    # Seed 0: a and b share the places 1 and 2, c is lost; seed 1: b, a, c.
    assert found == {"a": (1.75 - 1) / 2, "b": (1.25 - 1) / 2, "c": 1.0}
