"""What an adapter's config says of it."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from raclora_jax.peft._files import read_json
from raclora_jax.peft._format import CONFIG
from raclora_jax.peft._patterns import compiled

# What an adapter may ask for that changes what its factors mean.
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Starts of a pair that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# take the start of theirs out of it.
_STARTS = (None, True, False, "eva", "gaussian", "mica", "orthogonal")


class _Type(NamedTuple):
    """What an entry may be.

    Attributes:
      fits: Whether a value is one.
      expected: It in words.
      default: What PEFT takes where the config is silent.
    """

    fits: Callable[[Any], bool]
    expected: str
    default: Any = None


# By type and not by isinstance: Python's True is an int.
def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    return -1e30 < value < 1e30  # also no NaN, and no integer beyond floats


def _is_layer(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_map(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _is_text_or_list(value: Any) -> bool:
    return _is_text(value) or _is_list(_is_text)(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_NAMES = _Type(_is_text_or_list, "an expression or a list of names")
_LIST = _Type(_is_list(_is_text), "a list of names")
_FLAG = _Type(_is_flag, "true or false", False)
_TYPES = {
    "alpha_pattern": _Type(_is_map(_is_number), "an object of finite numbers", {}),
    "bias": _Type(
        lambda value: value in ("none", "all", "lora_only"),
        "none, all or lora_only",
        "none",
    ),
    "ensure_weight_tying": _FLAG,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": _FLAG,
    "layers_pattern": _NAMES,
    "layers_to_transform": _Type(
        lambda value: _is_layer(value) or _is_list(_is_layer)(value), "numbers of layers"
    ),
    "lora_alpha": _Type(_is_number, "a finite number", 8),
    "lora_bias": _FLAG,
    "modules_to_save": _LIST,
    "peft_type": _Type(lambda value: value == "LORA", "'LORA'"),
    "peft_version": _Type(_is_text, "a version", "0"),
    "r": _Type(_is_count, "a number of at least 1", 8),
    "rank_pattern": _Type(_is_map(_is_count), "an object of numbers of at least 1", {}),
    "target_modules": _NAMES,
    "target_parameters": _LIST,
    "use_rslora": _FLAG,
}


class Config:
    """An ``adapter_config.json``, each of its entries of the type that PEFT gives it.

    Args:
      folder: The adapter's.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no LoRA's, or an entry is something else than it should be.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.file = folder / CONFIG
        if not self.file.exists():
            raise FileNotFoundError(
                f"{folder} has no {CONFIG}: it is no adapter's folder"
            )
        self._stated = read_json(self.file)
        if "peft_type" not in self._stated:
            raise ValueError(f"{self.file} has no peft_type, expected 'LORA'")
        for name, kind in _TYPES.items():
            value = self._stated.get(name)
            # null stands for the default, but not in r and lora_alpha, ints in PEFT.
            optional = name not in self._stated or type(kind.default) is not int
            if not ((value is None and optional) or kind.fits(value)):
                raise ValueError(
                    f"{self.file}: {name} is {_shown(value)}, expected {kind.expected}"
                )
        for name in _FOREIGN:
            if self._stated.get(name):
                raise ValueError(
                    f"{self.file}: {name} changes what the factors mean and is not read; "
                    "merge the adapter with the library that made it"
                )
        start = self._stated.get("init_lora_weights")
        if start not in _STARTS:
            raise ValueError(
                f"{self.file}: init_lora_weights is {_shown(start)}, so that its factors "
                "belong to a changed base; save it with "
                "path_initial_model_for_weight_conversion, or merge it with the library "
                "that made it"
            )

    def __getitem__(self, name: str) -> Any:
        value = self._stated.get(name)
        return _TYPES[name].default if value is None else value

    def scaling(self, module: str, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)``, and what the patterns say."""
        stated = self._pattern("rank_pattern", module, self["r"])
        if stated != rank:
            raise ValueError(
                f"{self.file}: the factors of {module} have rank {rank}, and the config "
                f"says {stated}"
            )
        alpha = self._pattern("alpha_pattern", module, self["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self["use_rslora"] else rank)

    @property
    def version(self) -> tuple[int, ...]:
        """Of the PEFT that wrote it."""
        parts = re.findall(r"\d{1,9}", self["peft_version"])
        return tuple(map(int, parts[:3]))

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts a pair beside this module."""
        names = self["target_modules"]
        if self._names("exclude_modules", module) or self.saves(module):
            return False
        if names in (None, "all-linear") or not self._names("target_modules", module):
            return False
        layers = self["layers_to_transform"]
        if layers in (None, []) or isinstance(names, str):
            return True
        found = self._layer(module)
        return found is not None and found in (
            layers if isinstance(layers, list) else [layers]
        )

    def adapts_parameter(self, name: str) -> bool:
        """Whether PEFT puts a pair beside this parameter."""
        return _ends(name, self["target_parameters"] or ())

    def saves(self, module: str) -> bool:
        """Whether a module is saved whole, or one that holds it."""
        parts = module.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(_ends(one, self["modules_to_save"] or ()) for one in above)

    def _names(self, entry: str, module: str) -> bool:
        names = self[entry] or ()
        if isinstance(names, str):
            return self._matches(entry, names, module)
        return _ends(module, names)

    def _layer(self, module: str) -> int | None:
        patterns = self["layers_pattern"] or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            self._compiled("layers_pattern", pattern)
            for part in re.finditer(r"\.(\d{1,9})(?=\.)", module):
                front = module[: part.start()]
                if self._matches("layers_pattern", rf".*\.(?:{pattern})", front):
                    return int(part[1])
        return None

    def _pattern(self, entry: str, module: str, otherwise: Any) -> Any:
        for key, value in self[entry].items():
            self._compiled(entry, key)  # by itself, so that its brackets are its own
            if self._matches(entry, rf"(?:.*\.)?(?:{key})", module):
                return value
        return otherwise

    def _matches(self, entry: str, pattern: str, text: str) -> bool:
        try:
            return compiled(pattern)(text)
        except ValueError as error:
            raise ValueError(f"{self.file}: {entry}: {error}") from error

    def _compiled(self, entry: str, pattern: str) -> None:
        try:
            compiled(pattern)
        except ValueError as error:
            raise ValueError(f"{self.file}: {entry}: {error}") from error


def _ends(name: str, names: Iterable[str]) -> bool:
    # With the dots: proj is no end of q_proj.
    return any(f".{name}".endswith(f".{one}") for one in names)


def _shown(value: Any) -> str:
    """Short, whatever it is."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a number"
    return text if len(text) <= 60 else f"{text[:60]}..."
