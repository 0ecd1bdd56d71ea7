"""The main job, small; and on MNIST where its files are at hand."""

import json
import os
import pathlib
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.finetune import data, entries, mnist_rules, training
from benchmarks.finetune import study as finetune
from raclora_jax import methods

MNIST = pathlib.Path(
    os.environ.get(
        "RACLORA_MNIST_DIR", pathlib.Path(__file__).parents[2] / "shared/data/mnist"
    )
)


def small(monkeypatch, tmp_path, *options):
    """Runs the program with two learning rates, few steps and three methods a table."""
    chosen = {
        "adam": ("full fine-tuning", "Chain of LoRA, left", "RAC-LoRA, right"),
        "orthogonal": ("full fine-tuning", "LoRA, rank 1", "RAC-LoRA, rank 1, block"),
    }
    for study, names in chosen.items():
        make, inside = finetune.STUDIES[study]
        table = [entry for entry in make() if entry.name in names]
        monkeypatch.setitem(finetune.STUDIES, study, (lambda t=table: t, inside))
    setting = finetune.Setting(60, 32, 3, (10,), (1000,), learning_rates=(1e-2, 3e-2))
    monkeypatch.setattr(finetune, "Setting", lambda *a, **k: setting)
    argv = ["finetune", "--out", str(tmp_path), "--seeds", "2", *options]
    monkeypatch.setattr(sys, "argv", argv)
    finetune.main()


def test_program_writes_tables_figures_rows_and_weights(monkeypatch, tmp_path, capsys):
    small(monkeypatch, tmp_path)
    said = capsys.readouterr().out
    tables = []
    for name in ("digits", "digits_orthogonal"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["settings"]["seeds"] == [0, 1]
        assert {"commit", "versions", "device"} <= record.keys()
        for row in record["rows"]:
            assert row["method"] in said
            assert len(row["accuracy"]) == 2
            assert np.shape(row["curves"]) == (2, 3)
            mean = np.mean(row["accuracy"])
            assert row["accuracy_mean"] == pytest.approx(mean, abs=1e-2)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        tables.append(record["rows"])
    (full, _, ours), (_, lora, block) = tables
    assert (full["trained"], ours["trained"], block["trained"]) == (8645, 192, 192)
    assert (full["optimizer_bytes"], ours["optimizer_bytes"]) == (69168, 1544)
    assert lora["optimizer_bytes"] == block["optimizer_bytes"] == 0
    assert min(ours["accuracy_mean"], block["accuracy_mean"]) > 50  # chance is 20
    # The line that was printed loads the weights of seed 0 of the best of ours.
    line = said.strip().splitlines()[-1]
    weights = eval(line, {"flax": flax, "open": open})
    _, task = data.digits()
    best = max(ours, block, key=lambda row: row["validation"])
    assert 100 * float(training.accuracy(weights, task.test)) == pytest.approx(
        best["accuracy"][0], abs=1e-3
    )


@pytest.mark.slow
def test_one_study_alone(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "--studies", "orthogonal")
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits_orthogonal.json",
        "digits_orthogonal.png",
        "raclora_digits.msgpack",
    }


def test_tasks_do_not_share_images():
    before, after = data.digits()
    assert set(np.unique(before.train.labels)) == set(np.unique(after.test.labels))
    parts = [before.train, before.validation, before.test, *after]
    images = [image.tobytes() for part in parts for image in part.images]
    assert len(set(images)) == len(images) == 1797
    assert len(after.refit().train.labels) == len(after.train.labels) + len(
        after.validation.labels
    )


def test_batches_visit_every_image_once_an_epoch():
    order = np.asarray(training.batches(jax.random.key(0), 20, 4, 12))
    assert order.shape == (12, 4)
    for epoch in (order[:5], order[5:10]):
        assert sorted(epoch.ravel()) == list(range(20))
    assert not np.array_equal(order[:5], order[5:10])


def test_mnist_needs_its_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", "--data", "mnist"])
    with pytest.raises(SystemExit):
        finetune.main()
    assert "--data-dir" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"train-images.*four gzipped idx files"):
        data.mnist(tmp_path)


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST's idx files are not at hand")
def test_rank_one_steps_learn_mnist():
    """A short run on the real images: far above Asymmetric LoRA of the same budget."""
    before, after = data.mnist(MNIST)
    assert len(before.test.labels) + len(after.test.labels) == 10_000
    params = finetune.pretrain(before, steps=300, batch=128)
    scores = {}
    for entry in entries.adam():
        if entry.name in ("RAC-LoRA, right", "Asymmetric LoRA, right"):
            run = training.runner(
                entry.build(10 if entry.chained else None),
                after,
                steps=1500,
                batch=128,
                blocks=1,
            )
            result = run(params, jnp.float32(1e-2), jax.random.key(0))
            scores[entry.name] = float(result.test[-1])
    assert scores["RAC-LoRA, right"] > 0.93
    assert scores["RAC-LoRA, right"] > scores["Asymmetric LoRA, right"] + 0.05


def test_full_is_the_first_row_and_ours_are_the_last():
    names = [entry.name for entry in entries.adam()]
    assert names[0] == "full fine-tuning"
    assert names[-2:] == ["RAC-LoRA, left", "RAC-LoRA, right"]
    assert len(names) == 11
    method = entries.adam()[0].build(None)(lambda _: 0.1, jax.random.key(0))
    assert isinstance(method, methods.Method)


def test_orthogonal_entries_keep_no_state_and_adapt_every_kernel():
    params = training.MLP().init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    biases, widths = 64 + 64 + 5, [(100, 64), (64, 64), (64, 5)]
    for entry in entries.orthogonal():
        method = entry.build(10 if entry.chained else None)(0.1, jax.random.key(0))
        name, trained = entry.name, method.trained(params)
        rank = entries.RANK if f"rank {entries.RANK}" in name else 1
        pairs = rank * sum(map(sum, widths))
        sketched = rank * (100 + 64 + (5 if rank > 1 else 64))
        expected = {
            "full fine-tuning": sum(m * n for m, n in widths) + biases,
            "LoRA": pairs,
            "Chain of LoRA": pairs,
            "RAC-LoRA": sketched,
        }[name.partition(",")[0]]
        assert trained == expected, name
        state = {"full fine-tuning": 8 * biases, "RAC-LoRA, rank 16, Adam": 8 * trained}
        assert method.optimizer_bytes(params) == pytest.approx(
            state.get(name, 0), abs=8
        ), name


def test_cells_of_the_rules_study_are_all_there_once():
    cells = mnist_rules.cells()
    assert len(cells) == len(set(cells))
    ours = [cell for cell in cells if cell.side == "right"]
    assert len(ours) == 3 * 4 * 3 * 2  # rules, links, ranks, laws


@pytest.mark.parametrize(
    ("cell", "trained"),
    [
        (mnist_rules.Cell("RAC-LoRA", "orthogonal", 16, 5, "block", "right"), 2128),
        (mnist_rules.Cell("Chain of LoRA", "orthogonal", 1, 5), 325),
    ],
)
def test_a_cell_is_tuned_and_measured(monkeypatch, cell, trained):
    """On scikit-learn's digits, shortly."""
    before, after = data.digits()
    params = finetune.pretrain(before, steps=100, batch=64)
    monkeypatch.setattr(mnist_rules, "_begin", lambda folder: (params, after, 120))
    row = mnist_rules.row_of(pathlib.Path(), cell)
    assert mnist_rules.Cell(*(row[name] for name in cell._fields)) == cell
    assert (row["trained"], row["optimizer_bytes"]) == (trained, 0)
    rates, scores = zip(*row["tried"], strict=True)
    assert row["learning_rate"] == rates[scores.index(max(scores))]
    assert rates[0] < row["learning_rate"] < rates[-1]
    assert row["accuracy_mean"] == pytest.approx(np.mean(row["accuracy"]), abs=1e-2)
    assert row["accuracy_mean"] > 50  # chance is 20
