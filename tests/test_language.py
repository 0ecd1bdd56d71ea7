"""The language study: checkpoint and tokenizer are read right, and methods learn."""

import json
import os
import pathlib
import struct
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import raclora_jax as rl
from benchmarks.pretrained import entries as contenders
from benchmarks.pretrained import (
    forgetting,
    glue,
    language,
    noise,
    rules,
    stories,
    texts,
    wide,
)
from benchmarks.pretrained import run as contest
from benchmarks.shared import results as standings
from raclora_jax._chain.inner import restarted

DATA = pathlib.Path(
    os.environ.get("RACLORA_DATA_DIR", pathlib.Path(__file__).parents[2] / "shared/data")
)
CHECKPOINT = DATA / "stories260k" / "stories260K.bin"
pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no checkpoint here")


@pytest.fixture(scope="module")
def task():
    return contest.Task(DATA)


@pytest.fixture(scope="module")
def shallow():
    """The study on the first layer alone, which compiles in a fifth of the time."""
    small = contest.Task(DATA)
    model = small.model
    small.model = model._replace(
        config=model.config._replace(layers=1),
        layers={"layer_0": model.layers["layer_0"]},
    )
    return small


def test_checkpoint_has_the_shapes_of_its_header(task):
    model = task.model
    assert model.config == (64, 172, 5, 8, 4, 512, 512)
    shapes = {name: w.shape for name, w in model.layers["layer_4"].items()}
    square, shared = (64, 64), (64, 32)
    assert shapes == {
        **{"wq": square, "wk": shared, "wv": shared, "wo": square},
        **{"w1": (64, 172), "w2": (172, 64), "w3": (64, 172)},
    }
    assert sum(w.size for w in jax.tree.leaves(model.layers)) == 226_560
    assert model.rest["embedding"].shape == (512, 64)


def test_loss_on_shakespeare_before_tuning(task):
    assert task.validation_loss(task.model.layers) == pytest.approx(5.055, abs=5e-3)


def test_model_tells_the_story_it_is_known_for(task):
    _, tokenizer = stories.files(DATA)
    told = tokenizer.decode(stories.greedy(task.model, 40))
    assert told.startswith(" Once upon a time, there was a little girl named Lily.")


def test_attention_sees_no_later_token(task):
    model, tokens = task.model, np.arange(300, 320)[None]
    changed = tokens.copy()
    changed[0, 12] = 7
    one, other = (
        stories.logits(model.layers, model.rest, t, model.config)
        for t in (tokens, changed)
    )
    np.testing.assert_allclose(one[0, :12], other[0, :12], atol=1e-5)
    assert float(jnp.max(jnp.abs(one[0, 12:] - other[0, 12:]))) > 0.1


@pytest.mark.parametrize("text", ["To be,  or not", "née 7 £\n\nHAMLET:\n", " a"])
def test_tokens_spell_the_text(text):
    _, tokenizer = stories.files(DATA)
    assert tokenizer.decode(tokenizer.encode(text)) == " " + text


def test_encoding_words_apart_changes_nothing():
    _, tokenizer = stories.files(DATA)
    text = "Before we proceed any further, hear me  speak.\nAll:\nSpeak!"
    whole = np.array(tokenizer._word(" " + text))
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


def test_training_text_and_validation_text_do_not_meet(task):
    assert (len(task.text.train), len(task.text.validation)) == (623_343, 70_021)
    batch = next(task.batches(0, 10, 8))
    assert batch.shape == (10, 8, 65)
    np.testing.assert_array_equal(batch, next(task.batches(0, 10, 8)))
    assert (batch != next(task.batches(1, 10, 8))).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw[:20], "hold no header"),
        (lambda raw: raw[:-4], "takes 1056540 bytes, the file has 1056536"),
        (lambda raw: raw + b"\0" * 4, "the file has 1056544"),
        (lambda raw: struct.pack("<i", 128) + raw[4:], "dim=128"),
        (lambda raw: struct.pack("<7i", 64, 172, 5, 8, 3, 512, 512) + raw[28:], "heads"),
        (lambda raw: struct.pack("<7i", 64, 172, 5, 8, 4, -512, 512) + raw[28:], "tied"),
        (lambda raw: raw[:28] + struct.pack("<f", np.nan) + raw[32:], "not all"),
    ],
)
def test_wrong_checkpoint_is_refused(tmp_path, change, said):
    path = tmp_path / "model.bin"
    path.write_bytes(change(CHECKPOINT.read_bytes()))
    with pytest.raises(ValueError, match=said):
        stories.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda raw: raw[:-3], "ends before 512"), (lambda raw: raw + b"x", "left behind")],
)
def test_wrong_tokenizer_is_refused(tmp_path, change, said):
    path = tmp_path / "tok.bin"
    path.write_bytes(change((CHECKPOINT.parent / "tok512.bin").read_bytes()))
    with pytest.raises(ValueError, match=said):
        stories.Tokenizer(path, 512)


# One of each kind; the others differ in a number.
KINDS = {
    "full Adam",
    "full orthogonal",
    "LoRA r6 Adam",
    "LoRA r6 orthogonal",
    "Chain of LoRA r6 orthogonal",
    "Asymmetric LoRA r12 Adam",
    "RAC-LoRA r12 as published",
    "RAC r12 Adam",
    "RAC r3 orthogonal",
    "RAC r16 orthogonal, momentum 0.9",
    "RAC r12 orthogonal, second moment",
    "RAC r16 orthogonal, sides in turn",
    "RAC r16 orthogonal, ranks 6 attention, 21 feed-forward",
    "RAC r32 orthogonal, link 1",
}


def test_names_of_contenders_are_unique():
    names = [entry.name for entry in language.everything()]
    assert len(set(names)) == len(names)
    assert set(contenders.LONG) | KINDS <= set(names)


@pytest.mark.parametrize(
    "entry",
    [entry for entry in language.everything() if entry.name in KINDS],
    ids=lambda entry: entry.name,
)
def test_a_step_of_every_method_lowers_the_loss(shallow, entry):
    method = entry.make(lambda count: entry.guess + 0.0 * count, jax.random.key(0))
    batch = jnp.asarray(next(shallow.batches(0, 10, 8))[0])
    state = jax.jit(method.init)(shallow.model.layers)
    before = shallow.loss(method.params(state), batch)
    state, loss = jax.jit(method.step, static_argnums=1)(state, shallow.loss, batch)
    np.testing.assert_allclose(loss, before, rtol=1e-5)
    assert shallow.loss(method.params(state), batch) < before - 1e-3


def test_rates_rise_fall_and_end_at_zero():
    entry = language.everything()[0]
    rate = contest.rate_of(entry, 1.0, 300)
    assert float(rate(0)) == pytest.approx(1 / 30)
    assert float(rate(29)) == pytest.approx(1)
    assert float(rate(165)) == pytest.approx(0.5)
    assert float(rate(300)) == pytest.approx(0, abs=1e-6)
    again = contest.rate_of(entry._replace(link=25, rewarm=5), 1.0, 300)
    assert float(again(50)) == pytest.approx(float(rate(50)) / 5, rel=1e-5)
    assert float(again(54)) == pytest.approx(float(rate(54)), rel=1e-5)


def test_what_is_forgotten_is_read_where_the_level_was_first_passed():
    """On a line between two measurements, and nowhere if the level was not reached."""
    points = [(5.0, 0.0), (3.0, 0.4), (3.2, 0.5), (2.0, 0.9)]
    at = forgetting.forgotten_at
    np.testing.assert_allclose(
        [at(4.0, points), at(2.5, points)], [0.2, 0.5 + 0.4 * 7 / 12]
    )
    assert at(1.9, points) is None


def test_a_model_knows_its_own_stories_best(task):
    """Stories drawn from it cost it less than others, and less than a changed model."""
    own = forgetting.written(task.model, 32, contest.LENGTH)
    assert own.shape == (32, contest.LENGTH + 1)
    assert set(own[:, 0].tolist()) == {1}
    loss = jax.jit(task.loss)
    for factor in (0.8, 1.2):
        changed = jax.tree.map(lambda leaf, factor=factor: factor * leaf, task.params)
        assert loss(task.params, own) < loss(changed, own) - 0.01
    assert loss(task.params, own) < task.validation_loss(task.params) - 2


@pytest.mark.parametrize("rule", [rules.soft(1.0), rules.power(0.5), rules.mixed(0.5)])
def test_rules_that_are_compared_have_the_length_of_the_polar_factor(rule):
    """And lie between it and the gradient."""
    factor = np.random.default_rng(0).normal(size=(4, 30)).astype("f")
    factor *= np.array([10, 1, 1, 0.1], "f")[:, None]
    got = rule().update({"w": factor}, rule().init({"w": factor}))[0]["w"]
    np.testing.assert_allclose(np.linalg.norm(got), np.sqrt(120), rtol=1e-5)
    spread = [np.ptp(np.log(np.linalg.svd(one)[1])) for one in (factor, got)]
    assert 0.3 < spread[1] < 0.9 * spread[0]


@pytest.mark.parametrize("noisy", [0.0, 2.0])
def test_a_measured_softness_is_that_of_signal_and_noise(noisy):
    """Over links: without noise the polar factor, and linear in one batch with much."""
    draw = np.random.default_rng(0)
    signal = draw.normal(size=(4, 300)) * np.array([8, 4, 2, 1])[:, None]
    size = noisy * np.linalg.norm(signal) / np.sqrt(signal.size)
    rule = rules.measured()
    start = state = rule.init({"w": jnp.zeros(signal.shape)})
    for step in range(1000):
        if step % 25 == 0:
            state = restarted(state, start)
        batch = signal + size * draw.normal(size=signal.shape)
        got, state = rule.update({"w": jnp.asarray(batch, "f")}, state)
    got = np.asarray(got["w"])
    left, values, right = np.linalg.svd(batch, full_matrices=False)
    softness = noisy**2 * np.sum(signal**2) * (1 + noisy**2) / 4
    expected = np.sqrt(300 * (1 + noisy**2) / (values**2 + softness)) * values
    # 64 sums say a product to 1/8 of |F|^2, and the mean is over some twenty.
    rtol = 0.25 if noisy else 1e-3
    assert np.sum(got * (left @ right)) == pytest.approx(np.sum(expected), rel=rtol)
    one, other = (rule.update({"w": c * got}, state)[0]["w"] for c in (1e-3, 2e-3))
    ratio = np.linalg.norm(other) / np.linalg.norm(one)
    assert ratio == pytest.approx(2 if noisy else 1, rel=1e-2)


@pytest.mark.parametrize("rule", [rules.prism, rules.variance_scaled])
def test_rules_with_momentum_follow_their_formula(rule):
    """Over three steps, by the formula in float64."""
    draw = np.random.default_rng(0)
    batches = draw.normal(size=(3, 4, 30))
    state = rule().init({"w": jnp.zeros((4, 30))})
    mean, variance = np.zeros((4, 30)), np.zeros((4, 30))
    for step, batch in enumerate(batches, 1):
        got, state = rule().update({"w": jnp.asarray(batch, "f")}, state)
        variance = 0.9 * variance + 0.9 * 0.1 * (mean - batch) ** 2
        mean = 0.9 * mean + 0.1 * batch
        now, root = mean / (1 - 0.9**step), np.sqrt(variance / (1 - 0.9**step))
        if rule is rules.prism:
            values, vectors = np.linalg.eigh(
                now @ now.T + (batch - now) @ (batch - now).T
            )
            expected = vectors @ np.diag(values**-0.5) @ vectors.T @ now
        else:
            left, _, right = np.linalg.svd(
                (batch + 9 * now) / (root if step > 1 else 1), full_matrices=False
            )
            expected = left @ right
        # The polynomials end within 0.7 %.
        np.testing.assert_allclose(got["w"], 30**0.5 * expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("gain", [0.0, 2.0])
def test_two_half_batches_make_one_step(gain):
    """By the formula in float64; a head gets Adam's step on the mean."""
    draw = np.random.default_rng(0)
    halves = draw.normal(size=(2, 4, 30)) * np.array([8, 4, 2, 1])[:, None]
    mean, apart = halves.mean(0), gain * (halves[0] - halves[1]) / 2
    values, vectors = np.linalg.eigh(mean @ mean.T + apart @ apart.T)
    whitened = vectors @ np.diag(values**-0.5) @ vectors.T @ mean
    whitened *= np.sqrt(120) / np.linalg.norm(whitened)
    adam = optax.scale_by_adam()
    heads, _ = adam.update(jnp.asarray(mean, "f"), adam.init(jnp.zeros((4, 30))))
    for path, expected, atol in (("w", whitened, 0.02), ("head/w", heads, 1e-5)):
        rule = rules.half_batches(gain)()
        state = rule.init({path: jnp.zeros((4, 30))})
        first, state = rule.update({path: jnp.asarray(halves[0], "f")}, state)
        assert not first[path].any()
        got, state = rule.update({path: jnp.asarray(halves[1], "f")}, state)
        # The polynomials of the polar factor end within 0.7 %.
        np.testing.assert_allclose(got[path], expected, rtol=atol, atol=atol)
        third, _ = rule.update({path: jnp.asarray(halves[0], "f")}, state)
        assert not third[path].any()


def test_whole_runs_go_down_from_what_short_ones_found():
    """By halves until the next is worse, and no further."""
    tried = contest.lowered(lambda rate: abs(np.log2(rate) + 3), 1.0)
    assert list(tried) == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    assert list(contest.lowered(lambda rate: -rate, 1.0)) == [1 / 2, 1]


def test_a_row_that_is_known_gets_what_is_missing(monkeypatch):
    """Seeds at its rate; where a valley it did not reach is deeper, all of them anew."""
    trained = []

    def loss(rate, seed):
        return abs(np.log2(rate) + 4) + seed

    class Run:
        def __init__(self, task, entry):
            pass

        def trained(self, rate, steps, seed):
            trained.append((rate, seed))
            return loss(rate, seed)

        def facts(self):
            return {}

    class Table:
        params, cut = 0.0, 0.0
        validation_loss = staticmethod(lambda end: end)
        score = staticmethod(lambda end: -end)

    monkeypatch.setattr(glue, "_task", lambda *where: Table)
    monkeypatch.setattr(contest, "Runner", Run)
    tried = [[1.0, 7.1], [2.0, 7.0], [4.0, 7.2]]
    known = {"rate": 2.0, "tried": tried, "loss": [7.0, 8.0], "score": [1.0, 2.0]}
    job = {"method": "full Adam", "steps": 10, "guess": 2.0, "seeds": (0, 1, 2, 3)}

    def row_of(task):
        job["study"] = f"{task}, equal steps"
        return glue._work((glue.TABLES[task],), 4, **job, known=known)

    row = row_of("mrpc")
    assert trained == [(2.0, 2), (2.0, 3)]
    assert (row["rate"], row["tried"]) == (2.0, tried)
    assert row["loss"] == [7.0, 8.0, 7.0, 8.0]
    assert row["score"] == [1.0, 2.0, -7.0, -8.0]

    trained.clear()
    row = row_of("cola")  # and goes on below the last one, which is the best
    rates = [rate for rate, seed in trained if seed == 0]
    assert rates == [1 / 8, 1 / 4, 1 / 2, 1 / 16, 1 / 32]
    assert row["rate"] == 1 / 16
    assert len(row["tried"]) == 8
    assert row["loss"] == [loss(1 / 16, seed) for seed in (0, 1, 2, 3)]


def test_rates_on_glue_are_those_of_a_search_from_nothing():
    """Though rows were made in parts: what is known must not decide what is found."""
    path = pathlib.Path(glue.__file__).parent / "results" / "glue.json"
    results = standings.Results(path, "pretrained.glue")
    seen = 0
    for name, table in glue.TABLES.items():
        study = f"{name}, equal steps"
        for entry in glue.contenders(table.steps, glue.BATCH):
            row = results.get(study, entry.name)
            if row is None or not glue.is_tuned(study, entry.name):
                continue
            shorter = results.get(f"{table.after}, equal steps", entry.name)
            guess = shorter["rate"] if shorter else entry.guess
            tried = dict(row["tried"])
            found = contest.search(tried.__getitem__, guess, powers=table.powers)
            assert min(found, key=found.get) == row["rate"], (study, entry.name)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize(
    "made",
    [
        lambda: noise.contenders(False),
        lambda: noise.contenders(True),
        noise.large,
        texts.contenders,
        lambda: wide.contenders(512),
    ],
    ids=["noise, texts", "noise, labels", "noise, large", "texts", "wide"],
)
def test_contenders_have_names_of_their_own(made):
    """By which rows are found; and each can be made."""
    entries = made()
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    for entry in entries:
        entry.make(lambda count: 0.0 * count, jax.random.key(0))


@pytest.mark.parametrize("race", ["time", "time, blocks"])
def test_a_method_has_the_time_of_the_race_it_was_in(race):
    """300 steps of full Adam are 150 of one that takes twice as long."""
    name = "full orthogonal in blocks of dim/8, fused"
    results = standings.Results(None, "pretrained.wide")
    results.add({"study": "equal steps", "method": name, "steps": 300, "rate": 0.5})
    options = SimpleNamespace(only=name, seeds=(0, 1), quick=False)
    where = (wide.TINY,)
    assert list(wide.jobs(results, "equal time", where, options)) == []
    results.add({"study": race, "method": name, "over_full_adam": 2.0})
    (job,) = wide.jobs(results, "equal time", where, options)
    assert [job[k] for k in ("name", "steps", "guess", "tune")] == [name, 150, 0.5, False]


def test_equal_rows_are_whitened_whatever_their_lengths():
    """A row's length says nothing; nor is a row of zeros divided by its length."""
    factor = np.random.default_rng(0).normal(size=(4, 30)).astype("f")
    rule = rules.equal_rows()

    def direction(lengths):
        scaled = {"w": factor * np.array(lengths, "f")[:, None]}
        return rule.update(scaled, rule.init(scaled))[0]["w"]

    even = direction([1, 1, 1, 1])
    np.testing.assert_allclose(direction([9, 2, 1, 0.1]), even, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(even @ even.T, 30 * np.eye(4), atol=1)
    assert np.isfinite(direction([1, 1, 1, 0])).all()


def test_rates_are_chosen_by_what_is_not_reported():
    """By windows and a seed of their own."""
    task = texts.Task(DATA, "GSM8K")
    chosen_by, reported = (
        {tuple(window) for window in np.asarray(windows).tolist()}
        for windows in (task._tuning, task._validation)
    )
    assert len(chosen_by) == len(reported) == contest.WINDOWS
    assert not chosen_by & reported
    # None overlaps the next.
    assert len(task.text.validation) >= 2 * contest.WINDOWS * (contest.LENGTH + 1)

    asked = []

    class Run:
        entry = contenders.full("full Adam", 1.0)

        class task:  # noqa: N801
            tuning_loss = staticmethod(lambda end: (np.log2(end[0]) - 2) ** 2 + end[1])

        def trained(self, rate, steps, seed):
            asked.append(steps)
            return rate, seed

        def run(self, rate, steps, seed):  # what is reported likes a smaller rate
            return rate + seed

        def facts(self):
            return {}

    row = contest.contest(Run(), "", 10, (0, 1), 1.0, held_out=7)
    assert row["tried"] == [[0.5, 16], [1.0, 11], [2.0, 8], [4.0, 7], [8.0, 8]]
    assert (row["rate"], row["loss"]) == (4.0, [4.0, 5.0])
    assert asked == [10] * 5
    row = contest.contest(Run(), "", 10, (0, 1), 1.0, held_out=7, tuning_steps=3)
    # Whole runs try what short ones found, and half of it.
    assert (row["rate"], row["tried"]) == (4.0, [[2.0, 8], [4.0, 7]])
    assert asked == [10] * 5 + [3] * 5 + [10] * 2
    row = contest.contest(Run(), "", 10, (0, 1), 1.0, tune=False, held_out=7)
    assert (row["rate"], row["loss"]) == (1.0, [1.0, 2.0])
    assert len(asked) == 12  # nothing is trained that no one reads


def test_adam_by_columns_goes_on_over_links():
    """Against NumPy: a new link starts the momentum again, not the columns' squares."""
    draw = np.random.default_rng(0)
    spec = rl.Spec(2, side="left", sketch="block", resample_every=3, rest="frozen")
    tx = rl.scale_by_raclora(spec, inner=contenders.column_adam(), key=0)
    params = {"w": jnp.zeros((6, 4))}
    state = tx.init(params)
    momentum, squares = np.zeros((2, 4)), np.zeros(4)
    for count in range(1, 8):
        grad = draw.normal(size=(6, 4)).astype("f")
        update, state = tx.update({"w": jnp.asarray(grad)}, state, params)
        sketch = rl.sample_sketch(params, spec, key=0, link=state.link)
        factor = rl.project({"w": jnp.asarray(grad)}, sketch, spec)["w"].value
        seen = (count - 1) % 3 + 1
        momentum = 0.9 * (momentum if seen > 1 else 0) + 0.1 * np.asarray(factor)
        squares = 0.999 * squares + 0.001 * (np.asarray(factor) ** 2).mean(0)
        root = np.sqrt(squares / (1 - 0.999**count)) + 1e-8
        want = momentum / (1 - 0.9**seen) / root
        got = rl.project(update, sketch, spec)["w"].value
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_search_goes_on_until_the_best_is_inside():
    tried = contest.search(lambda rate: (np.log2(rate) + 7.3) ** 2, 1.0)
    assert list(tried) == [2.0**-k for k in range(8, -2, -1)]
    assert contest.fitted(tried) == pytest.approx(2**-7.3)
    diverges = contest.search(lambda r: np.nan if r > 1 else -r, 1.0)
    assert diverges == {0.5: -0.5, 1.0: -1.0, 2.0: np.inf}
    assert contest.fitted(diverges) == 1.0


def test_program_saves_its_rows_and_adds_what_is_missing(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        language, "fill", lambda options, results: asked.append((options, results))
    )
    monkeypatch.setenv("XLA_FLAGS", "")
    argv = ["language", "--data-dir", str(DATA), "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    language.main()
    options, results = asked[0]
    missing = [job["name"] for job in language.jobs(results, "equal steps", options)]
    assert missing == ["full Adam", "RAC r8 orthogonal"]
    results.add({"study": "equal steps", "method": "full Adam", "rate": 0.002})
    record = json.loads((tmp_path / "language.json").read_text())
    assert {"commit", "versions", "device"} <= record.keys()
    assert "commit" in record["rows"][0]
    again = standings.Results(tmp_path / "language.json", "language")
    missing = [job["name"] for job in language.jobs(again, "equal steps", options)]
    assert missing == ["RAC r8 orthogonal"]
    assert language.steps_in_time({"over_full_adam": 0.72}) == 1390


def test_a_race_takes_the_place_of_the_one_before(tmp_path):
    """Whole: a method that was not in the new one has no time, in the file either."""
    path = tmp_path / "rows.json"
    results = standings.Results(path, "pretrained.language")
    for method in ("one", "other"):
        results.add({"study": "time", "method": method, "milliseconds": 1.0})
        results.add({"study": "equal steps", "method": method})
    results.replace("time", [{"study": "race", "method": "one", "milliseconds": 2.0}])
    for found in (results, standings.Results(path, "pretrained.language")):
        assert found.get("time", "one")["milliseconds"] == 2
        assert found.get("time", "other") is None
        assert found.get("equal steps", "other") is not None


@pytest.mark.parametrize(
    "contender", [("nf4", 5, True), ("nf4", 5, False), ("int8", 0, False)]
)
def test_the_study_of_quantised_bases_learns(shallow, contender):
    """And says what it holds: codes of a byte here, packed ones at half of one."""
    from benchmarks.pretrained import quantized

    runner = quantized.Runner(shallow, quantized.Contender(*contender))
    start = shallow.validation_loss(runner.contender.read(shallow.params))
    assert runner.run(0.004, 20, 0) < start - 0.05
    held = runner.bytes()
    numbers = sum(weight.size for weight in jax.tree.leaves(shallow.params))
    scales = held["base_bytes"] - numbers
    assert 0 < scales < numbers / 10
    packed = numbers // 2 if contender[0] == "nf4" else numbers
    assert held["base_bytes_packed"] == packed + scales
    assert held["error_bytes"] == (held["base_bytes"] if contender[2] else 0)
