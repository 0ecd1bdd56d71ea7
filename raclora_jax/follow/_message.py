"""The wire format: what is said of each leaf, and of which weights."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from raclora_jax._core import paths, record
from raclora_jax._core.stamp import Stamp
from raclora_jax.follow._position import Position

_FORMAT = "raclora_jax message 1"
_NONE = np.zeros(0, np.float32)


class Part(NamedTuple):
    """What a message says of one leaf.

    Attributes:
      kind: ``"factor"``: scaled numbers that are lifted on the sketch and added;
        ``"still"``: the same for a leaf that does not move, with no number, since its
        sketch is drawn with the others; ``"rows"``: new values of the rows that the
        sketch picks; ``"added"``: an update of the leaf's shape; ``"whole"``: new values
        of the leaf; ``"trained"``: what the leaf trains in the adapter form, which is
        zero where a message does not say.
      dtype: Dtype of the weight.
      numbers: The array, empty of a leaf that is still.
      scales: Where the numbers are of 8 bits, what one of each row is worth.
      stamp: The facts of the plan, of a leaf that has a sketch.
      sketch: Digest of the sketch as the trainer drew it.
      decay: The share of the weight that is taken off.
      key: The two words of the key for rounding; ``None`` where nothing is rounded.
    """

    kind: str
    dtype: str
    numbers: np.ndarray = _NONE
    scales: np.ndarray | None = None
    stamp: Stamp | None = None
    sketch: int | None = None
    decay: float = 0.0
    key: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """One step of a run.

    Args:
      run: As in ``Position``, like the next two: where the weights stand before it.
      step: How many messages were before it.
      last: The checksum of the one before.
      link: The link whose sketches it is about.
      parts: ``{path: part}`` of the leaves that change.
      weights: Digests of all leaves, or ``None`` where the message has none.
      before: Whether those are of the weights before it, or after it.
      adapter: Whether it is of a run in the adapter form.
      spec: The spec of that, by which the link before is ended; a message that begins a
        link has one.
    """

    run: str
    step: int
    last: str
    link: int
    parts: dict[str, Part]
    weights: dict[str, int] | None
    before: bool
    adapter: bool = False
    spec: str | None = None

    def to_bytes(self) -> bytes:
        """The message as a record, see ``_core.record``."""
        stamps = list(dict.fromkeys(p.stamp for p in self.parts.values() if p.stamp))
        tensors: dict[str, np.ndarray] = {}
        leaves: dict[str, dict[str, Any]] = {}
        for path, part in self.parts.items():
            if part.kind != "still":
                tensors[f"numbers:{path}"] = part.numbers
            if part.scales is not None:
                tensors[f"scales:{path}"] = part.scales
            said = {k: v for k, v in part._asdict().items() if v is not None}
            del said["numbers"]
            said.pop("scales", None)
            if part.stamp is not None:
                said["stamp"] = stamps.index(part.stamp)
            leaves[path] = said
        head = {
            "format": _FORMAT,
            **{field: getattr(self, field) for field in _FIELDS},
            "plans": stamps,
            "leaves": leaves,
        }
        return record.to_bytes(head, tensors)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Message:
        """Reads what ``to_bytes`` wrote.

        Raises:
          TypeError: If it is not bytes.
          ValueError: If it is anything else.
        """
        return record.from_bytes(raw, _FORMAT, cls._read)

    @classmethod
    def _read(cls, head: dict[str, Any], tensors: dict[str, np.ndarray]) -> Message:
        stamps = [
            Stamp._make(tuple(v) if isinstance(v, list) else v for v in stamp)
            for stamp in head["plans"]
        ]

        def part(path: str, said: dict[str, Any]) -> Part:
            own: dict[str, Any] = {
                "numbers": _NONE
                if said["kind"] == "still"
                else tensors[f"numbers:{path}"],
                "scales": tensors.get(f"scales:{path}"),
            }
            if "stamp" in said:
                own["stamp"] = stamps[said["stamp"]]
            if "key" in said:
                own["key"] = tuple(said["key"])
            return Part(**(said | own))

        return cls(
            **{field: head[field] for field in _FIELDS},
            parts={path: part(path, said) for path, said in head["leaves"].items()},
        )


_FIELDS = ("run", "step", "last", "link", "weights", "before", "adapter", "spec")


def check_next(message: Message, position: Position, raw: bytes) -> None:
    """Refuses a message that is not the one after those taken in.

    Raises:
      ValueError: Which says what it is instead.
    """
    if message.run != position.run:
        parts = {"weights": slice(16), "key": slice(16, None)}
        others = [n for n, at in parts.items() if message.run[at] != position.run[at]]
        raise ValueError(
            f"this message is of another run: expected run {position.run}, got "
            f"{message.run}, which began with other {' and '.join(others)}; "
            "hand over messages of one run, and start with its base and key"
        )
    step = position.step
    if message.step < step:
        again = message.step == step - 1 and record.checksum(raw) == position.last
        said = "repeated" if again else "an earlier one, or repeated"
        raise ValueError(
            f"this message is {said}: expected step {step}, got step {message.step}; "
            "drop it if it was taken in before, or go back to weights from before it"
        )
    if message.step > step:
        missed = message.step - step
        raise ValueError(
            f"{missed} message{'s' * (missed > 1)} missed: expected step {step}, got "
            f"step {message.step}; apply those before it first, as Log.replay does, or "
            "take the trainer's weights and join"
        )
    if message.last != position.last:
        raise ValueError(
            f"this message of step {step} is of another history: expected one after "
            f"{position.last[:12] or 'the start'}, got one after "
            f"{message.last[:12] or 'the start'}; the trainer was set back and went on "
            "otherwise: take its weights and join"
        )


def check_weights(found: dict[str, int], message: Message) -> None:
    """Refuses weights that are not those the message tells of.

    Raises:
      ValueError: With the first leaf that differs.
    """
    told = message.weights or {}
    when = "before" if message.before else "after"
    for path in [*told, *found]:
        if told.get(path) != found.get(path):
            raise ValueError(
                f"leaf {paths.show(path)}: expected weights of digest {told.get(path)} "
                f"{when} step {message.step}, got {found.get(path)}; these are not the "
                "trainer's: take its weights and join"
            )
