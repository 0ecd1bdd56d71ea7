"""Adapters and models in the formats of PEFT and Transformers."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from safetensors.numpy import load_file, save_file

import raclora_jax as rl
from raclora_jax import peft

SPEC = rl.Spec(
    2,
    side="left",
    rest="dense",
    rules=[
        rl.Rule("query", rows=(0,), rank=3),
        rl.Rule("stack", batch=(0,)),
        rl.Rule("experts", batch=(0,), side="right"),
        rl.Rule("conv", rows=(0, 1, 2)),
        rl.Rule("head/.*", mode="dense"),
        rl.Rule("norm", mode="frozen"),
    ],
)
SHAPES = {
    "query": (6, 2, 5),  # (in, heads, head_dim)
    "stack": (3, 7, 5),
    "experts": (4, 6, 5),
    "conv": (3, 2, 4, 7),
    "embed": (11, 6),
    "gpt": (5, 7),
    "gpt_bias": (7,),
    "head": {"kernel": (6, 4), "bias": (4,)},
    "norm": (6,),
}
NAMES = {
    "query": peft.Target("attn.q_proj.weight"),
    "stack": peft.Target("layers.{}.up.weight"),
    "experts": peft.Target("moe.experts.up", "experts"),
    "conv": peft.Target("stem.weight", "conv"),
    "embed": peft.Target("tokens.weight", "embedding", tied=False),
    "gpt": peft.Target("c_fc.weight", "transposed"),
    "gpt_bias": peft.Target("c_fc.bias", "plain"),
    "head/kernel": peft.Target("head.weight"),
    "head/bias": peft.Target("head.bias", "plain"),
    "norm": peft.Target("norm.weight", "plain"),
}
ADAPTED = ("query", "stack", "experts", "conv", "embed", "gpt")


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tree(seed):
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    leaves = [jnp.asarray(normal((seed, i), s)) for i, s in enumerate(shapes)]
    return jax.tree.unflatten(treedef, leaves)


@pytest.fixture(scope="module")
def params():
    return tree(0)


@pytest.fixture(scope="module")
def links(params):
    """Two links of a chain: base, factors, chain of each, and the weights after both."""
    base, (factors, chain), seen = params, rl.init_adapter(params, SPEC, key=5), []
    for link in range(2):
        factors = jax.tree.map(
            lambda f, link=link: f + jnp.asarray(normal((9, link, f.ndim), f.shape)),
            factors,
        )
        seen.append((base, factors, chain))
        base, factors, chain = rl.next_link(base, factors, chain, SPEC)
    return seen, base


def changes(before, after):
    return jax.tree.map(
        lambda a, b: np.asarray(b, np.float64) - np.asarray(a), before, after
    )


def test_a_link_is_its_adapter(params, links):
    (base, factors, chain), *_ = links[0]
    adapter = peft.of_link(base, factors, chain, SPEC)
    found = peft.merged(base, adapter, SPEC, key=0)
    assert_close(found, rl.merge(base, factors, chain, SPEC))


@pytest.mark.parametrize("side", ["left", "right", 0.5])
@pytest.mark.parametrize("law", ["orthonormal", "block", "coordinate"])
def test_every_law_and_side(side, law):
    spec = rl.Spec(2, side=side, sketch=law, alpha=3.0)
    base = {"kernel": jnp.asarray(normal(1, (9, 7)))}
    factors, chain = rl.init_adapter(base, spec, key=2)
    factors = jax.tree.map(lambda f: jnp.asarray(normal(3, f.shape)), factors)
    adapter = peft.of_link(base, factors, chain, spec)
    found = peft.merged(base, adapter, spec, key=0)
    assert_close(found, rl.merge(base, factors, chain, spec))


def test_links_add_up(params, links):
    seen, after = links
    adapter = peft.summed(peft.of_link(*one, SPEC) for one in seen)
    assert {adapter.pairs[path].rank for path in ADAPTED} == {4, 6}
    assert_close(peft.merged(params, adapter, SPEC, key=0), after)


def two(adapter):
    """What PEFT takes in one adapter: the second without biases and transposed ones."""
    apart = ("experts", "embed")
    rest = {path: pair for path, pair in adapter.pairs.items() if path not in apart}
    return (
        peft.Adapter(rest, adapter.dense),
        peft.Adapter({path: adapter.pairs[path] for path in apart}),
    )


def test_adapter_comes_back(params, links, tmp_path):
    seen, after = links
    adapter = peft.summed(peft.of_link(*one, SPEC) for one in seen)
    found, configs = params, []
    for number, part in enumerate(two(adapter)):
        folder = peft.save_adapter(tmp_path / str(number), part, params, SPEC, NAMES)
        again = peft.load_adapter(folder, params, SPEC, NAMES)
        found = peft.merged(found, again, SPEC, key=0)
        configs.append(json.loads((folder / "adapter_config.json").read_text()))
    assert_close(found, after)
    assert configs[1]["target_parameters"] == ["moe.experts.up"]
    config = configs[0]
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == {"attn.q_proj": 6} == config["alpha_pattern"]
    assert config["modules_to_save"] == ["head"]
    assert config["lora_bias"]
    assert config["fan_in_fan_out"]


def test_factors_lie_as_peft_has_them(params, links, tmp_path):
    """Against the layout of every kind, written out by hand."""
    (base, factors, chain), *_ = links[0]
    read = {}
    for number, part in enumerate(two(peft.of_link(base, factors, chain, SPEC))):
        folder = peft.save_adapter(tmp_path / str(number), part, base, SPEC, NAMES)
        read |= load_file(folder / "adapter_model.safetensors")
    delta = changes(base, rl.merge(base, factors, chain, SPEC))

    def both(module):
        keys = (f"base_model.model.{module}.lora_{ab}.weight" for ab in "AB")
        return (read[key].astype(np.float64) for key in keys)

    a, b = both("attn.q_proj")
    assert (a.shape, b.shape) == ((3, 6), (10, 3))
    assert_close((b @ a).T.reshape(6, 2, 5), delta["query"])
    for layer in range(3):
        a, b = both(f"layers.{layer}.up")
        assert_close(b @ a, delta["stack"][layer].T)
    a, b = both("moe.experts")
    assert (a.shape, b.shape) == ((8, 6), (5, 8))
    for expert in range(4):
        # Expert slowest in A's rows, fastest in B's columns.
        one = b.reshape(5, 2, 4)[:, :, expert] @ a.reshape(4, 2, 6)[expert]
        assert_close(one, delta["experts"][expert].T)
    a, b = both("stem")
    assert (a.shape, b.shape) == ((2, 4, 3, 2), (7, 2, 1, 1))
    assert_close(np.einsum("rchw,or->hwco", a, b[:, :, 0, 0]), delta["conv"])
    a, b = (read[f"base_model.model.tokens.lora_embedding_{ab}"] for ab in "AB")
    assert (a.shape, b.shape) == ((2, 11), (6, 2))
    assert_close((b @ a).T, delta["embed"])
    assert_close(read["base_model.model.c_fc.lora_B.bias"], delta["gpt_bias"])
    whole = np.asarray(base["head"]["kernel"]) + delta["head"]["kernel"]
    assert_close(read["base_model.model.head.weight"], whole.T)


def test_scalings_and_missing_layers(params, tmp_path):
    """Files as others write them: other alpha, ranks by pattern, some layers only."""
    (tmp_path / "a").mkdir()
    sizes = {
        "attn.q_proj": (3, 6, 10),
        "layers.1.up": (2, 7, 5),
        "layers.2.up": (1, 7, 5),
    }
    tensors, expected = {}, {"query": np.zeros((6, 10)), "stack": np.zeros((3, 7, 5))}
    for number, (module, (rank, rows, cols)) in enumerate(sizes.items()):
        a, b = normal((1, number), (rank, rows)), normal((2, number), (cols, rank))
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        scaling = {"attn.q_proj": 6, "layers.1.up": 5, "layers.2.up": 16}[module]
        delta = scaling / np.sqrt(rank) * (b @ a).T
        if module == "attn.q_proj":
            expected["query"] = delta
        else:
            expected["stack"][int(module.split(".")[1])] = delta
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        # The first key that matches decides, as in PEFT.
        "rank_pattern": {"layers.2.up": 1, "up": 2},
        "alpha_pattern": {"layers.1.up": 5, "up": 16},
        "target_modules": ["q_proj", "layers.1.up", "layers.2.up"],
    }
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    adapter = peft.load_adapter(tmp_path / "a", params, SPEC, NAMES)
    assert set(adapter.pairs) == {"query", "stack"}
    found = changes(params, peft.merged(params, adapter, SPEC, key=0))
    assert_close(found["query"], expected["query"].reshape(6, 2, 5))
    assert_close(found["stack"], expected["stack"])


@pytest.mark.parametrize("most_bytes", [10**9, 400])
def test_model_comes_back(params, tmp_path, most_bytes):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    half["norm"] = params["norm"]
    peft.save_model(tmp_path / "base", half, SPEC, NAMES)
    (tmp_path / "base" / "config.json").write_text("{}")
    other = {"kept.buffer": np.arange(3)}
    save_file(
        load_file(tmp_path / "base" / "model.safetensors") | other,
        tmp_path / "base" / "model.safetensors",
    )
    peft.save_model(
        tmp_path / "m", half, SPEC, NAMES, like=tmp_path / "base", most_bytes=most_bytes
    )
    again = peft.load_model(tmp_path / "m", half, SPEC, NAMES)
    jax.tree.map(np.testing.assert_array_equal, again, half)
    assert jax.tree.map(lambda w: w.dtype, again) == jax.tree.map(lambda w: w.dtype, half)
    files = sorted(os.listdir(tmp_path / "m"))
    assert "config.json" in files
    if most_bytes == 400:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {f for f in files if "-of-" in f}
        read = load_file(tmp_path / "m" / index["weight_map"]["kept.buffer"])
    else:
        read = load_file(tmp_path / "m" / "model.safetensors")
    np.testing.assert_array_equal(read["kept.buffer"], np.arange(3))


@pytest.mark.parametrize("ties", [None, True, False])
def test_a_copy_of_a_parameter_goes_with_it(params, tmp_path, ties):
    """The head of a tied model; what only looks like one stays as it is."""
    base = peft.save_model(tmp_path / "base", params, SPEC, NAMES)
    table = np.asarray(params["embed"])
    others = {
        "lm_head.weight": table,
        "lookalike.weight": table[::-1].copy(),
        "scale": np.array(3.0, np.float32),
    }
    file = base / "model.safetensors"
    save_file(load_file(file) | others, file)
    if ties is not None:
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": ties}))
    moved = params | {"embed": params["embed"] + 1}
    saved = peft.save_model(tmp_path / "m", moved, SPEC, NAMES, like=base)
    read = load_file(saved / "model.safetensors")
    expected = table if ties is False else table + 1
    np.testing.assert_array_equal(read["lm_head.weight"], expected)
    np.testing.assert_array_equal(read["lookalike.weight"], table[::-1])
    assert read["scale"].shape == ()


def test_a_single_number_comes_back(tmp_path):
    params = {"scale": jnp.float32(2.5), "w": jnp.ones((3, 2))}
    names = {"scale": peft.Target("scale", "plain"), "w": peft.Target("w.weight")}
    saved = peft.save_model(tmp_path / "m", params, 1, names)
    assert peft.load_model(saved, params, 1, names)["scale"].shape == ()


def test_best_is_the_leading_singular_part():
    before = {
        "w": jnp.asarray(normal(0, (20, 12))),
        "s": jnp.asarray(normal(1, (2, 12, 20))),
    }
    decay = 0.6 ** np.arange(12)
    spec = rl.Spec(2, rules=[rl.Rule("s", batch=(0,))])

    def falling(seed):
        u, _ = np.linalg.qr(normal((seed, 0), (20, 12)))
        v, _ = np.linalg.qr(normal((seed, 1), (12, 12)))
        return (u * decay) @ v.T

    delta = {"w": falling(3), "s": np.stack([falling(4).T, falling(5).T])}
    after = jax.tree.map(lambda w, d: w + jnp.asarray(d, jnp.float32), before, delta)
    lines = []
    adapter, kept = peft.best(before, after, spec, rank=5, key=0, report=lines.append)
    lost = np.sqrt(np.sum(decay[5:] ** 2) / np.sum(decay**2))
    assert len(lines) == 2
    for path in ("w", "s"):
        assert kept[path].error == pytest.approx(lost, rel=1e-3)
        assert adapter.pairs[path].rank == 5
    found = changes(before, peft.merged(before, adapter, spec, key=0))
    error = np.linalg.norm(found["w"] - delta["w"]) / np.linalg.norm(decay)
    assert error == pytest.approx(lost, rel=1e-3)
    energy = np.cumsum(decay**2) / np.sum(decay**2)
    _, kept = peft.best(before, after, spec, energy=0.95, key=0, report=lines.append)
    assert kept["w"].rank == np.searchsorted(energy, 0.95) + 1
    assert kept["w"].energy >= 0.95 - 1e-6


def test_a_change_of_nothing():
    before = {"w": jnp.ones((6, 4))}
    adapter, kept = peft.best(before, before, 2, rank=2, key=0, report=lambda line: None)
    assert kept["w"] == (2, 1.0, 0.0)
    assert not np.any(adapter.pairs["w"].down)


class TestBadInput:
    @pytest.fixture
    def folder(self, params, links, tmp_path):
        adapter, _ = two(peft.of_link(*links[0][0], SPEC))
        return peft.save_adapter(tmp_path / "a", adapter, params, SPEC, NAMES)

    def change(self, folder, **config):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))

    def load(self, folder, params, names=NAMES):
        return peft.load_adapter(folder, params, SPEC, names)

    def test_existing_folder_is_left(self, folder, params, links):
        before = (folder / "adapter_model.safetensors").read_bytes()
        adapter, _ = two(peft.of_link(*links[0][0], SPEC))
        with pytest.raises(FileExistsError, match="left as it is"):
            peft.save_adapter(folder, adapter, params, SPEC, NAMES)
        assert (folder / "adapter_model.safetensors").read_bytes() == before

    def test_nan_is_never_kept(self, params, links, tmp_path):
        adapter = peft.of_link(*links[0][0], SPEC)
        pair = adapter.pairs["gpt"]
        bad = peft.Adapter({"gpt": pair._replace(up=pair.up * jnp.nan)})
        with pytest.raises(ValueError, match=r"'gpt'.*NaN"):
            peft.save_adapter(tmp_path / "b", bad, params, SPEC, NAMES)
        assert list(tmp_path.iterdir()) == []

    def test_no_config(self, tmp_path, params):
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
            self.load(tmp_path, params)

    def test_pickled(self, folder, params):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match="pickled and never loaded"):
            self.load(folder, params)

    def test_cut_short(self, folder, params):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(ValueError, match="no whole safetensors file"):
            self.load(folder, params)

    def test_keys_that_match_nothing(self, folder, params):
        names = {path: name for path, name in NAMES.items() if path != "gpt"}
        with pytest.raises(ValueError, match=r"c_fc\.lora_A.*matches no leaf"):
            self.load(folder, params, names)

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"peft_type": "IA3"}, "expected 'LORA'"),
            ({"use_dora": True}, "use_dora"),
            ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
            ({"init_lora_weights": "pissa_niter_4"}, "belong to a changed base"),
            ({"rank_pattern": {"q_proj": 4}}, "rank 3, and the config says 4"),
            ({"r": 7}, "rank 2, and the config says 7"),
        ],
    )
    def test_config(self, folder, params, config, match):
        self.change(folder, **config)
        with pytest.raises(ValueError, match=match):
            self.load(folder, params)

    def test_what_peft_refuses_is_not_written(self, params, links, tmp_path):
        adapter = peft.of_link(*links[0][0], SPEC)
        beside = {"embed": "a bias changed", "experts": "a transposed matrix"}
        for path, what in beside.items():
            dense = adapter.dense if path == "embed" else {}
            pairs = {one: adapter.pairs[one] for one in (path, "gpt")}
            with pytest.raises(ValueError, match=f"PEFT takes no .* with {what}"):
                peft.save_adapter(
                    tmp_path / "b", peft.Adapter(pairs, dense), params, SPEC, NAMES
                )
        assert list(tmp_path.iterdir()) == []

    def test_a_small_change_is_compared_by_its_own_size(
        self, params, tmp_path, monkeypatch
    ):
        pair = peft.Pair(1e-4 * jnp.ones((2, 5)), 1e-4 * jnp.ones((2, 7)))
        small, none = (
            peft.Adapter({"gpt": p}) for p in (pair, pair._replace(up=0 * pair.up))
        )
        peft.save_adapter(tmp_path / "a", small, params, SPEC, NAMES)
        monkeypatch.setattr("raclora_jax.peft._write.load_adapter", lambda *_: none)
        with pytest.raises(ValueError, match="came back"):
            peft.save_adapter(tmp_path / "b", small, params, SPEC, NAMES)

    def test_weights_saved_beside_a_pair(self, params, links, tmp_path):
        """As PEFT does of an embedding: the base's own, or the adapter is another's."""
        _, part = two(peft.of_link(*links[0][0], SPEC))
        folder = peft.save_adapter(tmp_path / "a", part, params, SPEC, NAMES)
        file = folder / "adapter_model.safetensors"
        tensors, table = load_file(file), np.asarray(params["embed"])
        for scale, fits in ((1 + 2**-9, True), (1.5, False)):
            beside = {"base_model.model.tokens.base_layer.weight": table * scale}
            save_file(tensors | jax.tree.map(np.float32, beside), file)
            if fits:
                assert set(self.load(folder, params).pairs) == {"embed", "experts"}
            else:
                with pytest.raises(ValueError, match="trained beside other weights"):
                    self.load(folder, params)

    def test_square_experts_of_an_older_peft(self, tmp_path):
        params = {"up": jnp.ones((2, 6, 6))}
        spec = rl.Spec(2, rules=[rl.Rule("up", batch=(0,))])
        names = {"up": peft.Target("moe.up", "experts")}
        adapter = peft.of_link(params, *rl.init_adapter(params, spec, key=0), spec)
        folder = peft.save_adapter(tmp_path / "a", adapter, params, spec, names)
        assert set(peft.load_adapter(folder, params, spec, names).pairs) == {"up"}
        for version in ("0.18.1", None):
            self.change(folder, peft_version=version)
            with pytest.raises(ValueError, match="written transposed"):
                peft.load_adapter(folder, params, spec, names)

    @pytest.mark.parametrize("cut", ["missing", "shape"])
    def test_factors(self, folder, params, cut):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        key = "base_model.model.c_fc.lora_B.weight"
        if cut == "missing":
            del tensors[key]
        else:
            tensors[key] = np.ascontiguousarray(tensors[key][:-1])
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"'gpt'.*c_fc"):
            self.load(folder, params)

    def test_names(self, params):
        with pytest.raises(ValueError, match="kind must be one of"):
            peft.Target("a.weight", "conv4d")
        with pytest.raises(ValueError, match=r"'<module>\.weight'"):
            peft.Target("a")
        with pytest.raises(ValueError, match=r"'conv' has no name"):
            peft.targets(params, [("e.*|gpt.*|head.*|norm|query", "x.weight")])
        with pytest.raises(ValueError, match="names no leaf"):
            peft.targets(params, [(".*", "x.weight"), ("head", "y.weight")])

    def test_models(self, params, tmp_path):
        two = NAMES | {"gpt": peft.Target("tokens.weight", "transposed")}
        with pytest.raises(ValueError, match=r"both named tokens\.weight"):
            peft.save_model(tmp_path / "m", params, SPEC, two)
        places = NAMES | {"stack": peft.Target("up.weight")}
        with pytest.raises(ValueError, match=r"'stack'.*0 places"):
            peft.save_model(tmp_path / "m", params, SPEC, places)
        few = {path: name for path, name in NAMES.items() if path != "norm"}
        with pytest.raises(ValueError, match=r"'norm' has no name"):
            peft.save_model(tmp_path / "m", params, SPEC, few)
        assert list(tmp_path.iterdir()) == []
        peft.save_model(tmp_path / "m", params, SPEC, NAMES)
        wide = params | {"gpt": jnp.ones((5, 8))}
        with pytest.raises(ValueError, match=r"'gpt'.*expected c_fc\.weight"):
            peft.load_model(tmp_path / "m", wide, SPEC, NAMES)

    def test_fused_experts_of_no_order(self, tmp_path):
        params = {"up": jnp.ones((2, 6, 5)), "down": jnp.ones((2, 5, 6))}
        spec = rl.Spec(2, side="left", rules=[rl.Rule("up|down", batch=(0,))])
        names = {p: peft.Target(f"moe.{p}", "experts") for p in params}
        adapter = peft.of_link(params, *rl.init_adapter(params, spec, key=0), spec)
        with pytest.raises(ValueError, match="are of one module: say by order"):
            peft.save_adapter(tmp_path / "b", adapter, params, spec, names)

    def test_best(self, params):
        with pytest.raises(ValueError, match="give rank or energy"):
            peft.best(params, params, SPEC, key=0)
        with pytest.raises(ValueError, match="at most 1"):
            peft.best(params, params, SPEC, energy=1.5, key=0)

    def test_a_pair_of_another_leaf(self, params):
        pair = peft.Pair(jnp.ones((2, 5)), jnp.ones((2, 8)))
        with pytest.raises(ValueError, match=r"'gpt'.*up must be"):
            peft.merged(params, peft.Adapter({"gpt": pair}), SPEC, key=0)
        with pytest.raises(ValueError, match="no leaf"):
            peft.merged(params, peft.Adapter({"gtp": pair}), SPEC, key=0)
        twice = peft.Adapter({"gpt": pair}, {"gpt": jnp.ones((5, 7))})
        with pytest.raises(ValueError, match="'gpt' by a pair and in full"):
            peft.merged(params, twice, SPEC, key=0)
