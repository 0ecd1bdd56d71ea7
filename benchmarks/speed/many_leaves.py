"""What a tree of many leaves costs before the first step, ours beside AdamW.

Processor seconds and growth of the process at ``init``; processor seconds of lowering and
compiling ``update`` on dense gradients. Leaves of 16 x 8 at rank 2, each measurement in a
process of its own.

    python -m benchmarks.speed.many_leaves [--quick]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import raclora_jax as rl
from benchmarks.shared import rows, timing

LEAVES = {"init": 10_000, "update": 1_000}
METHODS = {
    "AdamW": lambda: optax.adamw(1e-3),
    "ours": lambda: rl.raclora(1e-3, 2, key=0),
}


def measured(what: str, name: str, count: int) -> dict[str, float]:
    """One method in this process: its seconds and its MiB."""
    tx = METHODS[name]()
    params: Any = {f"layer{i}": {"kernel": jnp.ones((16, 8))} for i in range(count)}
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if what == "init":
        jax.block_until_ready(tx.init(params))
    else:
        state = jax.eval_shape(tx.init, params)
        start = time.process_time()
        jax.jit(tx.update).lower(params, state, params).compile()
    seconds = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    return {"seconds": seconds, "mib": grown / 1024}


def alone(what: str, name: str, count: int) -> dict[str, float]:
    """``measured`` in a process of its own."""
    code = (
        "import json; from benchmarks import many_leaves; "
        f"print(json.dumps(many_leaves.measured({what!r}, {name!r}, {count})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures in turn, writes rows, prints them."""
    options = timing.arguments(__doc__, __file__)
    table = []
    for what, count in LEAVES.items():
        count = count // 100 if options.quick else count
        found = {name: alone(what, name, count) for name in METHODS}
        over = found["ours"]["seconds"] / found["AdamW"]["seconds"]
        table.append({"what": what, "leaves": count, "over_adamw": over} | found)
        print(table[-1], flush=True)
    if options.out is not None:
        path = options.out / "many_leaves.json"
        rows.save(path, "python -m benchmarks.speed.many_leaves", table)


if __name__ == "__main__":
    main()
