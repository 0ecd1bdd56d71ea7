"""The program that fine-tunes an encoder on a table: a run, its end, bad input."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from flax import nnx
from programs import ended, launch, rows_of

import raclora_jax as rl
from raclora_jax import flax as rl_flax
from raclora_jax import peft

tokenizers = pytest.importorskip("tokenizers")
finetune_glue = pytest.importorskip("finetune_glue")  # an example beside the tests
bert = pytest.importorskip("finetuning.bert")
training = pytest.importorskip("finetuning.training")

WORDS = ["good", "fine", "bright", "bad", "poor", "dull", "a", "film", "and", "long"]
SIZES = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder as the hub has it, small and without training."""
    root = tmp_path_factory.mktemp("base")
    (root / "config.json").write_text(json.dumps(SIZES))
    config = bert.Config.read(root)
    tree, _ = rl_flax.to_tree(bert.Classifier(config, 2, nnx.Rngs(0)))
    encoder = {k: v for k, v in tree.items() if k not in ("head", "pooler")}
    names = bert.names(config, encoder, "")
    model = root.parent / "model"
    peft.save_model(model, encoder, 1, names)
    (model / "config.json").write_text(json.dumps(SIZES))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    words.save(str(model / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Texts whose words say the label, as TSV and as JSONL with numbers."""
    draw, root = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    for part, count in (("train", 192), ("dev", 150)):
        lines, objects = ["text\tlabel"], []
        for _ in range(count):
            label = int(draw.integers(2))
            words = [WORDS[6 + draw.integers(4)] for _ in range(3)]
            words.insert(draw.integers(3), WORDS[3 * (1 - label) + draw.integers(3)])
            lines.append(f"{' '.join(words)}\t{('bad', 'good')[label]}")
            row = {"one": " ".join(words[:2]), "two": " ".join(words[2:])}
            objects.append(json.dumps(row | {"stars": 4.0 * label + 1}))
        (root / f"{part}.tsv").write_text("\n".join(lines) + "\n")
        (root / f"{part}.jsonl").write_text("\n".join(objects) + "\n")
    return root


def asked(folder, table, out, **changed):
    settings = {
        "model": folder,
        "train": table / "train.tsv",
        "dev": table / "dev.tsv",
        "text": "text",
        "label": "label",
        "rank": 4,
        "steps": 60,
        "batch": 16,
        "length": 8,
        "eval_every": 20,
        "learning_rate": 0.02,
        "out": out,
    } | changed
    return programs.options(settings)


@pytest.fixture(scope="module")
def whole(folder, table, tmp_path_factory):
    """A run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        launch(patch, finetune_glue, *asked(folder, table, out))
    return out


def test_a_run_learns_and_says_so(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 20, 40, 60]
    assert rows[0].keys() == {"step", "dev_loss", "dev_metric"}
    assert rows[-1]["dev_metric"] > 0.95
    assert 0 < rows[-1]["captured"] < 1
    page = (whole / "report.html").read_text()
    assert "src='data:image/png" in page
    assert "http" not in page.replace("xmlns", "")
    for figure in ("loss", "dev_metric", "captured_share_per_link"):
        assert (whole / f"{figure}.png").stat().st_size > 1000
    config = json.loads((whole / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    held = peft.parameters(whole / "model")
    assert held["classifier.weight"] == (2, 24)
    assert held[
        "bert.pooler.dense.weight" if "bert." in str(held) else "pooler.dense.weight"
    ]


def test_the_written_model_is_the_best_one(whole, folder, table):
    options = finetune_glue.arguments().parse_args(
        list(map(str, asked(whole / "model", table, "nowhere")))
    )
    problem = finetune_glue.Problem(options)
    assert problem.fresh == []
    best = max(row["dev_metric"] for row in rows_of(whole))
    assert problem.judge(problem.params)["dev_metric"] == pytest.approx(best)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["raclora", "raclora-orthogonal", "raclora-memory", "lora", "full"]
)
def test_a_stopped_run_goes_on(folder, table, tmp_path, monkeypatch, capsys, method):
    """Interrupted between two checkpoints, it ends with the numbers of the whole run."""
    settings = {"method": method, "steps": 40, "eval_every": 10, "learning_rate": 0.005}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    launch(monkeypatch, finetune_glue, *asked(folder, table, straight, **settings))

    words = asked(folder, table, broken, **settings)
    with monkeypatch.context() as patch:
        programs.press_ctrl_c(patch, finetune_glue.Problem, 26)
        assert ended(patch, finetune_glue, *words) == 130
    assert "stopped and saved at step 26; go on with" in capsys.readouterr().err
    launch(monkeypatch, finetune_glue, *words, "--resume")
    assert rows_of(broken) == rows_of(straight)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(folder, table, tmp_path):
    """SIGKILL in the midst of steps, of evaluations or of a checkpoint's writing."""
    words = asked(folder, table, None, steps=48, eval_every=4)
    programs.finished("finetune_glue.py", words, tmp_path / "whole")
    programs.finished("finetune_glue.py", words, tmp_path / "broken", kills=(1, 2, 7))
    programs.assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_memory_keeps_a_square_of_the_rank_and_is_the_default():
    params, kept = {"kernel": jnp.zeros((12, 8))}, {}
    for method in ("raclora-memory", "raclora-orthogonal"):
        spec = rl.Spec(**training.settings("raclora-memory", None, width=24))
        rate = optax.constant_schedule(1e-3)
        made = training.trainer(method, rate, spec, lambda p: p["kernel"].sum(), 0, True)
        kept[method] = made.bytes(params)
    assert spec.rank == 24 // 6
    # A Gram matrix and its unit, and counts of steps for sketched and for dense leaves.
    beside = kept["raclora-memory"] - kept["raclora-orthogonal"]
    assert beside == 4 * (spec.rank**2 + 1 + 2)
    said = training.effective(finetune_glue.DEFAULTS.method, spec)
    assert said["inner"] == "orthogonal, memory 0.8"


def test_pairs_and_numbers(folder, table, tmp_path, monkeypatch):
    words = asked(
        folder,
        table,
        tmp_path / "out",
        train=table / "train.jsonl",
        dev=table / "dev.jsonl",
        text="one,two",
        label="stars",
        length=10,
        learning_rate=0.01,
        steps=300,
        eval_every=50,
    )
    launch(monkeypatch, finetune_glue, *words, "--regression")
    assert rows_of(tmp_path / "out")[-1]["dev_metric"] > 0.9


def test_dry_run_says_what_it_costs(folder, table, monkeypatch, capsys):
    launch(monkeypatch, finetune_glue, *asked(folder, table, None), "--dry-run")
    assert "peak of a compiled step" in capsys.readouterr().out


BAD = {
    "no config": ({"model": "."}, r"has no config\.json"),
    "column": ({"text": "words"}, r"no column 'words'; it has text, label"),
    "missing file": ({"dev": "nowhere.tsv"}, "does not exist"),
    "not numbers": ({"regression": ""}, "a label is no number"),
    "length": ({"length": 17}, "beyond the model's 16 positions"),
    "spec": ({"spec": "nowhere.toml"}, r"nowhere\.toml"),
    "no number": ({"text": "\u00b2"}, "no column '\u00b2'"),
    "decoder": ({"model": "decoder"}, "llama is fine-tuned by examples/finetune_llm.py"),
    "three texts": ({"text": "a,b,c"}, "3 columns of texts"),
    "no steps": ({"steps": 0}, "--steps: expected a whole number from 1 on, got 0"),
    "batch": ({"batch": -1}, "--batch: expected a whole number from 1 on, got -1"),
    "rate": (
        {"learning_rate": 0},
        "--learning-rate: expected a number above 0 or search, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(folder, table, tmp_path, monkeypatch, capsys, name):
    changed, match = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text('{"model_type": "llama"}')
    words = [w for w in asked(folder, table, tmp_path / "out", **changed) if w != ""]
    assert ended(monkeypatch, finetune_glue, *words) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(match, said)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_tables_are_read_whole_or_not(folder, table, tmp_path, monkeypatch, capsys):
    whole = (table / "dev.tsv").read_text()
    cases = {
        "empty": ("", "no column"),
        "only a header": ("text\tlabel\n", "holds no row"),
        "short row": (whole + "alone\n", "1 columns only"),
        "no text.jsonl": ('{"text": 3, "label": "good"}\n', "text 3 is no text"),
        "no label.jsonl": (
            '{"text": "a", "label": null}\n',
            "the label None is no text and no number",
        ),
        "label outside": (
            whole + "a film\tugly\n",
            "'ugly' is outside the set bad, good",
        ),
    }
    for name, (text, match) in cases.items():
        file = tmp_path / f"{name.replace(' ', '_')}{'' if '.' in name else '.tsv'}"
        file.write_text(text)
        words = asked(folder, table, tmp_path / "out", dev=file)
        ended(monkeypatch, finetune_glue, *words)
        assert match in capsys.readouterr().err


def test_a_folder_of_another_task_or_of_the_first_berts(folder, whole, tmp_path):
    """A head with other outputs begins anew; norms may have their old names."""
    _, fresh = bert.load(whole / "model", 3, 0)
    assert fresh == ["head/bias", "head/kernel"]
    safetensors = pytest.importorskip("safetensors.numpy")
    held = safetensors.load_file(folder / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in held.items()
    }
    safetensors.save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    for one, other in zip(
        jax.tree.leaves(nnx.state(bert.load(tmp_path, 2, 0)[0], nnx.Param)),
        jax.tree.leaves(nnx.state(bert.load(folder, 2, 0)[0], nnx.Param)),
        strict=True,
    ):
        assert (one == other).all()


def test_a_law_without_projectors(folder, table, tmp_path, monkeypatch):
    """Such a run has no captured share to report, and is run all the same."""
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'rank = 4\nsketch = "gaussian_raw"\n[[rules]]\npath = "head/.*"\nmode = "dense"\n'
        '[[rules]]\npath = ".*(embedding|bias|scale)"\nmode = "frozen"\n'
    )
    out = tmp_path / "out"
    launch(monkeypatch, finetune_glue, *asked(folder, table, out, spec=spec, steps=20))
    assert "captured" not in rows_of(out)[0]
    assert not (out / "captured_share_per_link.png").exists()


def test_an_export_that_was_cut_off_is_done_again(folder, table, tmp_path, monkeypatch):
    words = asked(folder, table, tmp_path / "out", steps=20)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError("no space left")

        patch.setattr(finetune_glue, "_say_labels", full)
        ended(patch, finetune_glue, *words)
    assert not (tmp_path / "out" / "model").exists()
    launch(monkeypatch, finetune_glue, *words, "--resume")
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}


def test_a_run_is_never_written_over(folder, table, whole, monkeypatch, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    for words, match in (
        ([], "exists; name another"),
        (["--resume"], "batch 16 and not 8"),
    ):
        other = asked(folder, table, whole, batch=8)
        ended(monkeypatch, finetune_glue, *other, *words)
        assert match in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_transformers_agrees(whole, table):
    """The judge, where it is installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForSequenceClassification
    theirs, told = kind.from_pretrained(whole / "model", output_loading_info=True)
    assert not told["missing_keys"]
    options = finetune_glue.arguments().parse_args(
        list(map(str, asked(whole / "model", table, "nowhere")))
    )
    problem = finetune_glue.Problem(options)
    ids, types, _ = problem.dev.take(slice(0, 16))
    ours = problem.logits(problem.params, ids, types)
    with torch.no_grad():
        found = theirs.eval()(
            torch.as_tensor(ids, dtype=torch.long),
            attention_mask=torch.as_tensor(ids != 0),
            token_type_ids=torch.as_tensor(types, dtype=torch.long),
        ).logits
    np.testing.assert_allclose(jax.device_get(ours), found.numpy(), atol=1e-4)
