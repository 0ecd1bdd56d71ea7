"""The same links without Flower: who took part comes from the log, the rest anew."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np

from fedrac import task
from fedrac.history import steps_of
from raclora_jax import federated as fed

Log = list[dict[str, Any]]


def read(folder: pathlib.Path, seed: int, pixels: int) -> tuple[Log, list[fed.State]]:
    """The log of a run, and the states its factors lead to.

    Raises:
      ValueError: If the weights after a link are not those that the log names.
    """
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = task.start(seed, pixels)
    state = fed.init(task.STRATEGY, weights, key=seed)
    stamp = fed.stamp_of(task.STRATEGY, weights)
    with np.load(folder / "steps.npz") as file:
        steps = steps_of(dict(file), 0, len(log), stamp)
    states = []
    for step, line in zip(steps, log, strict=True):
        state = fed.replay(task.STRATEGY, state, [step])
        if task.digest(state) != line["model"]:
            raise ValueError(
                f"link {line['link']}: the factors lead to the weights "
                f"{task.digest(state)}, the log says {line['model']}"
            )
        states.append(state)
    return log, states


def simulate(
    parts: list[task.Data], seed: int, accepted: list[list[int]]
) -> list[fed.State]:
    """The states after each link, given the clients that were in its mean."""
    weights = task.start(seed, parts[0].images.shape[1])
    state, states = fed.init(task.STRATEGY, weights, key=seed), []
    for clients in accepted:
        messages = [task.train(state, parts[client], client) for client in clients]
        step, _ = fed.aggregate(task.STRATEGY, state, messages)
        state, _, _ = fed.server_step(task.STRATEGY, state, step)
        states.append(state)
    return states


def difference(one: fed.State, other: fed.State) -> float:
    """The largest difference between two sets of global weights."""
    pair = (fed.params_of(task.STRATEGY, state) for state in (one, other))
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), *pair)
    return float(max(jax.tree.leaves(gaps)))
