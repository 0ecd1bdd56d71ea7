"""What readers and writers of PEFT's folders must refuse, follow or take along."""

import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import raclora_jax as rl
from benchmarks.pods.fuzz import FAULTS, tally
from benchmarks.pods.fuzzing import folders
from raclora_jax import peft
from raclora_jax.peft import _models
from raclora_jax.peft._patterns import compiled

PARAMS = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
NAMES = {"kernel": peft.Target("m.weight"), "bias": peft.Target("m.bias", "plain")}
SPEC = rl.Spec(2)
START = "base_model.model."


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(tmp_path, name="base", **tensors):
    folder = tmp_path / name
    folder.mkdir()
    whole = {"m.weight": normal(0, 4, 6), "m.bias": normal(1, 4)}
    whole |= {key.replace("__", "."): array for key, array in tensors.items()}
    save_file(whole, folder / "model.safetensors")
    return folder


def adapter(tmp_path, tensors, name="adapter", **config):
    folder = tmp_path / name
    folder.mkdir()
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["m"]}
    save_file(
        {START + key: np.ascontiguousarray(array) for key, array in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder


PAIR = {"m.lora_A.weight": normal(2, 2, 6), "m.lora_B.weight": normal(3, 4, 2)}


class TestCodes:
    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.complex64])
    def test_are_no_weights(self, tmp_path, dtype):
        base = model(tmp_path, m__weight=np.ones((4, 6), dtype))
        with pytest.raises(ValueError, match=r"kernel is stored as .*codes"):
            peft.load_model(base, PARAMS, SPEC, NAMES)

    def test_scales_beside_a_weight(self, tmp_path):
        base = model(tmp_path, m__weight_scale_inv=np.ones(1, np.float32))
        with pytest.raises(ValueError, match=r"m\.weight has m\.weight_scale_inv beside"):
            peft.load_model(base, PARAMS, SPEC, NAMES)

    def test_small_floats_go_along(self, tmp_path):
        other = np.arange(6).reshape(2, 3).astype(jnp.float8_e4m3fn)
        base = model(tmp_path, other=other)
        saved = peft.save_model(tmp_path / "m", PARAMS, SPEC, NAMES, like=base)
        held = (saved / "model.safetensors").read_bytes()
        assert b'"F8_E4M3","shape":[2,3]' in held
        assert other.tobytes() in held

    def test_numbers_beyond_the_leaf(self, tmp_path):
        base = model(tmp_path, m__bias=np.array([1, 2, 3, 1e300]))
        with pytest.raises(ValueError, match="bias holds numbers beyond the range"):
            peft.load_model(base, PARAMS, SPEC, NAMES)


class TestIndex:
    def shards(self, tmp_path):
        peft.save_model(tmp_path / "s", PARAMS, SPEC, NAMES, most_bytes=20)
        return tmp_path / "s" / "model.safetensors.index.json"

    @pytest.mark.parametrize("file", ["../model.safetensors", "/x", "", ".", 5, None])
    def test_leads_nowhere_else(self, tmp_path, file):
        index = self.shards(tmp_path)
        stated = json.loads(index.read_text())
        stated["weight_map"]["m.bias"] = file
        index.write_text(json.dumps(stated))
        with pytest.raises(ValueError, match=r"index\.json: the file of m\.bias"):
            peft.load_model(index.parent, PARAMS, SPEC, NAMES)

    def test_a_parameter_in_two_shards(self, tmp_path):
        index = self.shards(tmp_path)
        first, second = sorted(index.parent.glob("model-*"))
        save_file(load_file(first) | load_file(second), second)
        with pytest.raises(ValueError, match="take it out of one"):
            peft.load_model(index.parent, PARAMS, SPEC, NAMES)


def test_patterns_match_as_those_of_re():
    draw = np.random.default_rng(0)
    atoms = [*"ab.", r"\.", "[^a.]", "(a|b)*", "(?:ab)?", r"\w+", ".*?", "a{,2}"]
    atoms += ["b{1,2}", "(?=a)", "(?!b)", r"\b", "^", "$", "(.*b)+", "|"]
    for _ in range(2000):
        pattern = "".join(draw.choice(atoms, size=draw.integers(1, 6)))
        text = "".join(draw.choice(list("ab."), size=draw.integers(0, 7)))
        try:
            expected = bool(re.fullmatch(pattern, text))
        except re.error:
            with pytest.raises(ValueError, match="no regular expression"):
                compiled(pattern)
        else:
            assert compiled(pattern)(text) is expected, (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    ["(.*)*(.*)*(.*)*!", r"(\w+\.?)+!", "(.|.)" * 40 + "!", "a?" * 40 + "a" * 40],
)
def test_no_pattern_hangs(pattern):
    assert not compiled(pattern)("model.layers.0.self_attn.q_proj" * 2)


class TestConfig:
    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
            ({"lora_alpha": None}, "lora_alpha is None"),
            ({"lora_alpha": 10**400}, "lora_alpha is a number"),
            ({"r": True}, "r is True"),
            ({"rank_pattern": [1]}, "rank_pattern is"),
            ({"alpha_pattern": {"(": 2}}, "alpha_pattern: .* no regular expression"),
            ({"target_modules": ["m"], "modules_to_save": ["m"]}, "modules_to_save"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices"),
            ({"bias": "all"}, r"names m\.bias by bias, and the file has nothing"),
        ],
    )
    def test_is_refused(self, tmp_path, config, match):
        folder = adapter(tmp_path, PAIR, **config)
        with pytest.raises(ValueError, match=rf"adapter_config\.json.*{match}"):
            peft.load_adapter(folder, PARAMS, SPEC, NAMES)

    def test_a_module_that_the_file_lacks(self, tmp_path):
        params = PARAMS | {"other": jnp.ones((6, 4))}
        names = NAMES | {"other": peft.Target("n.m.weight")}
        with pytest.raises(ValueError, match=r"names n\.m by target_modules"):
            peft.load_adapter(adapter(tmp_path, PAIR), params, SPEC, names)
        less = adapter(tmp_path, PAIR, "less", exclude_modules=["n.m"])
        assert set(peft.load_adapter(less, params, SPEC, names).pairs) == {"kernel"}

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_trained_biases(self, tmp_path, bias):
        whole = normal(4, 4)
        folder = adapter(tmp_path, PAIR | {"m.base_layer.bias": whole}, bias=bias)
        read = peft.load_adapter(folder, PARAMS | {"bias": jnp.ones(4)}, SPEC, NAMES)
        np.testing.assert_allclose(read.dense["bias"], whole - 1, atol=1e-6)


TABLE = {"embed": jnp.asarray(normal(5, 9, 6))}
OWN = {
    "tok.lora_embedding_A": normal(6, 2, 9),
    "tok.lora_embedding_B": normal(7, 6, 2),
}


class TestTied:
    def names(self, tied):
        return {"embed": peft.Target("tok.weight", "embedding", tied=tied)}

    def load(self, tmp_path, tensors, tied="lm_head.weight", **config):
        folder = adapter(tmp_path, tensors, target_modules=["tok"], **config)
        return peft.load_adapter(folder, TABLE, SPEC, self.names(tied))

    def test_both_modules_are_written(self, tmp_path):
        pair = peft.Pair(jnp.asarray(normal(8, 3, 9)), jnp.asarray(normal(9, 3, 6)))
        for name, change in (
            ("pair", peft.Adapter({"embed": pair})),
            ("whole", peft.Adapter({}, {"embed": jnp.asarray(normal(10, 9, 6))})),
        ):
            names = self.names("lm_head.weight")
            folder = peft.save_adapter(tmp_path / name, change, TABLE, SPEC, names)
            held = load_file(folder / "adapter_model.safetensors")
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["ensure_weight_tying"]
            if name == "pair":
                assert config["target_modules"] == ["lm_head", "tok"]
                product = (
                    held[f"{START}lm_head.lora_B.weight"]
                    @ held[f"{START}lm_head.lora_A.weight"]
                )
                expected = np.asarray(pair.down, np.float64).T @ np.asarray(pair.up)
                np.testing.assert_allclose(product, expected, atol=1e-5)
            else:
                assert config["modules_to_save"] == ["tok", "lm_head"]
                np.testing.assert_array_equal(
                    held[f"{START}lm_head.weight"], held[f"{START}tok.weight"]
                )

    def test_the_head_follows_or_has_the_same(self, tmp_path):
        read = self.load(tmp_path, OWN, ensure_weight_tying=True)
        assert set(read.pairs) == {"embed"}

    @pytest.mark.parametrize("more", [{}, {"lm_head.lora_A.weight": 0}])
    def test_the_embedding_alone(self, tmp_path, more):
        more = dict.fromkeys(more, OWN["tok.lora_embedding_B"].T)
        with pytest.raises(ValueError, match=r"tied lm_head\.weight.*untie them"):
            self.load(tmp_path, OWN | more)

    def test_nobody_said(self, tmp_path):
        with pytest.raises(ValueError, match=r"tied='lm_head\.weight'.*tied=False"):
            self.load(tmp_path, OWN, tied=None)

    def test_not_tied(self, tmp_path):
        assert set(self.load(tmp_path, OWN, tied=False).pairs) == {"embed"}


class TestFolders:
    def test_folders_go_along(self, tmp_path):
        base = model(tmp_path)
        for name in ("1_Pooling/config.json", "onnx/model.onnx", ".git/config"):
            (base / name).parent.mkdir()
            (base / name).write_text("{}")
        (base / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
        with pytest.warns(UserWarning, match=r"onnx/model\.onnx went along"):
            saved = peft.save_model(tmp_path / "m", PARAMS, SPEC, NAMES, like=base)
        assert (saved / "1_Pooling" / "config.json").read_text() == "{}"
        assert not (saved / ".git").exists()

    def test_umask_and_long_names(self, tmp_path):
        before = os.umask(0o077)
        try:
            saved = peft.save_model(tmp_path / ("x" * 250), PARAMS, SPEC, NAMES)
        finally:
            os.umask(before)
        assert saved.stat().st_mode & 0o777 == 0o700

    def test_what_a_killed_run_left_is_cleared(self, tmp_path):
        code = (
            "import os, sys, jax.numpy as jnp\n"
            "from raclora_jax import peft\n"
            "from raclora_jax.peft import _models\n"
            "_models._compare = lambda *_: os._exit(9)\n"
            "names = {'w': peft.Target('w.weight')}\n"
            "peft.save_model(sys.argv[1], {'w': jnp.ones((3, 2))}, 1, names)\n"
        )
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], env=env)
        assert done.returncode == 9
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".m.")
        (left / "stray").mkdir()
        saved = peft.save_model(tmp_path / "m", PARAMS, SPEC, NAMES)
        assert [path.name for path in saved.iterdir()] == ["model.safetensors"]
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_two_writers(self, tmp_path, monkeypatch):
        def another(*_):
            with pytest.raises(BlockingIOError, match="written by another run"):
                peft.save_model(tmp_path / "m", PARAMS, SPEC, NAMES)

        monkeypatch.setattr(_models, "_compare", another)
        peft.save_model(tmp_path / "m", PARAMS, SPEC, NAMES)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_a_full_disk_has_a_name(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(_models, "save_sharded", full)
        with pytest.raises(OSError, match=r"/m could not be written.*No space left"):
            peft.save_model(tmp_path / "m", PARAMS, SPEC, NAMES)
        assert list(tmp_path.iterdir()) == []


def test_families():
    tree = {
        "embedder": {"input_embedding": jnp.ones((9, 6))},
        "layers": {"3": {"attn": {"attn_vec_einsum": {"w": jnp.ones((2, 3, 6))}}}},
    }
    names = peft.names_of("gemma3_text", tree)
    assert names["embedder/input_embedding"].tied == "lm_head.weight"
    where = names["layers/3/attn/attn_vec_einsum/w"].name
    assert where == "model.layers.3.self_attn.o_proj.weight"
    untied = peft.names_of("llama", tree | {"lm_head": {"w": jnp.ones((6, 9))}})
    assert untied["embedder/input_embedding"].tied is False
    with pytest.raises(ValueError, match="'gpt2' is not among llama"):
        peft.names_of("gpt2", tree)


def test_damaged_folders(tmp_path):
    """Each refused by name or read right; ``benchmarks.pods.fuzz`` runs thousands."""
    seen = []
    counts = tally("folders", folders.cases(1, 30, tmp_path), seen)
    assert not seen
    assert counts["cases"] == 30
    assert not any(counts[fault] for fault in FAULTS)
