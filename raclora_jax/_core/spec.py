"""What users say about a run: ``Rule`` and ``Spec``, plain validated data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast, get_args

import jax

from raclora_jax._core import checks, paths
from raclora_jax._core.select import PICKING_LAWS
from raclora_jax._core.types import (
    Alpha,
    Mode,
    Rest,
    Rounding,
    Side,
    SideOrChance,
    Sketch,
)

MODES: tuple[str, ...] = get_args(Mode)
SIDES: tuple[str, ...] = get_args(Side)
SKETCHES: tuple[str, ...] = get_args(Sketch)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
RESTS: tuple[str, ...] = get_args(Rest)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the leaves whose whole path matches a regular expression are trained.

    What is left ``None`` is taken from the ``Spec``. A view is named by axes: ``rows``
    are those the model contracts over, ``batch`` those that stack independent
    matrices (layers, experts); the remaining axes are the columns.

    Args:
      path: Regular expression; it must match the whole canonical path.
      mode: ``"lowrank"``; ``"full"`` for a matrix whose rows all move in every step, by
        the rule for factors and of rank ``dim``; ``"dense"`` for a leaf trained in full
        as biases are; or ``"frozen"``.
      rank: Rank of the sketch.
      alpha: Numerator of the scaling ``alpha / rank``, or ``"dim"``.
      side: ``"left"`` sketches the rows, ``"right"`` the columns; ``"auto"``,
        ``"smaller"`` and a number as in ``Spec``.
      sketch: Distribution of the sketch.
      rows: Axes of the rows, an int or a tuple of ints.
      batch: Axes of the stack, an int or a tuple of ints.

    Raises:
      ValueError: If a value is unknown or out of range.
      TypeError: If a value has the wrong type.

    Example:
      >>> Rule("attention/(query|key|value)/kernel", rows=0).rows
      (0,)
    """

    path: str
    _: dataclasses.KW_ONLY
    mode: Mode = "lowrank"
    rank: int | None = None
    alpha: Alpha = None
    side: SideOrChance | None = None
    sketch: Sketch | None = None
    rows: int | tuple[int, ...] | None = None
    batch: int | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"Rule({self.path!r})"
        if not isinstance(self.path, str):
            raise TypeError(f"{where}: path must be a str, got {checks.kind(self.path)}")
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"{where}: path is not a regular expression ({error}); escape literal "
                "characters with re.escape"
            ) from error
        checks.choice(f"{where}: mode", self.mode, MODES)
        if self.rank is not None:
            object.__setattr__(self, "rank", _check_rank(where, self.rank))
        object.__setattr__(self, "alpha", _check_alpha(where, self.alpha))
        if self.side is not None:
            object.__setattr__(self, "side", _check_side(where, self.side))
            if isinstance(self.side, float) and self.mode != "lowrank":
                raise ValueError(
                    f"{where}: side={self.side} draws the side of a sketch, but "
                    f"mode={self.mode!r} has none; leave out one of the two"
                )
        if self.sketch is not None:
            checks.choice(f"{where}: sketch", self.sketch, SKETCHES)
        if self.mode == "full":
            self._check_full(where)
        if self.rows is not None:
            object.__setattr__(self, "rows", _axes_tuple(where, "rows", self.rows))
        object.__setattr__(self, "batch", _axes_tuple(where, "batch", self.batch))

    def _check_full(self, where: str) -> None:
        for name in ("rank", "alpha", "sketch"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{where}: {name}={getattr(self, name)!r} is about a sketch, and "
                    "mode='full' moves all rows at once; leave out one of the two"
                )

    @property
    def has_view(self) -> bool:
        """Whether the rule says how to read a leaf as matrices."""
        return self.rows is not None or self.batch != ()


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a RAC-LoRA run: frozen, hashable, plain data.

    Every floating leaf with two axes is adapted unless the first rule that matches its
    path says otherwise; a leaf with more axes needs a rule that names its view; leaves
    that are no matrix (biases, norms) or too small for the rank are the ``rest``.

    Args:
      rank: Rank of every sketch, unless a rule says otherwise.
      alpha: Numerator of the scaling ``alpha / rank``; ``None`` means scaling 1, and
        ``"dim"`` a scaling of ``sqrt(dim / rank)`` for each leaf, with ``dim`` the size
        of its sketched side. Then a rule that forgets the size of its gradient
        (``orthogonal``, Adam, sign) takes full fine-tuning's learning rate at every
        rank. One that does not, such as ``optax.identity()``, steps by
        ``gamma = learning_rate * dim / rank``, which must stay below ``1 / L``.
      side: ``"left"`` sketches the rows, ``"right"`` the columns. ``"smaller"``
        sketches the smaller of both, ties to the rows, for the largest lambda.
        ``"auto"`` sketches the rows, which takes least time and memory, unless they are
        more than 16 times the columns, and then the columns, lest lambda be so much
        smaller. A number p draws it anew for each link, left with probability p and else
        right: Bernoulli-LoRA. The mean projector is then
        ``p rank / rows + (1 - p) rank / cols``; both factors and the state of both are
        held, and one is used.
      sketch: Its law: ``"orthonormal"`` (a whitened Gaussian), ``"rademacher"``
        (whitened signs), ``"coordinate"`` (random rows), ``"block"`` (neighbouring rows,
        each once a cycle of ``dim / rank`` links: slices where others need products), or
        ``"gaussian_raw"`` (N(0, 1), not a projector).
      resample_every: Steps a sketch lives, one link of the chain.
      rounding: How weights below float32 take a small step: ``"auto"`` and
        ``"stochastic"`` draw one of the two neighbours, ``"nearest"`` rounds,
        ``"master"`` keeps a float32 copy in the state.
      cache: Whether the state keeps the sketches of the running link. Without, they
        are drawn in every step and the state holds a seed only.
      rules: ``Rule``s; the first whose expression matches the whole path wins.
      rest: ``"dense"`` trains the leaves that are not adapted in full, ``"frozen"``
        leaves them as they are.

    Raises:
      ValueError: If a value is unknown or out of range.
      TypeError: If a value has the wrong type.

    Example:
      >>> spec = Spec(rank=8, rules=[Rule("head/.*", mode="dense")])
      >>> Spec.from_json(spec.to_json()) == spec
      True
    """

    rank: int
    _: dataclasses.KW_ONLY
    alpha: Alpha = None
    side: SideOrChance = "auto"
    sketch: Sketch = "orthonormal"
    resample_every: int = 100
    rounding: Rounding = "auto"
    cache: bool = True
    rules: Iterable[Rule] = ()
    rest: Rest = "dense"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _check_rank("Spec", self.rank))
        object.__setattr__(self, "alpha", _check_alpha("Spec", self.alpha))
        object.__setattr__(self, "side", _check_side("Spec", self.side))
        checks.choice("Spec: sketch", self.sketch, SKETCHES)
        every = checks.count(
            "Spec: resample_every",
            self.resample_every,
            most=2**31 - 1,
            way_out="write an int, such as resample_every=100; 2**31 - 1, as far as "
            "steps are counted, never ends a link",
        )
        object.__setattr__(self, "resample_every", every)
        checks.choice("Spec: rounding", self.rounding, ROUNDINGS)
        checks.flag("Spec: cache", self.cache)
        checks.choice("Spec: rest", self.rest, RESTS)
        if isinstance(self.rules, Rule) or not isinstance(self.rules, Iterable):
            raise TypeError(
                f"Spec: rules must be a sequence of Rule, got {checks.kind(self.rules)}; "
                "write rules=[Rule(...)]"
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"Spec: rules must hold Rule, got {checks.kind(rule)}")

    def to_json(self) -> str:
        """The spec as JSON text, to be kept beside a checkpoint.

        Returns:
          Text that ``Spec.from_json`` reads back to an equal spec.
        """
        fields = dataclasses.asdict(self)
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Reads what ``to_json`` wrote.

        Args:
          text: JSON text.

        Returns:
          The spec.

        Raises:
          ValueError: If the text is not JSON or a value is out of range.
          TypeError: If a field is missing or unknown.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError(f"a spec in JSON is an object, got {text[:40]!r}")
        rules = [Rule(**_tuples(rule)) for rule in fields.pop("rules", ())]
        return cls(**fields, rules=rules)

    def check_resumes(self, saved: Spec) -> None:
        """Refuses to go on with a chain that this spec cannot continue.

        ``resample_every``, ``sketch``, ``alpha`` and ``cache`` may differ. The running
        link then goes on with the sketches the state keeps and ends by the new length,
        and the next sketch is of the new law; where none are kept, a new link
        begins at once. ``alpha`` acts from the first step. An adapter's factors have
        their meaning by ``alpha`` and ``sketch``: change these at the end of its link.
        ``"block"`` and ``"coordinate"`` keep numbers of rows where the others keep
        arrays, so there is no change to or from them.

        Args:
          saved: The spec kept beside the checkpoint.

        Raises:
          ValueError: If rank, side, views, rounding or what is trained differ.
        """

        def fixed(spec: Spec) -> dict[str, Any]:
            rules = [
                dataclasses.replace(
                    rule, alpha=None, sketch=_form(rule.sketch or spec.sketch)
                )
                for rule in spec.rules
            ]
            names = ("rank", "side", "rounding", "rest")
            own = {name: getattr(spec, name) for name in names}
            return own | {"sketch": _form(spec.sketch), "rules": rules}

        own, its = fixed(self), fixed(saved)
        for name in own:
            mine, theirs = own[name], its[name]
            if mine != theirs:
                raise ValueError(
                    f"this spec has {name}={mine!r}, the checkpoint was written "
                    f"with {name}={theirs!r}: the chain would not go on where it "
                    "stopped; resume with the saved spec, or start a new state with "
                    "tx.init"
                )


def _form(law: Sketch) -> Sketch:
    """A law whose sketches are kept in the same form."""
    return law if law in PICKING_LAWS else "orthonormal"


def as_spec(spec: Spec | int) -> Spec:
    """The spec itself, or ``Spec(rank)`` for an int.

    Args:
      spec: A ``Spec`` or a rank.

    Returns:
      A ``Spec``.

    Raises:
      TypeError: If it is neither.

    Example:
      >>> as_spec(8).rank
      8
    """
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, jax.core.Tracer):
        raise TypeError(
            "spec must be static, got a traced value; under optax.inject_hyperparams "
            'pass a Spec, or static_args=("spec",)'
        )
    rank = checks.as_int(spec)
    if rank is None:
        raise TypeError(
            f"spec must be a Spec or an int rank, got {checks.kind(spec)}; write "
            "Spec(rank=8)"
        )
    return Spec(rank)


def winner(spec: Spec, path: str) -> Rule | None:
    """The rule that decides about a path: the first that matches the whole of it."""
    matching = (rule for rule in spec.rules if re.fullmatch(rule.path, path))
    return next(matching, None)


def check_rules_win(spec: Spec, names: Sequence[str]) -> None:
    """Refuses a rule that decides about none of the paths."""
    won = {id(winner(spec, path)) for path in names}
    for rule in spec.rules:
        # A rule for all that is left may find nothing left.
        if id(rule) not in won and rule.path != ".*":
            shown = ", ".join(map(paths.show, names[:8]))
            raise ValueError(
                f"Rule({rule.path!r}) wins no leaf; the expression must match the whole "
                f"path and an earlier rule must not match first. The paths are {shown}"
                f"{', ...' if len(names) > 8 else ''}"
            )


def check_side_is_fixed(spec: Spec, why: str) -> None:
    """Refuses a spec that draws the side of a sketch.

    Args:
      spec: The spec.
      why: What has no place for a side that changes.

    Raises:
      ValueError: If the side is drawn, in the spec or in a rule.
    """
    rules = ((f"Rule({rule.path!r})", rule.side) for rule in spec.rules)
    for where, side in (("Spec", spec.side), *rules):
        if isinstance(side, float):
            raise ValueError(
                f"{where}: side={side} draws the side for each link, but {why}; give "
                "side='left', 'right' or 'auto'"
            )


def _check_rank(where: str, rank: object) -> int:
    way_out = "it fixes shapes: write a static int, such as rank=8"
    return checks.count(f"{where}: rank", rank, way_out=way_out)


def _check_alpha(where: str, alpha: object) -> Alpha:
    if alpha is None or alpha == "dim":
        return alpha
    return checks.number(
        f"{where}: alpha",
        alpha,
        checks.POSITIVE,
        expected="a number, 'dim' or None",
        way_out="'dim' is for a scaling of sqrt(dim / rank), None for scaling 1",
    )


def _check_side(where: str, side: object) -> SideOrChance:
    """A side by its name, or the chance of the left one; a certain one has its name."""
    name = f"{where}: side"
    if isinstance(side, str):
        checks.choice(name, side, SIDES)
        return cast(Side, side)
    chance = checks.number(
        name,
        side,
        checks.PROBABILITY,
        expected=f"one of {', '.join(map(repr, SIDES))}, or a number",
        way_out="a number, such as side=0.5, is the probability of the left one",
    )
    if chance in (0, 1):
        return "left" if chance else "right"
    return chance


def _axes_tuple(where: str, name: str, axes: object) -> tuple[int, ...]:
    parts = axes if isinstance(axes, (tuple, list)) else (axes,)
    found = [checks.as_int(axis) for axis in parts]
    if None in found:
        raise TypeError(
            f"{where}: {name} must be an int or a tuple of ints, got {checks.kind(axes)}"
        )
    return tuple(axis for axis in found if axis is not None)


def _tuples(rule: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in rule.items()}
