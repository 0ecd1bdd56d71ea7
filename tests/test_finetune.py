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

from benchmarks.finetune import data, training
from benchmarks.finetune import study as finetune
from raclora_jax import methods

MNIST = pathlib.Path(
    os.environ.get(
        "RACLORA_MNIST_DIR", pathlib.Path(__file__).parents[2] / "shared/data/mnist"
    )
)


def small(monkeypatch, tmp_path, *options):
    """Runs the program with one learning rate, few steps and three methods."""
    chosen = ("full fine-tuning", "Chain of LoRA, left", "RAC-LoRA, right")
    table = [entry for entry in finetune.entries() if entry.name in chosen]
    monkeypatch.setattr(finetune, "entries", lambda: table)
    setting = finetune.Setting(60, 32, 3, (10,), (1000,), learning_rates=(1e-2, 3e-2))
    monkeypatch.setattr(finetune, "Setting", lambda *a, **k: setting)
    argv = ["finetune", "--out", str(tmp_path), "--seeds", "2", *options]
    monkeypatch.setattr(sys, "argv", argv)
    finetune.main()


def test_program_writes_table_figure_rows_and_weights(monkeypatch, tmp_path, capsys):
    small(monkeypatch, tmp_path)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["settings"]["seeds"] == [0, 1]
    assert {"commit", "versions", "device"} <= record.keys()
    for row in record["rows"]:
        assert row["method"].split(",")[0] in said
        assert len(row["accuracy"]) == 2
        assert np.shape(row["curves"]) == (2, 3)
        assert row["accuracy_mean"] == pytest.approx(np.mean(row["accuracy"]), abs=1e-2)
    full, _, ours = record["rows"]
    assert (full["trained"], ours["trained"]) == (8645, 192)
    assert ours["accuracy_mean"] > 50  # chance is 20
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    # The line that was printed loads the weights, and they are those of seed 0.
    line = said.strip().splitlines()[-1]
    weights = eval(line, {"flax": flax, "open": open})
    _, task = data.digits()
    assert 100 * float(training.accuracy(weights, task.test)) == pytest.approx(
        ours["accuracy"][0], abs=1e-3
    )


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
    for entry in finetune.entries():
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
    names = [entry.name for entry in finetune.entries()]
    assert names[0] == "full fine-tuning"
    assert names[-2:] == ["RAC-LoRA, left", "RAC-LoRA, right"]
    assert len(names) == 11
    method = finetune.entries()[0].build(None)(lambda _: 0.1, jax.random.key(0))
    assert isinstance(method, methods.Method)
