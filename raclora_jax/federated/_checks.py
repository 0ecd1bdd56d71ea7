"""What a message and a step must look like to be used."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan, plan_tree
from raclora_jax.federated._messages import Arrays, Drop, Message, State, Step, Trained
from raclora_jax.federated._state import stamp_of, start_of
from raclora_jax.federated._strategies import Strategy


class Expected:
    """What a message of this round must look like."""

    def __init__(self, strategy: Strategy, state: State) -> None:
        self.strategy, self.round = strategy, int(state.round)
        self.stamp = stamp_of(strategy, state.base_params)
        self.plans = plan_tree(strategy.spec, state.base_params)
        self.start = start_of(strategy, state)

    def refuses(self, message: Any, kept: dict[int, Message]) -> Drop | None:
        """Why a message is not used, if it is not."""
        if message is None:
            return Drop(None, "nothing", "a client sent nothing")
        if not isinstance(message, Message):
            line = f"a client sent a {type(message).__name__}, no Message"
            return Drop(None, "nothing", line)
        client = _number(message.client)
        if client is None or not client.is_integer():
            line = f"a message names {message.client!r} as its client, no number"
            return Drop(None, "nothing", line)
        return self._refuses(message, int(client), kept)

    def _refuses(
        self, message: Message, client: int, kept: dict[int, Message]
    ) -> Drop | None:
        def drop(reason: str, line: str) -> Drop:
            return Drop(client, reason, f"client {client} {line}")

        if message.stamp != self.stamp:
            return drop("stamp", f"has stamp {message.stamp}, this run {self.stamp}")
        if _number(message.round) != self.round:
            line = f"answers round {message.round}, this is round {self.round}"
            return drop("round", line)
        if client in kept:
            return drop("twice", "sent a second message in this round")
        wrong = self._wrong_shape(message.trained)
        if wrong:
            return drop("shape", wrong)
        count = _number(message.count)
        if count is None or not (np.isfinite(count) and count >= 0):
            return drop("weight", f"has weight {message.count}; it must be 0 or more")
        for path, array in self._leaves(message.trained):
            if not np.isfinite(np.asarray(array)).all():
                return drop("not finite", f"sent NaN or infinity in {paths.show(path)}")
        return None

    def padded(self, message: Message) -> Message:
        """The message in the spec's rank, zeros in the components it has not."""

        def pad(arrays: Arrays, shapes: Arrays) -> Arrays:
            return {
                path: np.pad(
                    np.asarray(arrays[path]),
                    [
                        (0, whole - own)
                        for own, whole in zip(
                            np.shape(arrays[path]), shape.shape, strict=True
                        )
                    ],
                )
                for path, shape in shapes.items()
            }

        trained = Trained(*map(pad, message.trained, self.start))
        return Message(
            trained, message.client, message.round, message.count, message.stamp
        )

    def _wrong_shape(self, trained: Any) -> str:
        if not (
            isinstance(trained, Trained)
            and all(isinstance(arrays, dict) for arrays in trained)
        ):
            return "sent no Trained with two dicts of arrays"
        for own, whole in zip(trained, self.start, strict=True):
            if set(own) != set(whole):
                odd = sorted(set(own) ^ set(whole))[0]
                return f"{'lacks' if odd in whole else 'has no place for'} {odd!r}"
        for own, whole in zip(trained, self.start, strict=True):
            for path, array in own.items():
                if not jnp.issubdtype(np.asarray(array).dtype, jnp.floating):
                    return f"sent {path!r} of dtype {np.asarray(array).dtype}, no float"
                shape, plan = np.shape(array), self.plans[path]
                if not self._fits(shape, np.shape(whole[path]), plan):
                    expected = np.shape(whole[path])
                    return f"sent {path!r} of shape {shape}, expected {expected}"
        return ""

    def _fits(
        self, shape: tuple[int, ...], whole: tuple[int, ...], plan: LeafPlan
    ) -> bool:
        if shape == whole or not (self.strategy.any_rank and plan.adapted):
            return shape == whole
        axis = len(plan.batch)
        return (
            len(shape) == len(whole)
            and 1 <= shape[axis] <= whole[axis]
            and shape[:axis] + shape[axis + 1 :] == whole[:axis] + whole[axis + 1 :]
        )

    def _leaves(self, trained: Trained) -> list[tuple[str, Any]]:
        return [*trained.factors.items(), *trained.sketches.items()]


def _number(value: Any) -> float | None:
    """A scalar of a message, if it is one."""
    array = np.asarray(value)
    known = array.ndim == 0 and np.issubdtype(array.dtype, np.number)
    return float(array) if known else None


def check_step(step: Step, state: State, stamp: str) -> None:
    """Refuses a step that does not follow on a state."""
    if step.stamp != stamp:
        raise ValueError(
            f"this step has stamp {step.stamp}, this run {stamp}: strategy, spec or "
            "weights differ; start from the state and the strategy of the run"
        )
    traced = [isinstance(r, jax.core.Tracer) for r in (step.round, state.round)]
    if not any(traced) and int(step.round) != int(state.round):
        raise ValueError(
            f"this step ends round {int(step.round)}, the state stands at round "
            f"{int(state.round)}; replay every step in between, in order"
        )
