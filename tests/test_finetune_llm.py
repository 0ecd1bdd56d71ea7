"""The program that fine-tunes a decoder: its texts, its models, a run and its end."""

import json
import re
import shlex
import struct

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from decoders import SIZES
from programs import ended, launch, rows_of
from safetensors.numpy import load_file

texts = pytest.importorskip("finetuning.texts")  # of the examples beside the tests


class Letters:
    """One token a letter, from 3."""

    def encode(self, text):
        return [3 + ord(letter) - 97 for letter in text if letter.isalpha()]


PAIRS = [("abc", "de"), ("f", "ghi"), ("jk", "lmnopq"), ("r", "s")]


def packed(length=9, pairs=PAIRS):
    return texts.pack(pairs, Letters(), length, [1], [2])


def test_pairs_stand_in_rows_whole():
    rows, left = packed()
    assert left == (0, 0)
    assert rows.ids.shape == (4, 10)
    assert rows.ids[0].tolist() == [1, 3, 4, 5, 6, 7, 2, 0, 0, 0]
    assert rows.text[0].tolist() == [1] * 7 + [0] * 3
    assert rows.ids[3].tolist()[:6] == [1, 20, 21, 2, 0, 0]
    ids, _, seen, wanted, counts = texts.inputs(rows)
    # Foretold are the completion and the end, from the last token of the prompt on.
    assert wanted[0][counts[0]].tolist() == [6, 7, 2]
    assert not (counts & (ids == 0)).any()
    assert seen.shape == (4, 9, 9)


def test_texts_of_a_row_do_not_see_each_other():
    rows, _ = packed(19)
    _, places, seen, wanted, counts = texts.inputs(rows)
    text = rows.text[0, :-1]
    for i in range(len(text)):
        for j in range(len(text)):
            assert seen[0, i, j] == (j <= i and text[i] == text[j])
        assert places[0, i] == sum(text[:i] == text[i])
    for number, (_, completion) in enumerate(PAIRS[:2], 1):
        own = wanted[0][counts[0] & (text == number)].tolist()
        assert own == [*Letters().encode(completion), 2]


def test_a_long_pair_is_cut_and_said():
    rows, left = packed(5)
    assert left == (2, 0)
    assert rows.ids.shape[1] == 6


def test_a_prompt_that_fills_a_row_is_left_out_and_said():
    rows, left = packed(3, [("abc", "d"), ("a", "b")])
    assert left == (0, 1)
    assert rows.ids.tolist() == [[1, 3, 4, 2]]
    with pytest.raises(ValueError, match="every prompt fills its row"):
        packed(2, [("abc", "d"), ("ab", "")])


def test_a_completion_has_an_end():
    with pytest.raises(ValueError, match="names no token that ends a completion"):
        texts.pack(PAIRS, Letters(), 9, [1], [])


class Words:
    """One token a word, with the spaces before it: 3 and its letters."""

    def encode(self, text):
        return [3 + len(word) for word in re.findall(" *[^ ]+| +", text)]


def test_a_completion_is_what_the_text_has_behind_the_prompt():
    rows, _ = texts.pack([("ab", " cde"), ("ab", "cde")], Words(), 3, [1], [2])
    # " cde" in the text and not by itself; "abcde" would be one word: the parts' own.
    assert rows.ids.tolist() == [[1, 5, 7, 2], [1, 5, 6, 2]]


def test_a_plain_text_runs_on():
    rows, left = texts.pack([("", "abcdefghij")], Letters(), 3, [1], [2])
    assert left == (0, 0)
    assert rows.ids.tolist() == [[3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 11, 12]]
    _, _, _, wanted, counts = texts.inputs(rows)
    assert counts.all()
    assert wanted.tolist() == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", b" \n", "is empty"),
        ("bytes.txt", b"\xff\xfe\xfa", "no whole text in UTF-8"),
        ("cut.txt.gz", b"\x1f\x8b\x08", "no whole text"),
        ("a.jsonl", b'{"prompt": "a"}\n', r"line 1: no field 'completion'"),
        ("b.jsonl", b'{"prompt": "a", "completion": "b"}\n{"pro', "line 2: no JSON"),
        ("c.jsonl", b'{"prompt": [], "completion": "b"}\n', r"line 1: \[\] is no text"),
        ("d.txt.gz", b"\x1f\x8b\x08\x00" + 6 * b"\x00" + 9 * b"\xff", "no whole text"),
    ],
)
def test_bad_texts(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        texts.read(tmp_path / name)


def test_lines_end_where_json_says(tmp_path):
    """A separator of lines inside a string is a letter, and a BOM is none."""
    pair = {"prompt": "a\u2028b", "completion": "c\x85"}
    text = json.dumps(pair, ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert texts.read(tmp_path / "a.jsonl") == [tuple(pair.values())]


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((8, 16, 1, 2, 2, 32, 4), "is cut short"),
        ((8, 16, 1, 2, 0, 32, 4), "no checkpoint"),
        ((8, 16, -1, 2, 2, 32, 4), "no checkpoint"),
        ((6, 16, 1, 2, 2, 32, 4), "no checkpoint"),  # heads of three numbers
        ((12, 16, 1, 6, 4, 32, 4), "no checkpoint"),
        ((2**30, 2**30, 2**30, 2, 2, 2**30, 4), "is cut short"),
    ],
)
def test_what_is_no_checkpoint_of_llama2c(tmp_path, sizes, match):
    llama2c = pytest.importorskip("finetuning.llama2c")
    file = tmp_path / "model.bin"
    file.write_bytes(struct.pack("<7i", *sizes) + b"\0" * 103)
    with pytest.raises(ValueError, match=match):
        llama2c.read(file)


# With Tunix ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    pytest.importorskip("tunix")
    import finetune_llm

    return finetune_llm


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory):
    """A model's folder as the hub has it, without training."""
    import tokenizers
    from finetuning import decoder, families

    from raclora_jax import flax as rl_flax

    where = tmp_path_factory.mktemp("models") / "tiny"
    tree, _ = rl_flax.to_tree(families.model(where / "config.json", SIZES, remat=False))
    draw = np.random.default_rng(0)

    def some(leaf):
        noise = jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)
        return 0.3 * noise if leaf.ndim > 1 else jnp.ones(leaf.shape)

    decoder.save(where, jax.tree.map(some, tree))
    (where / "config.json").write_text(json.dumps(SIZES))
    letters = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("."), "isolated"
    )
    words.save(str(where / "tokenizer.json"))
    marks = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (where / "tokenizer_config.json").write_text(json.dumps(marks))
    return where


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Prompts whose completion is the prompt again."""
    draw, root = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    for part, count in (("train", 300), ("dev", 40)):
        lines = []
        for _ in range(count):
            word = "".join(chr(97 + i) for i in draw.integers(0, 4, size=3))
            lines.append(json.dumps({"prompt": word, "completion": word}))
        (root / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def asked(folder, table, out, **changed):
    settings = {
        "model": folder,
        "train": table / "train.jsonl",
        "dev": table / "dev.jsonl",
        "rank": 4,
        "steps": 60,
        "batch": 8,
        "length": 16,
        "eval_every": 20,
        "learning_rate": 0.03,
        "out": out,
    } | changed
    return programs.options(settings)


@pytest.mark.parametrize("words", [[], ["--bf16", "--remat"]])
def test_a_run_learns(program, folder, table, tmp_path, monkeypatch, words):
    launch(monkeypatch, program, *asked(folder, table, tmp_path / "out"), *words)
    losses = [row["dev_loss"] for row in rows_of(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[1]
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()


def test_lora_is_qwix_beside_the_weights(program, folder, table, tmp_path, monkeypatch):
    words = asked(folder, table, tmp_path / "out", method="lora", learning_rate=0.03)
    launch(monkeypatch, program, *words)
    losses = [row["dev_loss"] for row in rows_of(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_stopped_run_goes_on(program, folder, table, tmp_path, monkeypatch, capsys):
    """By the very command that it says, with the numbers of an unbroken run."""
    settings = {"steps": 40, "eval_every": 10}
    launch(monkeypatch, program, *asked(folder, table, tmp_path / "whole", **settings))
    words = asked(folder, table, tmp_path / "bro ken", **settings)
    with monkeypatch.context() as patch:
        programs.press_ctrl_c(patch, program.Problem, 26)
        assert ended(patch, program, *words) == 130
    assert not (tmp_path / "bro ken" / "model").exists()
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-2] == "stopped and saved at step 26; go on with"
    _, name, *command = shlex.split(said[-1])
    assert (name, command[-1]) == ("finetune_llm.py", "--resume")
    launch(monkeypatch, program, *command)
    assert rows_of(tmp_path / "bro ken") == rows_of(tmp_path / "whole")


def test_a_finished_run_is_made_longer(
    program, folder, table, tmp_path, monkeypatch, capsys
):
    """The cosine is that of the new length from there on; fewer steps are refused."""
    out = tmp_path / "out"
    launch(monkeypatch, program, *asked(folder, table, out, steps=20, eval_every=10))
    old = load_file(out / "model" / "model.safetensors")
    longer = asked(folder, table, out, steps=40, eval_every=10)
    launch(monkeypatch, program, *longer, "--resume")
    rates = {row["step"]: row.get("learning_rate") for row in rows_of(out)}
    cosine = {
        steps: 0.03 * (1 + np.cos(np.pi * (step - steps / 10) / (0.9 * steps))) / 2
        for steps, step in ((20, 19), (40, 29))
    }
    assert rates == {
        0: None,
        10: pytest.approx(rates[10]),
        20: pytest.approx(cosine[20], rel=1e-4),
        30: pytest.approx(cosine[40], rel=1e-4),
        40: pytest.approx(rates[40]),
    }
    said = " ".join(capsys.readouterr().out.split())
    assert "going on from step 20, to 40 in place of 20: the cosine is now" in said
    new = load_file(out / "model" / "model.safetensors")
    assert any((new[name] != old[name]).any() for name in old)
    fewer = asked(folder, table, out, steps=30, eval_every=10)
    assert ended(monkeypatch, program, *fewer, "--resume") == 2
    assert "has done 40 steps: --steps 30 are fewer" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["steps"] == "40"


def test_a_rate_is_searched(program, folder, table, tmp_path, monkeypatch, capsys):
    """By short runs that are not repeated; the best is kept, with all numbers."""
    out = tmp_path / "out"
    monkeypatch.setitem(program.DEFAULTS.rates, "full", 0.01)
    words = asked(
        folder, table, out, steps=20, eval_every=20, method="full", learning_rate="search"
    )
    with monkeypatch.context() as patch:
        programs.press_ctrl_c(patch, program.Problem, 3)  # in the second short run
        assert ended(patch, program, *words) == 130
    assert "stopped in the search" in capsys.readouterr().err
    first = (out / "search.jsonl").read_text()
    launch(monkeypatch, program, *words, "--resume")
    assert (out / "search.jsonl").read_text().startswith(first)
    tried = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    best = min(tried, key=lambda row: row["dev_loss"])["learning_rate"]
    assert [row["learning_rate"] for row in tried[:3]] == [0.01, 0.005, 0.02]
    config = json.loads((out / "config.json").read_text())
    assert config["learning_rate"] == f"{best:g}"
    page = (out / "report.html").read_text()
    for row in tried:
        assert f"{row['learning_rate']:g}: {row['dev_loss']:.4f}" in page


def test_a_grid_ends_when_the_best_has_neighbours():
    search = pytest.importorskip("finetuning.search")
    found = search.grid(lambda rate: abs(np.log2(rate / 8.0)), 1.0)
    assert found == {0.5: 4.0, 1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: 0.0, 16.0: 1.0}
    diverging = search.grid(lambda rate: rate if rate < 0.2 else float("inf"), 1.0)
    assert min(diverging, key=diverging.get) == 2**-5
    assert len(diverging) == 7


def test_what_it_comes_to_is_said_first(program, folder, table, tmp_path, monkeypatch):
    out, rate = tmp_path / "out", program.DEFAULTS.rates["raclora-orthogonal"]
    words = asked(
        folder, table, out, steps=20, eval_every=10, learning_rate=None, rank=None
    )
    launch(monkeypatch, program, *words)
    first, *_, last = rows_of(out)
    assert first.keys() == {"step", "dev_loss"}
    both = f"{first['dev_loss']:.4f} before, {last['dev_loss']:.4f} after"
    page = (out / "report.html").read_text()
    assert page.index(both) < page.index("In numbers")
    assert "the default of raclora-orthogonal, measured on decoders" in page
    config = json.loads((out / "config.json").read_text())
    assert "None" not in config.values()
    settings = ("rank", "alpha", "sketch", "side", "resample_every", "inner")
    found = tuple(config[name] for name in ("learning_rate", *settings))
    width = str(SIZES["hidden_size"] // 2)
    assert found == (f"{rate:g}", width, "dim", "block", "left", "25", "orthogonal")


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(program, folder, table, tmp_path):
    """SIGKILL in the midst of steps, of evaluations or of a checkpoint's writing."""
    words = asked(folder, table, None, steps=48, eval_every=4)
    programs.finished("finetune_llm.py", words, tmp_path / "whole")
    programs.finished("finetune_llm.py", words, tmp_path / "broken", kills=(1, 2, 7))
    programs.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_sent_to_its_program(
    program, folder, table, tmp_path, monkeypatch, capsys, kind
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    words = asked(tmp_path, table, tmp_path / "out")
    assert ended(monkeypatch, program, *words) == 2
    assert f"{kind} is fine-tuned by examples/finetune_glue.py" in capsys.readouterr().err


def test_programs_know_each_others_models(program):
    from finetuning import families, folders

    known = {kind for kind, name in folders.PROGRAMS.items() if "llm" in name}
    assert known == set(families.FAMILIES)


def test_help_says_every_default(program):
    said = " ".join(program.arguments().format_help().split())
    for action in program.arguments()._actions:
        if action.default not in (None, False, "==SUPPRESS=="):
            assert f"(default: {action.default})" in said, action.dest
    for method, rate in program.DEFAULTS.rates.items():
        assert f"{rate:g} for {method}" in said
    assert "1/2 of the model's width for raclora-orthogonal" in said.replace("- ", "-")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model": "."}, r"has no config\.json"),
        ({"length": 25}, "beyond the model's 24"),
        ({"train": "nowhere.txt"}, "does not exist"),
        ({"batch": 500}, "fewer than --batch"),
        ({"length": 3}, "every prompt fills its row"),
        ({"steps": 0}, "argument --steps: expected a whole number from 1 on, got 0"),
        ({"patience": -1}, "argument --patience: expected a whole number"),
        ({"learning_rate": 0}, "argument --learning-rate: expected a number above 0"),
        ({"learning_rate": "abc"}, "--learning-rate: expected a number above 0 or sear"),
        ({"seed": -1}, "--seed: expected a whole number from 0 on, got -1"),
        ({"steps": 2**40}, "--steps: expected at most 2147483647"),
    ],
)
def test_bad_input(program, folder, table, tmp_path, monkeypatch, capsys, changed, match):
    monkeypatch.chdir(tmp_path)
    words = asked(folder, table, tmp_path / "out", **changed)
    assert ended(monkeypatch, program, *words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.search(match, said[0])
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture(program, folder, table, tmp_path, monkeypatch, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "mamba"}')
    ended(monkeypatch, program, *asked(tmp_path / "odd", table, tmp_path / "out"))
    said = capsys.readouterr().err
    assert "'mamba' is not among llama, qwen3, qwen3_moe, gemma3_text" in said
