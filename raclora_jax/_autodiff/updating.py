"""A scan whose backward pass updates the leaves it runs over, one slice at a time.

The reverse scan carries the leaves. In each round it reads one slice of a leaf, forms the
gradient of the factor of that slice, lets the slice move, and writes it back; so the
gradient of no slice lives longer than its round. What comes out in the place of a leaf's
cotangent is the leaf's new value: the leaf must have no other use, or the two would be
added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from raclora_jax._autodiff.attach import varying_as
from raclora_jax._autodiff.rounds import Arrays, Inputs, residuals_of, taken_apart
from raclora_jax._autodiff.uses import Uses
from raclora_jax._autodiff.weight import Weight, leaf_weight
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sides import zero_trained
from raclora_jax._core.types import Drawn, PyTree, TreeDef


class Mover(Protocol):
    """How one slice of a leaf takes its step; static and hashable."""

    @property
    def plan(self) -> LeafPlan:
        """The plan of a slice."""

    @property
    def gradient_dtype(self) -> jnp.dtype:
        """The dtype in which the gradient of its factor is formed."""

    def together(
        self,
        movers: list[Any],
        held: list[PyTree],
        known: list[PyTree],
        gradients: Arrays,
        allowed: Array,
    ) -> list[PyTree]:
        """By what the slices of several leaves move, if allowed."""

    def put(
        self, held: PyTree, moved: PyTree, sketch: Drawn, known: PyTree, index: Array
    ) -> PyTree:
        """What is held of the leaf, with one slice after its step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moving:
    """A stacked leaf that a scan's backward pass updates: the base of its ``Weight``.

    Attributes:
      held: Tree of floating arrays that begin with the scanned axis and whose cotangents
        are their new values.
      weight: The leaf, which is also in ``held``; nothing differentiates it.
      sketch: Its sketches, one for each slice.
      known: What the step of every slice needs besides.
      mover: The step.
    """

    held: PyTree
    weight: Array
    sketch: Drawn
    known: PyTree
    mover: Mover = dataclasses.field(metadata={"static": True})


def is_moving(value: Any) -> bool:
    """Whether a value stands for a leaf that its scan updates."""
    return isinstance(value, Weight) and isinstance(value.base, Moving)


def moving_weight(plan: LeafPlan, moving: Moving, uses: Uses) -> Weight:
    """The weight that stands for such a leaf until its scan reads it."""

    def read(moving: Moving) -> Array:
        raise AssertionError(f"{plan.path} is updated by one scan, and read elsewhere")

    return leaf_weight(moving, plan, uses, read=read)


# One round: ``step(consts, state, slices)`` of trees gives the new state and the outputs.
Step = Callable[[PyTree, Arrays, list[Any]], tuple[Arrays, Arrays]]


def scan(
    step: Step, closed_over: list[Any], state: Arrays, xs: list[Any], **params: Any
) -> tuple[Arrays, Arrays]:
    """``lax.scan`` over arrays and leaves, some of which its backward pass updates.

    Where there are such, the scan leaves a token with the uses of its leaves: an output
    that has to be differentiated too, whose cotangent says whether anything may move.

    Args:
      step: One round.
      closed_over: What every round reads.
      state: The carry.
      xs: What is run over: arrays, stacked weights, and weights that move.
      **params: ``length``, ``reverse`` and ``unroll`` of the scan.

    Returns:
      The carry at the end, and the outputs.
    """
    if any(map(is_moving, xs)):
        return _updating(step, closed_over, state, xs, params)

    def one(state: Arrays, slices: list[Any]) -> tuple[Arrays, Arrays]:
        each = [x.unstacked() if isinstance(x, Weight) else x for x in slices]
        return step(closed_over, state, each)

    end, ys = lax.scan(one, state, xs, **params)
    return end, ys


def _updating(
    step: Step, closed_over: list[Any], state: Arrays, xs: list[Any], params: Any
) -> tuple[Arrays, Arrays]:
    moving: list[Moving] = [x.base for x in xs if is_moving(x)]
    consts, const_tree = jax.tree.flatten(closed_over)
    slices, slice_tree = jax.tree.flatten([x for x in xs if not is_moving(x)])
    uses = next(x.leaf.uses for x in xs if is_moving(x))
    places = [is_moving(x) for x in xs]
    movers = [m.mover for m in moving]
    sketch_tree = jax.tree.structure([m.sketch for m in moving])
    trees = const_tree, slice_tree, sketch_tree
    own = _Scan(step, movers, places, *trees, uses, params)
    updating = jax.custom_vjp(own.run)
    updating.defvjp(own.forward, own.backward, symbolic_zeros=True)
    fixed = [dataclasses.replace(m, held=None) for m in moving]
    end, ys, token = updating([m.held for m in moving], fixed, consts, state, slices)
    uses.tokens.append(token)
    return end, ys


# What a scan runs over: slices, weights that move, and their sketches.
Over = tuple[Arrays, Arrays, Arrays]


@dataclasses.dataclass(frozen=True, eq=False)
class _Scan:
    """A scan with the backward pass that updates leaves; what is static of it.

    Attributes:
      step: One round.
      movers: The steps of the leaves that move.
      places: Which of the things run over are such leaves.
      const_tree: The tree of what every round reads.
      slice_tree: The tree of what is run over besides.
      sketch_tree: The tree of the sketches of the leaves that move.
      uses: Where the uses of leaves are written down.
      params: Parameters of the scan.
    """

    step: Step
    movers: list[Mover]
    places: list[bool]
    const_tree: TreeDef
    slice_tree: TreeDef
    sketch_tree: TreeDef
    uses: Uses
    params: dict[str, Any]

    def round_of(self, inputs: Inputs, factors: Arrays) -> tuple[Arrays, Arrays]:
        """One round, with a factor for each leaf that moves."""
        sketches = self.sketch_tree.unflatten(inputs.sketches)
        moving = zip(self.movers, inputs.weights, sketches, factors, strict=True)
        leaves = iter(
            leaf_weight(weight, mover.plan, self.uses, sketch, factor)
            for mover, weight, sketch, factor in moving
        )
        others = iter(
            x.unstacked() if isinstance(x, Weight) else x
            for x in self.slice_tree.unflatten(inputs.slices)
        )
        consts = self.const_tree.unflatten(inputs.consts)
        each = [next(leaves if moves else others) for moves in self.places]
        return self.step(consts, inputs.state, each)

    def zeros(self, inputs: Inputs) -> Arrays:
        """The factors of a round, which are zero."""
        pairs = zip(self.movers, inputs.weights, strict=True)
        return [
            varying_as(zero_trained(mover.plan).astype(mover.gradient_dtype), w)
            for mover, w in pairs
        ]

    def run(
        self,
        held: list[PyTree],
        fixed: list[Moving],
        consts: Arrays,
        state: Arrays,
        slices: Arrays,
    ) -> tuple[Arrays, Arrays, Array]:
        """The scan, where nothing differentiates it."""
        del held

        def one(state: Arrays, over: Over) -> tuple[Arrays, Arrays]:
            inputs = Inputs(consts, state, *over)
            return self.round_of(inputs, self.zeros(inputs))

        end, ys = lax.scan(one, state, _over(slices, fixed), **self.params)
        return end, ys, jnp.zeros(())

    def forward(self, *primals: PyTree) -> tuple[PyTree, PyTree]:
        """The scan, and what its backward pass needs."""
        # One round is taken apart, not the scan: JAX's own transpose of a scan sums the
        # cotangent of everything it closes over, which the weights of all rounds are.
        given = jax.tree.map(lambda p: p.perturbed, primals, is_leaf=_is_primal)
        values = jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal)
        _, fixed, consts, state, slices = values
        first = jax.tree.map(lambda array: array[0], _over(slices, fixed))
        example = Inputs(consts, state, *first)
        body = taken_apart(self.round_of, self.zeros, example, given)

        def one(state: Arrays, over: Over) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            new, ys, kept = body.forward(Inputs(consts, state, *over))
            return new, (ys, kept)

        end, (ys, kept) = lax.scan(one, state, _over(slices, fixed), **self.params)
        return (end, ys, jnp.zeros(())), (body, *values[:3], slices, kept)

    def backward(self, known: PyTree, cotangents: PyTree) -> PyTree:
        """The reverse scan, in whose carry the leaves move."""
        body, held, fixed, consts, slices, kept = known
        end, ys, allowed = cotangents
        # The outputs that nothing reads have no array to be run over.
        given = {i: ys[i] for i in body.outputs if not isinstance(ys[i], SymbolicZero)}
        blank = {i: ys[i] for i in body.outputs if i not in given}
        allowed, common = _array(allowed) > 0, [m.known for m in fixed]

        def one(carry: PyTree, at: PyTree) -> tuple[PyTree, Arrays]:
            # above: the cotangents of a round's new state, from the round behind it;
            # below: those of the state it began with. sums: of what every round reads.
            # held: the leaves that move, (layers, ...), those behind this one after
            # their step.
            above, sums, held = carry
            index, slices, sketches, kept, ys = at
            now = [_at(tree, index) for tree in held]
            # No state: what needs it is kept.
            inputs = Inputs(consts, [], slices, [n.weight for n in now], sketches)
            back = body.back.unflatten(residuals_of(body, inputs, kept))
            beside = [ys[i] if i in ys else _blank(blank[i]) for i in body.outputs]
            below, to_consts, to_slices, gradients = back((above, beside))
            moved = self.movers[0].together(self.movers, now, common, gradients, allowed)
            # The cotangent that goes on was made with the old weights: known first.
            place = _behind(index, self.params["length"], below)
            drawn = self.sketch_tree.unflatten(sketches)
            steps = zip(self.movers, held, moved, drawn, common, strict=True)
            held = [m.put(old, new, s, k, place) for m, old, new, s, k in steps]
            sums = jax.tree.map(jnp.add, sums, to_consts)
            return (below, sums, held), to_slices

        start = (
            [_array(end[i]) for i in body.state],
            [jnp.zeros_like(consts[i]) for i in body.consts],
            held,
        )
        indices = jnp.arange(self.params["length"])
        over = indices, slices, _sketches(fixed), kept, given
        params = self.params | {"reverse": not self.params["reverse"]}
        (first, sums, held), to_slices = lax.scan(one, start, over, **params)
        return (
            held,
            [None for _ in fixed],
            _spread(sums, body.consts, len(consts)),
            _spread(first, body.state, len(end)),
            _spread(to_slices, body.slices, len(slices)),
        )


def _over(slices: Arrays, fixed: list[Moving]) -> Over:
    return slices, [m.weight for m in fixed], _sketches(fixed)


def _sketches(fixed: list[Moving]) -> Arrays:
    """The sketches as flat arrays: one that picks rows is a node with one in it."""
    return jax.tree.leaves([m.sketch for m in fixed])


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _array(cotangent: Any) -> Array:
    """A cotangent as an array."""
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    shape, dtype = _aval(cotangent)
    return jnp.zeros(shape, dtype)


def _blank(cotangent: SymbolicZero) -> Array:
    """Zero for one round of an output that nothing reads."""
    shape, dtype = _aval(cotangent)
    return jnp.zeros(shape[1:], dtype)


def _aval(cotangent: SymbolicZero) -> tuple[tuple[int, ...], jnp.dtype]:
    aval: Any = cotangent.aval
    return aval.shape, aval.dtype


def _spread(found: Arrays, places: list[int], count: int) -> list[Array | None]:
    """One cotangent for each of so many arrays, none for those that have none."""
    by_place = dict(zip(places, found, strict=True))
    return [by_place.get(i) for i in range(count)]


def _at(tree: PyTree, index: Array) -> PyTree:
    """One slice of every array."""
    return jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree
    )


def _behind(index: Array, length: int, done: Arrays) -> Array:
    """The index, known once some arrays are: what is written there is written after them.

    All that reads a slice is to be done before it moves, or a compiler copies the leaf.
    """

    def on_cpu(index: Array, done: Arrays) -> Array:
        # Its compiler drops barriers, and does not know that the index is below the
        # length.
        for array in done:
            index = jnp.minimum(index, length + jnp.all(array == 0))
        return index

    def elsewhere(index: Array, done: Arrays) -> Array:
        behind: Array = lax.optimization_barrier((index, done))[0]
        return behind

    done = [array for array in done if array.size]
    return lax.platform_dependent(index, done, cpu=on_cpu, default=elsewhere)
