"""The value that stands for ``W + lift(F)`` inside a model, and how it is reshaped.

A model may transpose, split and merge the axes of a leaf before it reads it. Only the
base goes through that; sketch and factor stay as they are, and are found by the names of
their axes. Take a leaf of shape (8, 12), its rows sketched at rank 2. Sketch and factor
have the shapes (2, 8) and (2, 12), and the axes ``((), (0,))`` and ``((), (1,))``, where
``()`` is the rank. With ``name:size`` for a part, the axes of the base are ::

    W                       (0,):8 | (1,):12
    W.T                     (1,):12 | (0,):8
    .reshape(3, 4, 8)       (1, 0):3 | (1, 1):4 | (0,):8
    .reshape(12, 8)         (1, 0):3 (1, 1):4 | (0,):8
    broadcast (5, 12, 8)    (-1,):5 | (1, 0):3 (1, 1):4 | (0,):8

The first reshape splits an axis that the factor has: from there on the factor is of shape
(2, 3, 4), its axes ``((), (1, 0), (1, 1))``. The second merges two parts into one axis,
which is no matter of the factor's; and neither it nor the sketch has the axis that the
broadcast adds. A product ``x . W`` over the last axis sums the name ``(0,)``, which ``x``
has last and the sketch second: ``contract`` finds it in both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from raclora_jax._autodiff.attach import Map, attach, named
from raclora_jax._autodiff.axes import Atom, Axis, MeshAxes, Part, resized
from raclora_jax._autodiff.uses import Use, Uses
from raclora_jax._core.contraction import contract
from raclora_jax._core.lowrank import lift_picks
from raclora_jax._core.picks import Picks
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sharding import resharded
from raclora_jax._core.types import RANK, Label, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """What all the values made of one leaf share.

    Attributes:
      path: Canonical path.
      scaling: ``alpha / rank``.
      zero: Whether the factor is zero, so that only its gradient matters.
      uses: Where uses are written down.
      read: Reads the base as an array, where it is kept in another form.
    """

    path: str
    scaling: float
    zero: bool
    uses: Uses
    read: Callable[[PyTree], Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """``base + scaling * S F``, never formed.

    Every axis of the base, the sketch and the factor is named by the atoms of the leaf
    it holds. An atom in both sketch and factor stacks matrices; one in neither was
    added by a broadcast. A weight without a factor only watches what is done with it.

    Args:
      base: The frozen part, an array or what ``leaf.read`` reads as one.
      sketch: Array with one axis per atom of ``sketch_axes``, or the rows that such an
        array would pick, or ``None``.
      factor: Array with one axis per atom of ``factor_axes``, or ``None``.
      axes: The parts of each axis of the base.
      sketch_axes: Atoms of the sketch, ``RANK`` among them.
      factor_axes: Atoms of the factor, ``RANK`` among them.
      leaf: The leaf it comes from.
    """

    base: PyTree
    sketch: Array | Picks | None
    factor: Array | None
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    sketch_axes: tuple[Atom, ...] = dataclasses.field(metadata={"static": True})
    factor_axes: tuple[Atom, ...] = dataclasses.field(metadata={"static": True})
    leaf: Leaf = dataclasses.field(metadata={"static": True})

    @property
    def array(self) -> Array:
        """The base as an array.

        Nothing differentiates it, and no stop_gradient says so: inside ``scan`` one would
        make JAX keep a copy of every layer's weights for the backward pass.
        """
        array: Array = self.base if self.leaf.read is None else self.leaf.read(self.base)
        return array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base, as the model sees it."""
        return tuple(math.prod(part.size for part in axis) for axis in self.axes)

    @property
    def is_broadcast(self) -> bool:
        """Whether it has an axis that the leaf has not."""
        return any(part.atom[0] < 0 for axis in self.axes for part in axis)

    def replace(self, **changes: Any) -> Weight:
        """A copy with other fields; a new base is an array."""
        if "base" in changes and self.leaf.read is not None:
            changes["leaf"] = dataclasses.replace(self.leaf, read=None)
        return dataclasses.replace(self, **changes)

    def on_atom(self, atom: Atom, act: Callable[[Array, int], Array]) -> dict[str, Array]:
        """``act(array, axis)`` for the sketch and the factor, where they have an atom."""
        done: dict[str, Any] = {}
        for name in ("sketch", "factor"):
            axes, value = getattr(self, f"{name}_axes"), getattr(self, name)
            if atom not in axes:
                continue
            if isinstance(value, Picks):
                if atom in self.stack:
                    index = act(value.index, axes.index(atom))
                    done[name] = Picks(index, value.chosen)
                    continue
                value = self.formed().sketch
            done[name] = act(value, axes.index(atom))
        return done

    @property
    def stack(self) -> list[Atom]:
        """The atoms that stack matrices, in the order of the sketch."""
        return [a for a in self.sketch_axes if a in self.factor_axes and a != RANK]

    @property
    def side(self) -> list[Atom]:
        """The atoms of the sketched side, in order."""
        return [a for a in self.sketch_axes if a not in self.factor_axes]

    @property
    def side_sizes(self) -> list[int]:
        """The sizes of the atoms of the sketched side."""
        sizes = {part.atom: part.size for axis in self.axes for part in axis}
        return [sizes.get(atom, 1) for atom in self.side]

    def formed(self) -> Weight:
        """The weight with its sketch as an array."""
        if not isinstance(self.sketch, Picks):
            return self
        assert self.factor is not None
        sketch = self.sketch.formed(self.side_sizes, self.factor.dtype)
        return dataclasses.replace(self, sketch=sketch)

    def saw(
        self,
        contracted: Sequence[Atom],
        batch: Sequence[Atom] = (),
        *,
        is_lookup: bool = False,
    ) -> None:
        """Writes down a use."""
        use = Use(
            frozenset(atom[0] for atom in contracted if atom[0] >= 0),
            frozenset(atom[0] for atom in batch if atom[0] >= 0),
            is_lookup,
        )
        self.leaf.uses.found.setdefault(self.leaf.path, []).append(use)

    def attached(
        self,
        output: Array,
        inputs: PyTree,
        push: Map,
        pull: Map | None = None,
        *,
        keep: Callable[[PyTree], PyTree] = lambda inputs: inputs,
        factor: Array | None = None,
        whole: bool = False,
    ) -> Array:
        """An operation's output, with its dependence on the factor.

        Args:
          output: What the operation gives for the base alone, or for the whole leaf.
          inputs: The operation's other inputs, and the sketch.
          push: ``push(known, F)``, the output's change for a factor, linear in it.
          pull: Its transpose, ``pull(known, cotangent)``; derived if not given.
          keep: ``keep(inputs)`` gives ``known``, what the backward pass has to hold.
          factor: The factor that ``push`` takes, if it is not this weight's own.
          whole: Whether ``output`` has the factor's part in it already.

        Returns:
          An array like ``output``.
        """
        factor = self.factor if factor is None else factor
        assert factor is not None  # a weight that only watches is never attached
        if self.leaf.zero:
            return attach(output, factor, inputs, keep, push, pull, self.leaf.scaling)
        if whole:
            return named(output, factor, inputs, keep, push, self.leaf.scaling)
        # The sum itself, and no derivative put on it: it is right to any order.
        change = resharded(push(keep(inputs), factor), jax.typeof(output))
        return output + (self.leaf.scaling * change).astype(output.dtype)

    def forgetting(self) -> Weight:
        """The weight, whose value no gradient goes back through to the factor."""
        if self.factor is None:
            return self
        return dataclasses.replace(self, factor=lax.stop_gradient(self.factor))

    def value(self) -> Array:
        """The leaf as an array; where the factor is zero, one that forgets it."""
        if self.sketch is None or self.factor is None or self.leaf.zero:
            return self.array
        change = resharded(self._lifted(self.sketch, self.factor), jax.typeof(self.array))
        return self.array + (self.leaf.scaling * change).astype(self.array.dtype)

    def constant(self) -> Array:
        """The leaf as an array that no gradient goes back through.

        Nor through what was added to it, which may depend on other leaves.
        """
        return lax.stop_gradient(self.value())

    def stacked(self) -> Weight | None:
        """The weight made ready for ``scan``: its first axis first in every array.

        Returns:
          The weight, or ``None`` if its first axis does not stack matrices.
        """
        if len(self.axes[0]) != 1:
            return None
        atom = self.axes[0][0].atom
        if self.factor is None:
            return self
        if atom not in self.sketch_axes or atom not in self.factor_axes:
            return None
        turned = self.on_atom(atom, lambda array, axis: jnp.moveaxis(array, axis, 0))
        return self.replace(
            **turned,
            sketch_axes=(atom, *(a for a in self.sketch_axes if a != atom)),
            factor_axes=(atom, *(a for a in self.factor_axes if a != atom)),
        )

    def unstacked(self) -> Weight:
        """One slice of a stacked weight, as the body of ``scan`` gets it."""
        self.saw((), [self.axes[0][0].atom])
        return dataclasses.replace(
            self,
            axes=self.axes[1:],
            sketch_axes=self.sketch_axes[1:],
            factor_axes=self.factor_axes[1:],
        )

    def sharded(self, spec: Sequence[MeshAxes]) -> PyTree | None:
        """The weight with a ``PartitionSpec`` in place of every array.

        Args:
          spec: The mesh axes of the axes of the base.

        Returns:
          A prefix for ``in_specs``, or ``None`` if a merged axis is sharded.
        """
        spec = (*spec, *(None for _ in self.axes[len(spec) :]))
        if any(
            s is not None and len(a) != 1 for s, a in zip(spec, self.axes, strict=True)
        ):
            return None
        by_atom = {a[0].atom: s for a, s in zip(self.axes, spec, strict=True) if a}

        def of(axes: Sequence[Atom]) -> PartitionSpec:
            return PartitionSpec(*(by_atom.get(atom) for atom in axes))

        specs: dict[str, Any] = {
            "base": PartitionSpec(*spec),
            "sketch": None if self.sketch is None else of(self.sketch_axes),
            "factor": None if self.factor is None else of(self.factor_axes),
        }
        return dataclasses.replace(self, **specs)

    def localised(self) -> Weight:
        """A shard with the sizes it has."""
        return dataclasses.replace(self, axes=resized(self.axes, jnp.shape(self.array)))

    def materialise(self, operation: str) -> Array:
        """The leaf as an array whose gradient is formed in full, then projected.

        Args:
          operation: The operation that no rule is known for.

        Returns:
          Array of ``shape``.
        """
        fallbacks = self.leaf.uses.fallbacks
        use = self.leaf.path, operation
        fallbacks[use] = fallbacks.get(use, 0) + 1
        base = self.array
        if self.factor is None:
            return base

        def push(sketch: Array | Picks, factor: Array) -> Array:
            return self._lifted(sketch, factor).astype(base.dtype)

        return self.attached(base, self.sketch, push)

    def _lifted(self, sketch: Array | Picks, factor: Array) -> Array:
        """``S F`` as an array of the shape of the base."""
        parts = [part for axis in self.axes for part in axis]
        own = [p.atom for p in parts if p.atom in (*self.sketch_axes, *self.factor_axes)]
        added = [i for i, part in enumerate(parts) if part.atom not in own]
        sizes = [part.size for part in parts if part.atom in own]
        if isinstance(sketch, Picks):
            change = lift_picks(
                sketch, self.side, self.stack, factor, self.factor_axes, own, sizes
            )
        else:
            change = contract(
                sketch, self.sketch_axes, factor, self.factor_axes, own,
                precision=lax.Precision.HIGHEST,
            )  # fmt: skip
        change = jnp.expand_dims(change, added)
        return jnp.broadcast_to(change, [part.size for part in parts]).reshape(self.shape)


# What an operation of a model may be handed, where no leaf is put beside another.
Operand: TypeAlias = Array | Weight


def array_of(operand: Operand) -> Array:
    """What an operation on the base alone takes for an operand."""
    return operand.array if isinstance(operand, Weight) else operand


def told_apart(left: Operand, right: Operand) -> tuple[Weight, Operand]:
    """The leaf of two operands, the left one of two leaves; and the other operand."""
    if isinstance(left, Weight):
        return left, right
    assert isinstance(right, Weight)
    return right, left


def leaf_weight(
    base: PyTree,
    plan: LeafPlan,
    uses: Uses,
    sketch: Array | Picks | None = None,
    factor: Array | None = None,
    *,
    zero: bool = True,
    read: Callable[[PyTree], Array] | None = None,
) -> Weight:
    """The weight that stands for a leaf, as a model is handed it.

    Args:
      base: The leaf.
      plan: Its plan.
      uses: Where uses are written down.
      sketch: Array of ``plan.sketch_shape``, or picks; ``None`` for a weight that only
        watches.
      factor: Array of ``plan.factor_shape``, likewise.
      zero: Whether the factor is zero.
      read: Reads ``base`` as an array, where it is kept in another form.

    Returns:
      The weight.
    """
    watches = factor is None
    return Weight(
        base=base,
        sketch=sketch,
        factor=factor,
        axes=tuple((Part((i,), size),) for i, size in enumerate(plan.shape)),
        sketch_axes=() if watches else _atoms(plan.sketch_axes),
        factor_axes=() if watches else _atoms(plan.factor_axes),
        leaf=Leaf(plan.path, plan.scaling, zero, uses, read),
    )


def _atoms(labels: Sequence[Label]) -> tuple[Atom, ...]:
    """The labels of a plan, by which a whole axis of the leaf is one atom."""
    return tuple((axis,) if isinstance(axis, int) else RANK for axis in labels)
