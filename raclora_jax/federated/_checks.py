"""What a message and a step must look like to be used."""

from __future__ import annotations

import reprlib
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax.federated._messages import (
    LARGEST_COUNT,
    Arrays,
    Drop,
    Message,
    State,
    Step,
    Trained,
)
from raclora_jax.federated._state import stamp_of, start_of
from raclora_jax.federated._strategies import Strategy


class _UnusableError(Exception):
    """Why a message is not used: the reason and the line of its ``Drop``."""


class Expected:
    """What a message of this round must look like."""

    def __init__(self, strategy: Strategy, state: State) -> None:
        self.strategy, self.round = strategy, int(state.round)
        self.stamp = stamp_of(strategy, state.base_params)
        self.plans = plan_tree(strategy.spec, state.base_params)
        self.start = start_of(strategy, state)

    def read(self, message: Any, known: Container[int]) -> Message | Drop:
        """The message as the server uses it, or why it is not used.

        Its arrays come in the dtypes and ranks of the run, zeros in the components it has
        not; its numbers are Python's.
        """
        if message is None:
            return Drop(None, "nothing", "a client sent nothing")
        if not isinstance(message, Message):
            line = f"a client sent a {type(message).__name__}, no Message"
            return Drop(None, "nothing", line)
        client = _whole(message.client)
        if client is None:
            line = f"a message names {_shown(message.client)} as its client, no number"
            return Drop(None, "nothing", line)
        try:
            return self._read(message, client, known)
        except _UnusableError as error:
            reason, line = error.args
            return Drop(client, reason, f"client {client} {line}")

    def _read(self, message: Message, client: int, known: Container[int]) -> Message:
        # Before the shapes: a message of another run is told so, and not of its shapes.
        if not isinstance(message.stamp, str) or message.stamp != self.stamp:
            line = f"has stamp {_shown(message.stamp)}, this run {self.stamp!r}"
            raise _UnusableError("stamp", line)
        if _whole(message.round) != self.round:
            line = f"answers round {_shown(message.round)}, this is round {self.round}"
            raise _UnusableError("round", line)
        # Known are messages that were kept: a client whose message was dropped may send
        # another in the same round.
        if client in known:
            raise _UnusableError("twice", "sent a second message in this round")
        wrong = misfit(message.trained, self.start, self.plans, self.strategy.any_rank)
        if wrong:
            raise _UnusableError("shape", f"sent {wrong}")
        count = _number(message.count)
        if count is None or not 0 <= count <= LARGEST_COUNT:
            line = f"has weight {_shown(message.count)}; it must be a number from 0 to "
            raise _UnusableError("weight", f"{line}{LARGEST_COUNT}")
        trained = Trained(*map(_cast, message.trained, self.start))
        return Message(trained, client, self.round, count, self.stamp)


def _cast(own: Arrays, start: Arrays) -> Arrays:
    """Arrays in the dtypes and shapes of the run, if they are finite there."""
    cast = {}
    for path, whole in start.items():
        # What does not fit is refused in the next line.
        with np.errstate(over="ignore", invalid="ignore"):
            array = np.asarray(own[path]).astype(whole.dtype)
        if not np.isfinite(array).all():
            line = f"sent NaN or infinity in {paths.show(path)}, as {whole.dtype}"
            raise _UnusableError("not finite", line)
        sides = zip(array.shape, whole.shape, strict=True)
        cast[path] = np.pad(array, [(0, full - size) for size, full in sides])
    return cast


def misfit(
    trained: Any, start: Trained, plans: dict[str, LeafPlan], any_rank: bool = False
) -> str:
    """What is wrong with the form of what was trained, in words; nothing if it fits."""
    if not (
        isinstance(trained, Trained)
        and all(isinstance(arrays, dict) for arrays in trained)
    ):
        return "no Trained with two dicts of arrays"
    for own, whole in zip(trained, start, strict=True):
        odd = sorted(set(own) ^ set(whole), key=_shown)
        if odd:
            if odd[0] in whole:
                return f"nothing for {_shown(odd[0])}, which is trained"
            return f"something for {_shown(odd[0])}, which is not trained"
    for own, whole in zip(trained, start, strict=True):
        for path, given in own.items():
            expected = whole[path].shape
            array = _array(given)
            if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
                what = "no array" if array is None else f"of dtype {array.dtype}"
                return f"{paths.show(path)} {what}, expected floats of shape {expected}"
            narrow = any_rank and plans[path].adapted
            axis = len(plans[path].batch) if narrow else None
            if not _fits(array.shape, expected, axis):
                line = f"{paths.show(path)} of shape {_shown(array.shape)}"
                return f"{line}, expected {expected}"
    for path, sketch in trained.sketches.items():
        axis = len(plans[path].batch)
        ranks = [np.shape(a)[axis] for a in (trained.factors[path], sketch)]
        if ranks[0] != ranks[1]:
            return f"{paths.show(path)} as a pair of ranks {ranks[0]} and {ranks[1]}"
    return ""


def _fits(shape: tuple[int, ...], whole: tuple[int, ...], axis: int | None) -> bool:
    """Whether a shape is that of the run, or smaller along the axis of the rank."""
    if shape == whole or axis is None or len(shape) != len(whole):
        return shape == whole
    return (
        1 <= shape[axis] <= whole[axis]
        and shape[:axis] + shape[axis + 1 :] == whole[:axis] + whole[axis + 1 :]
    )


def _array(value: Any) -> Any:
    """A leaf as an array, traced ones as they are; ``None`` if it is no array."""
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except Exception:  # whatever a stranger's object raises
        return None


def _number(value: Any) -> float | None:
    """A real scalar of a message, if it is one."""
    array = _array(value)
    kinds = jnp.floating, jnp.integer
    if (
        array is None
        or array.ndim
        or not any(jnp.issubdtype(array.dtype, k) for k in kinds)
    ):
        return None
    return float(array)


def _whole(value: Any) -> int | None:
    """A whole number of a message, if it is one: exact, however large."""
    number = _number(value)
    if number is None or not number.is_integer():
        return None
    return int(np.asarray(value))


def _shown(value: Any) -> str:
    """Something of a stranger, short and in one line."""
    number = _number(value)
    if number is not None:
        return str(int(np.asarray(value)) if number.is_integer() else number)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"an int of {value.bit_length()} bits"  # Python prints no longer ones
    return " ".join(reprlib.repr(value).split())


def check_range(name: str, value: Any, most: int) -> None:
    """Refuses whole numbers that are known and not from 0 to ``most``."""
    if isinstance(value, jax.core.Tracer):
        return
    array = _array(value)
    if array is None or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be whole numbers, got {_shown(value)}")
    known = np.asarray(array)
    if ((known < 0) | (known > most)).any():
        raise ValueError(f"{name} must be from 0 to {most}, got {_shown(value)}")


def check_step(step: Any, strategy: Strategy, state: State) -> None:
    """Refuses a step that does not follow on a state."""
    stamp = stamp_of(strategy, state.base_params)
    if not isinstance(step, Step):
        raise TypeError(
            f"expected a Step, as aggregate and server_step return, got a "
            f"{type(step).__name__}"
        )
    if not isinstance(step.stamp, str) or step.stamp != stamp:
        raise ValueError(
            f"this step has stamp {_shown(step.stamp)}, this run {stamp!r}: strategy, "
            "spec or weights differ; start from the state and the strategy of the run"
        )
    traced = [isinstance(r, jax.core.Tracer) for r in (step.round, state.round)]
    if not any(traced) and _whole(step.round) != int(state.round):
        raise ValueError(
            f"this step ends round {_shown(step.round)}, the state stands at round "
            f"{int(state.round)}; replay every step in between, in order"
        )
    plans = plan_tree(strategy.spec, state.base_params)
    wrong = _odd_residual(step.residual, plans)
    if step.trained is not None:
        wrong = misfit(step.trained, start_of(strategy, state), plans) or wrong
    wrong = wrong or _not_finite(step)
    if wrong:
        raise ValueError(
            f"this step holds {wrong}; the state is as it was: take the step from its "
            "server again, or skip the round with server_step(strategy, state, None)"
        )


def _odd_residual(residual: Any, plans: dict[str, LeafPlan]) -> str:
    """What is wrong with the form of a residual, in words; nothing if it fits."""
    if not isinstance(residual, dict):
        return "a residual that is no dict of arrays"
    for path, delta in residual.items():
        if path not in plans or not plans[path].adapted:
            return f"a residual of {_shown(path)}, which is not adapted"
        plan, parts = plans[path], delta if isinstance(delta, tuple) else (delta,)
        arrays = [_array(part) for part in parts]
        if not all(
            a is not None and jnp.issubdtype(a.dtype, jnp.floating) for a in arrays
        ):
            return f"a residual of {paths.show(path)} that is no array of floats"
        shapes = [array.shape for array in arrays]
        clients = shapes[0][:1]
        pair = [clients + plan.factor_shape, clients + plan.sketch_shape]
        if shapes not in ([plan.shape], pair):
            return f"a residual of {paths.show(path)} of shapes {shapes}"
    return ""


def _not_finite(step: Step) -> str:
    """Where a step that is known is not finite, in words; nothing if it is."""
    for name, leaf in paths.flatten((step.trained, step.residual))[0].items():
        traced = isinstance(leaf, jax.core.Tracer)
        if not traced and not np.isfinite(np.asarray(leaf)).all():
            return f"NaN or infinity in {name!r}"
    return ""
