"""Decoders from the hub's folders and back, judged by Transformers; LoRA beside them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoders import GEMMA, MOE, ROPE, SIZES

from raclora_jax import flax as rl_flax

pytest.importorskip("tunix")
decoder = pytest.importorskip("finetuning.decoder")  # of the examples beside the tests
beside = pytest.importorskip("finetuning.beside")
families = pytest.importorskip("finetuning.families")

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
def test_transformers_agrees(tmp_path, family):
    """The judge, where it is installed: logits before, and tokens that follow."""
    theirs = transformers_model(family)
    import torch

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
def test_what_tunix_does_otherwise_is_refused(tmp_path, case):
    """Rather than trained as another model than the checkpoint's."""
    family, changed = REFUSED[case]
    kinds = {"Qwen3 with experts": "qwen3_moe", "Qwen3": "qwen3", "Gemma3": "gemma3_text"}
    stated = SIZES | JUDGES[family][2] | {"model_type": kinds.get(family, "llama")}
    (tmp_path / "config.json").write_text(json.dumps(stated | changed))
    (name,) = changed
    named = "rope_type" if name == "rope_scaling" else name
    with pytest.raises(ValueError, match=rf"config\.json: {named} .* is not read here"):
        decoder.load(tmp_path, bf16=False, remat=False)


def test_a_config_that_is_silent(tmp_path):
    """Transformers' experts are not normalised where nothing is said of it."""
    stated = SIZES | MOE | {"model_type": "qwen3_moe"}
    for name, match in (
        ("norm_topk_prob", "norm_topk_prob False is not read here"),
        ("num_key_value_heads", r"config\.json has no 'num_key_value_heads'"),
    ):
        silent = {key: value for key, value in stated.items() if key != name}
        (tmp_path / "config.json").write_text(json.dumps(silent))
        with pytest.raises(ValueError, match=match):
            decoder.load(tmp_path, bf16=False, remat=False)


def small(**changed):
    """A decoder of ours at random."""
    stated, draw = SIZES | changed, np.random.default_rng(0)
    module = families.model(pathlib.Path("config.json"), stated, remat=False)
    tree, restore = rl_flax.to_tree(module)

    def some(leaf):
        return 0.3 * jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)

    return decoder.Decoder(jax.tree.map(some, tree), restore, 24, 32)


def test_parameters_without_a_place_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    decoder.save(tmp_path / "m", small().params)
    (tmp_path / "m" / "config.json").write_text(json.dumps(SIZES))
    decoder.load(tmp_path / "m", bf16=False, remat=False)
    file = tmp_path / "m" / "model.safetensors"
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}
    save_file(load_file(file) | bias, file)
    with pytest.raises(ValueError, match=r"q_proj\.bias, for which .* no place"):
        decoder.load(tmp_path / "m", bf16=False, remat=False)


def test_a_head_beside_the_embedding_it_is_tied_to(tmp_path):
    """Written with the embedding's change; another matrix there is refused."""
    safetensors = pytest.importorskip("safetensors.numpy")
    made = families.model(tmp_path / "config.json", SIZES, remat=False)
    tree, _ = rl_flax.to_tree(made)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), tree
    )
    decoder.save(tmp_path / "plain", params)
    held = safetensors.load_file(tmp_path / "plain" / "model.safetensors")
    table = held["model.embed_tokens.weight"]

    def folder(name, head):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SIZES))
        with_head = held | {"lm_head.weight": head}
        safetensors.save_file(with_head, tmp_path / name / "model.safetensors")
        return tmp_path / name

    both = folder("both", table.copy())
    loaded = decoder.load(both, bf16=False, remat=False)
    moved = jax.tree.map(lambda leaf: leaf + 1, loaded.params)
    decoder.save(tmp_path / "moved", moved, like=both)
    written = safetensors.load_file(tmp_path / "moved" / "model.safetensors")
    np.testing.assert_array_equal(written["lm_head.weight"], table + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix"):
        decoder.load(folder("other", table + 1), bf16=False, remat=False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_merged_lora_is_the_module_with_pairs(family):
    model = small(model_type=family, **(GEMMA if family == "gemma3_text" else {}))
    draw = np.random.default_rng(0)
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


def test_lora_without_a_pair_is_refused():
    """qwix reads the parameters of modules; Tunix's experts are slices of one."""
    model = small(model_type="qwen3_moe", **MOE)
    spec = decoder.spec_for(model.params, 3)
    with pytest.raises(ValueError, match=r"no LoRA for layers/0/mlp/down_proj"):
        beside.trainer(model, spec, None, None, 0)
