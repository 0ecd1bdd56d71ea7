"""Names of leaves by rules, of which a model may not need every one."""

from __future__ import annotations

import re
from typing import Any

from flax.traverse_util import flatten_dict

from raclora_jax import peft


def targets(params: Any, rules: list[tuple]) -> dict[str, peft.Target]:
    """``peft.targets`` by those rules that name a leaf."""
    leaves = flatten_dict(params, sep="/")
    used = [rule for rule in rules if any(re.fullmatch(rule[0], path) for path in leaves)]
    return peft.targets(params, used)
