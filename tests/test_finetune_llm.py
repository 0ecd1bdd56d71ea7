"""The program that fine-tunes a decoder: its texts, its models, a run and its end."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import killed
import numpy as np
import pytest

texts = pytest.importorskip("finetuning.texts")  # of the examples beside the tests


class Letters:
    """One token a letter, from 3."""

    def encode(self, text):
        return [3 + ord(letter) - 97 for letter in text if letter.isalpha()]


PAIRS = [("abc", "de"), ("f", "ghi"), ("jk", "lmnopq"), ("r", "s")]


def packed(length=9, pairs=PAIRS):
    return texts.pack(pairs, Letters(), length, [1], [2])


def test_pairs_stand_in_rows_whole():
    rows, cut = packed()
    assert cut == 0
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
    rows, cut = packed(5)
    assert cut == 2
    assert rows.ids.shape[1] == 6


def test_a_plain_text_runs_on():
    rows, cut = texts.pack([("", "abcdefghij")], Letters(), 3, [1], [2])
    assert cut == 0
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
    ],
)
def test_bad_texts(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        texts.read(tmp_path / name)


# With Tunix ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    pytest.importorskip("tunix")
    import finetune_llm

    return finetune_llm


SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 32,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


GEMMA = {
    "head_dim": 8,
    "num_hidden_layers": 7,  # five with a window, one without, and one more
    "rms_norm_eps": 1e-6,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
}
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}


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


def run(monkeypatch, program, *words):
    monkeypatch.setattr(sys, "argv", ["finetune_llm.py", *map(str, words)])
    program.main()


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
    return [
        word
        for name, value in settings.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", value)
    ]


def rows_of(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize("words", [[], ["--bf16", "--remat"]])
def test_a_run_learns(program, folder, table, tmp_path, monkeypatch, words):
    run(monkeypatch, program, *asked(folder, table, tmp_path / "out"), *words)
    losses = [row["dev_loss"] for row in rows_of(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()


def test_lora_is_qwix_beside_the_weights(program, folder, table, tmp_path, monkeypatch):
    words = asked(folder, table, tmp_path / "out", method="lora", learning_rate=0.03)
    run(monkeypatch, program, *words)
    losses = [row["dev_loss"] for row in rows_of(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_merged_lora_is_the_module_with_pairs(program, family):
    import pathlib

    import optax
    from finetuning import beside, decoder, families

    from raclora_jax import flax as rl_flax

    stated = SIZES | (GEMMA if family == "gemma3_text" else {}) | {"model_type": family}
    file, draw = pathlib.Path("config.json"), np.random.default_rng(0)
    tree, restore = rl_flax.to_tree(families.model(file, stated, remat=False))

    def some(leaf):
        return 0.3 * jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)

    model = decoder.Decoder(jax.tree.map(some, tree), restore, 24, 32)
    ids = jnp.asarray(draw.integers(3, 32, size=(2, 7)))
    inputs = (ids, jnp.tile(jnp.arange(7), (2, 1)), jnp.tril(jnp.ones((2, 7, 7), bool)))

    def loss_of(model):
        return lambda params: jnp.mean(jnp.square(model.logits(params, *inputs)))

    spec = decoder.spec_for(model.params, 3, alpha=6.0)
    made = beside.trainer(model, spec, optax.constant_schedule(0.1), loss_of, 0)
    state = made.init(model.params)
    loss, step = loss_of(model), jax.jit(made.step)
    state, value = step(state)
    np.testing.assert_allclose(value, loss(model.params), rtol=1e-5)
    for _ in range(3):
        state, value = step(state)
    np.testing.assert_allclose(step(state)[1], loss(made.params(state)), rtol=1e-4)
    assert abs(value - loss(model.params)) > 0.01 * value


def test_lora_without_a_pair_is_refused(program):
    """qwix reads the parameters of modules; Tunix's experts are slices of one."""
    import pathlib

    from finetuning import beside, decoder, families

    from raclora_jax import flax as rl_flax

    stated = SIZES | MOE | {"model_type": "qwen3_moe"}
    module = families.model(pathlib.Path("config.json"), stated, remat=False)
    tree, restore = rl_flax.to_tree(module)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)
    model = decoder.Decoder(params, restore, 24, 32)
    spec = decoder.spec_for(params, 3)
    with pytest.raises(ValueError, match=r"no LoRA for layers/0/mlp/down_proj"):
        beside.trainer(model, spec, None, None, 0)


def test_a_stopped_run_goes_on(program, folder, table, tmp_path, monkeypatch):
    settings = {"steps": 40, "eval_every": 10}
    run(monkeypatch, program, *asked(folder, table, tmp_path / "whole", **settings))
    batch, seen = program.Problem.batch, []

    def interrupted(problem, step, size, seed):
        seen.append(step)
        if len(seen) > 25:
            raise KeyboardInterrupt
        return batch(problem, step, size, seed)

    monkeypatch.setattr(program.Problem, "batch", interrupted)
    words = asked(folder, table, tmp_path / "broken", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, program, *words)
    monkeypatch.setattr(program.Problem, "batch", batch)
    run(monkeypatch, program, *words, "--resume")
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(program, folder, table, tmp_path):
    """SIGKILL in the midst of steps, of evaluations or of a checkpoint's writing."""
    words = asked(folder, table, None, steps=48, eval_every=4)
    killed.finished("finetune_llm.py", words, tmp_path / "whole")
    killed.finished("finetune_llm.py", words, tmp_path / "broken", kills=(1, 2, 7))
    killed.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model": "."}, r"has no config\.json"),
        ({"length": 25}, "beyond the model's 24"),
        ({"train": "nowhere.txt"}, "does not exist"),
        ({"batch": 500}, "fewer than --batch"),
    ],
)
def test_bad_input(program, folder, table, tmp_path, monkeypatch, capsys, changed, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, program, *asked(folder, table, tmp_path / "out", **changed))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert re.search(match, said[0])
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture(program, folder, table, tmp_path, monkeypatch, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(SystemExit):
        run(monkeypatch, program, *asked(tmp_path / "odd", table, tmp_path / "out"))
    said = capsys.readouterr().err
    assert "'mamba' is not among llama, qwen3, qwen3_moe, gemma3_text" in said


# Names of Transformers' classes, and what they are asked for beside ``SIZES``.
JUDGES = {
    "Llama": ("Llama", "LlamaConfig", {}),
    "tied Llama": ("Llama", "LlamaConfig", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", "Qwen3Config", {}),
    "Qwen3 with experts": ("Qwen3Moe", "Qwen3MoeConfig", MOE),
    "Gemma3": ("Gemma3", "Gemma3TextConfig", GEMMA),
    "Gemma3 4B's rope": ("Gemma3", "Gemma3TextConfig", GEMMA | {"rope_parameters": ROPE}),
    "Gemma3 27B's norm": (
        "Gemma3",
        "Gemma3TextConfig",
        GEMMA | {"query_pre_attn_scalar": 4, "num_key_value_heads": 4},
    ),
}


def transformers_model(family):
    """A small one of theirs with weights at random."""
    torch, transformers = (
        pytest.importorskip(name) for name in ("torch", "transformers")
    )
    name, config, changed = JUDGES[family]
    sizes = {k: v for k, v in SIZES.items() if k != "model_type"}
    tied = "tie_word_embeddings" in changed or name == "Gemma3"
    sizes |= {"head_dim": 8, "tie_word_embeddings": tied} | changed
    if name == "Gemma3":
        del sizes["rope_theta"]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    theirs = kind(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return theirs


@pytest.mark.parametrize("family", JUDGES)
def test_transformers_agrees(program, tmp_path, family):
    """The judge, where it is installed: logits before, and tokens that follow."""
    theirs = transformers_model(family)
    import torch
    from finetuning import decoder

    theirs.save_pretrained(tmp_path / "base")
    ours = decoder.load(tmp_path / "base", bf16=False, remat=False)

    # A change of ours in every leaf, written and read by them.
    draw = np.random.default_rng(0)

    def changed(leaf):
        return leaf + 0.05 * jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)

    params = jax.tree.map(changed, ours.params)
    decoder.save(tmp_path / "m", params, like=tmp_path / "base")
    again, told = type(theirs).from_pretrained(tmp_path / "m", output_loading_info=True)
    again.eval()
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids = draw.integers(3, 32, size=(1, 9))

    def logits(ids):
        count = ids.shape[1]
        seen = jnp.tril(jnp.ones((1, count, count), bool))
        return ours.logits(params, jnp.asarray(ids), jnp.arange(count)[None], seen)

    with torch.no_grad():
        found = again(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(ids), found, atol=1e-4)
    told = again.generate(
        torch.as_tensor(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    for _ in range(8):
        following = int(np.argmax(logits(ids)[0, -1]))
        ids = np.concatenate([ids, [[following]]], axis=1)
    assert ids[0].tolist() == told[0].tolist()


REFUSED = {
    "experts not normalised": ("Qwen3 with experts", {"norm_topk_prob": False}),
    "layers without experts": ("Qwen3 with experts", {"mlp_only_layers": [1]}),
    "a window": ("Qwen3", {"use_sliding_window": True}),
    "another activation": ("Llama", {"hidden_act": "gelu"}),
    "stretched heads": ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "Gemma 2's caps": ("Gemma3", {"final_logit_softcapping": 30.0}),
    "another order of windows": ("Gemma3", {"layer_types": ["full_attention"] * 7}),
    "another scale": ("Gemma3", {"query_pre_attn_scalar": 5}),
    "another epsilon": ("Gemma3", {"rms_norm_eps": 1e-5}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_tunix_does_otherwise_is_refused(program, tmp_path, case):
    """Rather than trained as another model than the checkpoint's."""
    from finetuning import decoder

    family, changed = REFUSED[case]
    kinds = {"Qwen3 with experts": "qwen3_moe", "Qwen3": "qwen3", "Gemma3": "gemma3_text"}
    stated = SIZES | JUDGES[family][2] | {"model_type": kinds.get(family, "llama")}
    (tmp_path / "config.json").write_text(json.dumps(stated | changed))
    (name,) = changed
    named = "rope_type" if name == "rope_scaling" else name
    with pytest.raises(ValueError, match=rf"config\.json: {named} .* is not read here"):
        decoder.load(tmp_path, bf16=False, remat=False)


def test_a_config_that_is_silent(program, tmp_path):
    """Transformers' experts are not normalised where nothing is said of it."""
    from finetuning import decoder

    stated = SIZES | MOE | {"model_type": "qwen3_moe"}
    for name, match in (
        ("norm_topk_prob", "norm_topk_prob False is not read here"),
        ("num_key_value_heads", r"config\.json has no 'num_key_value_heads'"),
    ):
        silent = {key: value for key, value in stated.items() if key != name}
        (tmp_path / "config.json").write_text(json.dumps(silent))
        with pytest.raises(ValueError, match=match):
            decoder.load(tmp_path, bf16=False, remat=False)


def test_parameters_without_a_place_are_refused(program, folder, tmp_path):
    import shutil

    from finetuning import decoder
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}
    save_file(tensors | bias, tmp_path / "more" / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj\.bias, for which .* no place"):
        decoder.load(tmp_path / "more", bf16=False, remat=False)
