"""The pieces a method of pairs is put together from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import optax
from jax import Array

from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.types import PyTree

# The arrays that are trained for a leaf, by name.
Pair: TypeAlias = dict[str, Array]


class Joint(NamedTuple):
    """An inner rule that sees both factors of a leaf.

    Attributes:
      init: ``init(plan, pair) -> state``.
      update: ``update(plan, gradients, state, pair) -> (directions, state)``, what the
        learning rate multiplies, for both factors.

    Example:
      >>> import optax
      >>> adam = optax.scale_by_adam()
      >>> def faster_zero(plan, gradients, state, pair):
      ...     directions, state = adam.update(gradients, state)
      ...     return directions | {"zero": 16 * directions["zero"]}, state
      >>> pieces = Pieces(joint=Joint(lambda plan, pair: adam.init(pair), faster_zero))
    """

    init: Callable[[LeafPlan, Pair], PyTree]
    update: Callable[[LeafPlan, Pair, PyTree, Pair], tuple[Pair, PyTree]]


class Subset(NamedTuple):
    """Which adapted leaves are trained; the others rest as they are.

    Attributes:
      size: ``size(leaves) -> int``, how many of so many leaves train at once.
      init: ``init(leaves) -> state`` for so many leaves.
      update: ``update(state, count, gradients, pairs) -> (live, state)`` before each
        step, of ``{path: pair}``; ``live`` is bool, one for each of ``pairs`` in order.

    Example:
      >>> import jax.numpy as jnp
      >>> def in_turn(state, count, gradients, pairs):
      ...     return jnp.arange(len(pairs)) == count % len(pairs), state
      >>> pieces = Pieces(subset=Subset(lambda leaves: 1, lambda leaves: (), in_turn))
    """

    size: Callable[[int], int]
    init: Callable[[int], PyTree]
    update: Callable[
        [PyTree, Array, dict[str, Pair], dict[str, Pair]], tuple[Array, PyTree]
    ]


class Cases(NamedTuple):
    """Which leaves are trained, of a few choices: a step is one branch of them.

    A branch differentiates what it trains and nothing else, so that its backward pass
    ends at the first such leaf. The others rest, leaves trained in full too.

    Attributes:
      live: ``live(paths) -> [set of paths]``, the leaves of each choice.
      choose: ``choose(count, choices) -> index``, the choice of a step.

    Example:
      >>> def one_by_one(paths):
      ...     return [{path} for path in paths]
      >>> pieces = Pieces(cases=Cases(one_by_one, lambda count, choices: count % choices))
    """

    live: Callable[[list[str]], list[set[str]]]
    choose: Callable[[Array, int], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a method of pairs is; the defaults are those of LoRA.

    Each piece is a function of one adapted leaf: its ``LeafPlan``, and its ``pair``, a
    dict of the arrays that are trained for it. ``"drawn"`` is the factor that starts
    random, ``(batch..., rank, *axes of the sketched side)``, and ``"zero"`` the one that
    starts at zero, ``(batch..., rank, *axes of the other side)``; a method adds arrays of
    its own, such as a gate. On paper ``W`` is (out, in), ``A`` the drawn and ``B`` the
    zero factor: with ``side="left"`` on a kernel (in, out) they are ``drawn`` and
    ``zero`` transposed.

    Args:
      inner: Preconditioner without learning rate; Adam by default.
      rules: ``{name: preconditioner}`` for arrays that have one of their own; the leaves
        trained in full are ``"dense"``.
      joint: The rule of both factors, in place of ``inner``.
      train_drawn: Whether the drawn factor is trained too.
      chain: Whether the pair is merged and begun anew every ``spec.resample_every``.
      restart: Whether the moments of the pair start again with it.
      number: ``number(link) -> Array``, which of the key's sketches a link has; by
        default each has its own.
      start: ``start(plan, weight) -> pair``, both factors of a first link as they begin;
        the base is then the weight less their product.
      extra: ``extra(plan, weight, key) -> pair``, what is trained beside the factors.
      beside: ``beside(plan, pair) -> (drawn, factor)``, the two factors of the change as
        the model sees it; the forward pass keeps it beside the weight.
      weight: ``weight(plan, weight, pair) -> Array``, the weight as the model sees it,
        for a form that is no sum of weight and product. It costs a weight's gradient.
      gradient: ``gradient(plan, gradients, pair) -> gradients``, before the rule.
      settle: ``settle(plan, pair) -> pair``, after the step.
      subset: Which leaves are trained, all gradients known.
      cases: Which leaves are trained, before there is a gradient.
      check: ``check(plan)`` of every adapted leaf, before any compute; raises
        ``ValueError`` for a leaf that the method cannot take.

    Example:
      >>> import jax.numpy as jnp
      >>> def clipped(plan, pair):
      ...     return {name: jnp.clip(array, -1, 1) for name, array in pair.items()}
      >>> pieces = Pieces(train_drawn=False, settle=clipped)
    """

    inner: optax.GradientTransformation | None = None
    rules: Mapping[str, optax.GradientTransformation] = dataclasses.field(
        default_factory=dict
    )
    joint: Joint | None = None
    train_drawn: bool = True
    chain: bool = False
    restart: bool = True
    number: Callable[[Array], Array] | None = None
    start: Callable[[LeafPlan, Array], Pair] | None = None
    extra: Callable[[LeafPlan, Array, Array], Pair] | None = None
    beside: Callable[[LeafPlan, Pair], tuple[Array, Array]] | None = None
    weight: Callable[[LeafPlan, Array, Pair], Array] | None = None
    gradient: Callable[[LeafPlan, Pair, Pair], Pair] | None = None
    settle: Callable[[LeafPlan, Pair], Pair] | None = None
    subset: Subset | None = None
    cases: Cases | None = None
    check: Callable[[LeafPlan], None] | None = None
