"""Damaged folders of the hub's layout: models, their shards, and adapters of PEFT."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import raclora_jax as rl
from benchmarks.pods.fuzzing.case import Case
from raclora_jax import peft

_SPEC = rl.Spec(2, rules=[rl.Rule("norm", mode="frozen")])
_NAMES = {
    "embed": peft.Target("model.embed.weight", "embedding", tied="lm_head.weight"),
    "up": peft.Target("model.layers.{}.up.weight"),
    "down": peft.Target("model.down.weight"),
    "bias": peft.Target("model.down.bias", "plain"),
    "norm": peft.Target("model.norm.weight", "plain"),
}
_ODD = (
    None,
    True,
    0,
    -1,
    3.5,
    1e400,
    float("nan"),
    10**400,
    "",
    "x",
    "../../x",
    "/dev/zero",
    ".",
    "x" * 5000,
    [],
    [None],
    ["up"],
    [[]],
    {},
    {"up": 3},
    {"(.*)*(.*)*(.*)*!": 2},
    {r"(\w+\.?)+!": 2},
    {"(": 2},
    {"up": None},
    {"": "x"},
)
_DTYPES = (np.int8, np.uint8, np.int32, np.complex64, np.float64, np.float16, np.bool_)


def _params() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    shapes = {"embed": (11, 6), "up": (2, 6, 5), "down": (5, 6), "bias": (6,)}
    shapes["norm"] = (6,)
    return {
        path: jnp.asarray(draw.normal(size=shape), jnp.float32)
        for path, shape in shapes.items()
    }


def cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """Whole folders, each with one thing damaged by the next draw of the seed."""
    draw, params = random.Random(seed), _params()
    spec = rl.Spec(2, rules=[rl.Rule("up", batch=(0,)), *_SPEC.rules], rest="dense")
    moved = jax.tree.map(lambda w: w + 0.5, params)
    pairs, _ = peft.best(params, moved, spec, rank=2, key=0, report=lambda _: None)
    plain = {p: pair for p, pair in pairs.pairs.items() if p != "embed"}
    change = {
        "adapter with a bias": peft.Adapter(plain, pairs.dense),
        "tied adapter": peft.Adapter(pairs.pairs),
    }
    makers: dict[str, pathlib.Path] = {
        name.replace(" ", "_"): peft.save_adapter(
            folder / name.replace(" ", "_"), one, params, spec, _NAMES
        )
        for name, one in change.items()
    }
    makers["model"] = peft.save_model(folder / "model", params, spec, _NAMES)
    makers["shards"] = peft.save_model(
        folder / "shards", params, spec, _NAMES, most_bytes=200
    )
    for number in range(count):
        kind = draw.choice(list(makers))
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(makers[kind], case)
        damages = [_bytes, _tensor, _tensor]
        if kind != "model":
            damages += [_entry, _entry, _entry]
        name = draw.choice(damages)(case, draw)
        read = _model if kind in ("model", "shards") else _adapter
        yield Case(f"{number} {kind}: {name}", *read(case, params, spec))


def _model(case: pathlib.Path, params: Any, spec: rl.Spec) -> tuple[Callable, Callable]:
    def right(read: Any) -> bool:
        """What an independent reading of the files gives."""
        held: dict[str, np.ndarray] = {}
        for file in sorted(case.glob("*.safetensors")):
            held |= load_file(file)
        layers = [held[f"model.layers.{index}.up.weight"].T for index in range(2)]
        wanted = {
            "embed": held["model.embed.weight"],
            "up": np.stack(layers),
            "down": held["model.down.weight"].T,
            "bias": held["model.down.bias"],
            "norm": held["model.norm.weight"],
        }
        tied = held.get("lm_head.weight")
        return _equal(read, wanted) and (tied is None or _equal(tied, wanted["embed"]))

    return lambda: peft.load_model(case, params, spec, _NAMES), right


def _adapter(case: pathlib.Path, params: Any, spec: rl.Spec) -> tuple[Callable, Callable]:
    base = {path: np.asarray(leaf, np.float64) for path, leaf in params.items()}

    def read() -> Any:
        found = peft.load_adapter(case, params, spec, _NAMES)
        return peft.merged(params, found, spec, key=0)

    def right(found: Any) -> bool:
        """By PEFT's arithmetic in float64, of what the files say."""
        config = json.loads((case / "adapter_config.json").read_text())
        held = load_file(case / "adapter_model.safetensors")
        start = "base_model.model."
        held = {k.removeprefix(start): v.astype(np.float64) for k, v in held.items()}

        def scaling(module: str, rank: int) -> float:
            alpha = config.get("lora_alpha", 8)
            for key, value in (config.get("alpha_pattern") or {}).items():
                if f".{module}".endswith(f".{key}"):
                    alpha = value
                    break
            return alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)

        def product(module: str, first: str, second: str) -> np.ndarray | float:
            if f"{module}.{first}" not in held:
                return 0.0
            down, up = held.pop(f"{module}.{first}"), held.pop(f"{module}.{second}")
            return scaling(module, len(down)) * (up @ down).T

        pair = ("lora_A.weight", "lora_B.weight")
        beside = ("lora_embedding_A", "lora_embedding_B")
        tied = product("lm_head", *pair)
        change = {
            "embed": product("model.embed", *beside),
            "up": np.stack(
                [
                    np.broadcast_to(product(f"model.layers.{i}.up", *pair), (6, 5))
                    for i in range(2)
                ]
            ),
            "down": product("model.down", *pair),
            "bias": held.pop("model.down.lora_B.bias", 0.0) * scaling("model.down", 2),
            "norm": 0.0,
        }
        if isinstance(change["embed"], float) != isinstance(tied, float):
            return bool(config.get("ensure_weight_tying"))
        same = np.allclose(np.transpose(tied), change["embed"], atol=1e-4)
        wanted = {path: base[path] + change[path] for path in base}
        wanted["norm"] = held.pop("model.norm.weight", wanted["norm"])
        return same and not held and _equal(found, wanted)

    return read, right


def _equal(found: Any, wanted: Any) -> bool:
    """Up to rounding; what is no number is none in both."""
    with np.errstate(all="ignore"):
        same = jax.tree.map(
            lambda a, b: bool(
                np.allclose(
                    np.asarray(a, np.float64),
                    np.asarray(b, np.float64),
                    rtol=1e-3,
                    atol=1e-4,
                    equal_nan=True,
                )
            ),
            found,
            wanted,
        )
    return all(jax.tree.leaves(same))


def _bytes(case: pathlib.Path, draw: random.Random) -> str:
    """A byte, or the end, or all of a file."""
    file = draw.choice(sorted(case.iterdir()))
    data = bytearray(file.read_bytes())
    how = draw.choice(("flipped", "cut", "empty", "gone", "folder"))
    place = draw.randrange(len(data))
    if how == "flipped":
        data[place] ^= 1 << draw.randrange(8)
    data = data[: {"cut": place, "empty": 0}.get(how, len(data))]
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(data)
    return f"{file.name} {how} at {place}"


def _tensor(case: pathlib.Path, draw: random.Random) -> str:
    """Another type, shape, name or place of an array."""
    file = draw.choice(sorted(case.glob("*.safetensors")))
    held = load_file(file)
    name = draw.choice(sorted(held))
    array = held[name]
    how = draw.choice(("dtype", "shape", "gone", "name", "twice", "huge", "nan"))
    if how == "dtype":
        held[name] = (100 * array).astype(draw.choice(_DTYPES))
    elif how == "shape":
        held[name] = draw.choice((array[:1], array[..., :0], array.ravel(), array[None]))
    elif how == "gone":
        del held[name]
    elif how == "name":
        held[draw.choice((f"x.{name}", "", name[:-1], f"{name}_scale"))] = held.pop(name)
    elif how == "twice":
        held[f"{name}_scale_inv"] = np.ones(1, np.float32)
    else:
        held[name] = array.astype(np.float64) * (1e300 if how == "huge" else np.nan)
    held = {key: np.ascontiguousarray(one) for key, one in held.items()}
    save_file(held, file)
    return f"{name} in {file.name}: {how}"


def _entry(case: pathlib.Path, draw: random.Random) -> str:
    """Something else in a config or an index."""
    file = draw.choice(sorted(case.glob("*.json")))
    stated = json.loads(file.read_text())
    inner = stated.get("weight_map", stated)
    value = draw.choice(_ODD)
    name = draw.choice(sorted(inner))
    if draw.random() < 0.1:
        inner, name = stated, draw.choice(sorted(stated))
    if draw.random() < 0.2:
        del inner[name]
        value = "gone"
    else:
        inner[name] = value
    file.write_text(json.dumps(stated))
    return f"{file.name}: {name} is {str(value)[:40]}"
