"""The judges: PEFT and Transformers read what we write, and we read what they write.

They are no requirement of anything here: where they are not installed, nothing runs.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import raclora_jax as rl
from raclora_jax import peft

torch = pytest.importorskip("torch")
judge = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 61,
}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
MODELS = {
    "bert": ("BertModel", SMALL | {"max_position_embeddings": 32}),
    "llama": ("LlamaForCausalLM", DECODER),
    "llama, tied": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", DECODER),
    "gemma3": ("Gemma3ForCausalLM", DECODER | {"sliding_window": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 61},
    ),
}
IDS = np.random.default_rng(0).integers(0, 61, size=(2, 9))
MATRIX = {
    "bert": r".*/(query|key|value|dense)/weight",
    "gpt2": r"transformer/h/.*(c_attn|c_proj|c_fc)/weight",
}
PROJECTION = r".*_proj/weight"


def make(name):
    """The model and its folder's class, with weights of some size everywhere."""
    kind, options = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return cls, model


def outputs(model):
    with torch.no_grad():
        found = model(torch.as_tensor(IDS))
    kept = (
        found.last_hidden_state if hasattr(found, "last_hidden_state") else found.logits
    )
    return kept.numpy()


def tree_of(folder, name):
    """The weights of a saved model as a tree, matrices the way JAX has them."""
    read = load_file(folder / "model.safetensors")
    matrix = MATRIX.get(name, PROJECTION)
    like, rules = {}, []
    for key, value in read.items():
        where = key.split(".")
        shape = value.shape
        path = "/".join(where)
        kind = "plain"
        if re.fullmatch(matrix, path):
            kind = "transposed" if name == "gpt2" else "linear"
            shape = shape if name == "gpt2" else shape[::-1]
        node = like
        for part in where[:-1]:
            node = node.setdefault(part, {})
        node[where[-1]] = jax.ShapeDtypeStruct(shape, jnp.float32)
        rules.append((path.replace(".", r"\."), key, kind))
    spec = rl.Spec(
        3,
        rules=[rl.Rule(matrix), rl.Rule(".*", mode="frozen")],
        side="left",
    )
    names = peft.targets(like, rules)
    return peft.load_model(folder, like, spec, names), spec, names


def trained(params, spec):
    """A link whose factors moved, and its adapter."""
    factors, chain = rl.init_adapter(params, spec, key=1)
    draw = np.random.default_rng(2)
    factors = jax.tree.map(
        lambda f: jnp.asarray(0.3 * draw.normal(size=f.shape), jnp.float32), factors
    )
    return peft.of_link(params, factors, chain, spec)


@pytest.mark.parametrize("name", MODELS)
def test_theirs_and_ours(name, tmp_path):
    cls, model = make(name)
    model.save_pretrained(tmp_path / "base")
    params, spec, names = tree_of(tmp_path / "base", name)
    adapter = trained(params, spec)
    assert adapter.pairs

    # Merged, written, loaded: no key missing, none unexpected.
    merged = peft.merged(params, adapter, spec, key=0)
    peft.save_model(tmp_path / "m", merged, spec, names, like=tmp_path / "base")
    again, told = cls.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ours = outputs(again.eval())
    assert np.max(np.abs(ours - outputs(model))) > 1e-2

    # The adapter in PEFT gives the same.
    peft.save_adapter(
        tmp_path / "a", adapter, params, spec, names, base_model=str(tmp_path / "base")
    )
    base = cls.from_pretrained(tmp_path / "base")
    wrapped = judge.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    np.testing.assert_allclose(outputs(wrapped), ours, atol=1e-4)

    # An adapter of theirs, merged by us, gives theirs.
    base = cls.from_pretrained(tmp_path / "base")
    modules = sorted(names[path].module for path in adapter.pairs)
    config = judge.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules,
        rank_pattern={modules[0]: 2},
        alpha_pattern={modules[1]: 3},
        use_rslora=True,
        fan_in_fan_out=name == "gpt2",
    )
    theirs = judge.get_peft_model(base, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.load_adapter(tmp_path / "theirs", params, spec, names)
    assert set(read.pairs) == set(adapter.pairs)
    both = peft.merged(params, read, spec, key=0)
    peft.save_model(tmp_path / "both", both, spec, names, like=tmp_path / "base")
    found = outputs(cls.from_pretrained(tmp_path / "both").eval())
    np.testing.assert_allclose(found, outputs(theirs), atol=1e-4)


class Odd(torch.nn.Module):
    """A convolution, an embedding, a head, and experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(4, 7, (3, 2))
        self.tokens = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 4)
        self.moe = Experts()

    def forward(self, images, ids):
        seen = self.tokens(ids)
        return self.stem(images), self.head(seen), self.moe(seen)


class Experts(torch.nn.Module):
    """Two fused parameters: (experts, out, in)."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 5, 6))
        self.down = torch.nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        return torch.einsum("eio,eoj,...j->e...i", self.down, self.up, x)


def test_odd_modules(tmp_path):
    torch.manual_seed(0)
    model = Odd().eval()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    params = {
        "stem": state["stem.weight"].transpose(2, 3, 1, 0),
        "tokens": state["tokens.weight"],
        "head": {"kernel": state["head.weight"].T, "bias": state["head.bias"]},
        "up": state["moe.up"].transpose(0, 2, 1),
        "down": state["moe.down"].transpose(0, 2, 1),
    }
    params = jax.tree.map(jnp.asarray, params)
    spec = rl.Spec(
        2,
        side="left",
        rules=[
            rl.Rule("stem", rows=(0, 1, 2)),
            rl.Rule("up|down", batch=(0,)),
            rl.Rule("head/.*", mode="dense"),
        ],
    )
    names = {
        "stem": peft.Target("stem.weight", "conv"),
        "tokens": peft.Target("tokens.weight", "embedding", tied=False),
        "head/kernel": peft.Target("head.weight"),
        "head/bias": peft.Target("head.bias", "plain"),
        "up": peft.Target("moe.up", "experts", order=0),
        "down": peft.Target("moe.down", "experts", order=1),
    }
    adapter = trained(params, spec)
    peft.save_adapter(tmp_path / "a", adapter, params, spec, names)
    after = peft.merged(params, adapter, spec, key=0)
    images, ids = torch.randn(2, 4, 6, 5), torch.tensor([[1, 5, 10], [0, 2, 9]])
    wrapped = judge.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    with torch.no_grad():
        found = wrapped(images, ids)
    other = Odd().eval()
    changed = {
        "stem.weight": np.asarray(after["stem"]).transpose(3, 2, 0, 1),
        "tokens.weight": np.asarray(after["tokens"]),
        "head.weight": np.asarray(after["head"]["kernel"]).T,
        "head.bias": np.asarray(after["head"]["bias"]),
        "moe.up": np.asarray(after["up"]).transpose(0, 2, 1),
        "moe.down": np.asarray(after["down"]).transpose(0, 2, 1),
    }
    tensors = {
        key: torch.tensor(np.array(changed.get(key, value)))
        for key, value in state.items()
    }
    other.load_state_dict(tensors)
    with torch.no_grad():
        expected = other(images, ids)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_config_of_four_keys_is_enough(tmp_path):
    """What other tools write at the least, read by both."""
    cls, model = make("llama")
    model.save_pretrained(tmp_path / "base")
    params, spec, names = tree_of(tmp_path / "base", "llama")
    adapter = trained(params, spec)
    peft.save_adapter(tmp_path / "a", adapter, params, spec, names)
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    least = ("peft_type", "r", "lora_alpha", "target_modules")
    file.write_text(json.dumps({name: config[name] for name in least}))
    wrapped = judge.PeftModel.from_pretrained(
        cls.from_pretrained(tmp_path / "base"), tmp_path / "a"
    )
    read = peft.load_adapter(tmp_path / "a", params, spec, names)
    merged = peft.merged(params, read, spec, key=0)
    peft.save_model(tmp_path / "m", merged, spec, names, like=tmp_path / "base")
    ours = outputs(cls.from_pretrained(tmp_path / "m").eval())
    np.testing.assert_allclose(outputs(wrapped.eval()), ours, atol=1e-4)
