"""Rules for the operations that use a leaf up: products, convolutions, lookups.

Each gives the model's own output, and says how it would change with the factor. With
``y = x . W`` and ``W = base + scaling * S F`` the change is ``x . S F``. Where the
sketch meets ``x``, ``x . S`` is all that is kept for the backward pass, ``rank`` numbers
per token; where it meets ``y``, ``x`` is kept and the cotangent goes through ``S`` first.
The gradient of the base, the product of ``x`` and the cotangent, is never asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._autodiff import picked
from raclora_jax._autodiff.axes import Atom, Axis, einsum_parts
from raclora_jax._autodiff.output import Names, Output, atoms_of, own
from raclora_jax._autodiff.stage import Eqn
from raclora_jax._autodiff.weight import Operand, Weight, told_apart
from raclora_jax._core.contraction import contract
from raclora_jax._core.picks import Picks
from raclora_jax._core.sharding import auto_axes, product_sharding
from raclora_jax._core.types import RANK, Label


def dot_general(eqn: Eqn, left: Operand, right: Operand) -> Array | None:
    """A product with leaves on either side or both, any axes summed, free or stacked."""
    if isinstance(left, Weight) and isinstance(right, Weight):
        forgetting = left.forgetting().value(), right.forgetting().value()
        y = eqn.primitive.bind(*forgetting, **eqn.params)
        values = left.value(), right.value()
        y = dotted(eqn, right, values[0], y, first=False, whole=True)
        return dotted(eqn, left, values[1], y, first=True, whole=True)
    first = isinstance(left, Weight)
    weight, x = told_apart(left, right)
    if isinstance(x, Weight) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    operands = (weight.array, x) if first else (x, weight.array)
    y = eqn.primitive.bind(*operands, **eqn.params)
    return dotted(eqn, weight, x, y, first=first)


def dotted(
    eqn: Eqn, weight: Weight, x: Array, y: Array, *, first: bool, whole: bool = False
) -> Array:
    """A product's output, with its dependence on the leaf.

    Args:
      eqn: The equation.
      weight: The leaf.
      x: The other operand.
      y: The output.
      first: Whether the leaf is the left operand.
      whole: Whether ``y`` has the factor's part in it already.
    """
    summed, stacked = eqn.params["dimension_numbers"]
    mine, its = (0, 1) if first else (1, 0)
    shared = dict(
        zip((*summed[its], *stacked[its]), (*summed[mine], *stacked[mine]), strict=True)
    )
    x_axes: list[Axis] = [
        weight.axes[shared[axis]] if axis in shared else own(axis, size)
        for axis, size in enumerate(x.shape)
    ]
    x_free = [a for axis, a in enumerate(x_axes) if axis not in shared]
    w_free = [a for axis, a in enumerate(weight.axes) if axis not in shared.values()]
    free = (*w_free, *x_free) if first else (*x_free, *w_free)
    y_axes = [*(x_axes[axis] for axis in stacked[its]), *free]
    weight.saw(
        atoms_of(weight.axes[axis] for axis in summed[mine]),
        atoms_of(weight.axes[axis] for axis in stacked[mine]),
    )
    return _product(weight, y, y_axes, x, x_axes, eqn.params["precision"], whole)


def _product(
    weight: Weight,
    y: Array,
    y_axes: Sequence[Axis],
    x: Array,
    x_axes: Sequence[Axis],
    precision: lax.PrecisionLike,
    whole: bool,
) -> Array:
    """``y`` attached to the three-operand contraction of x, sketch and factor."""
    if weight.sketch is None or weight.factor is None:
        return y
    out = Output.of(y, y_axes, precision, weight.factor)
    x, x_names = einsum_parts(x, x_axes)
    if isinstance(weight.sketch, Picks):
        needed = {*weight.side, *weight.stack}
        for by_x, names, others in (
            (True, x_names, out.names),
            (False, out.names, x_names),
        ):
            # A side that both have is no sum: its rows meet one by one.
            if needed <= {*names} and not {*weight.side} & {*others}:
                return picked.product(
                    weight, weight.sketch, y, out, x, x_names, by_x, whole
                )
        weight = weight.formed()
    sketch = weight.sketch
    assert isinstance(sketch, Array)
    assert weight.factor is not None
    s_names, f_names = weight.sketch_axes, weight.factor_axes
    sizes: dict[Label, int] = dict(zip(out.names, out.sizes, strict=True))
    for array, names in (
        (x, x_names),
        (sketch, s_names),
        (weight.factor, f_names),
    ):
        sizes |= dict(zip(names, array.shape, strict=True))
    sketch_first, between = _order(weight, x_names, out.names, sizes)
    # x (tokens, in), W (in, out), y (tokens, out). A sketch of the rows, S (r, in), meets
    # x: between is (tokens, r), and F (r, out). One of the columns, S (r, out), meets the
    # cotangent: F is (r, in), and between (tokens, r) comes from x . F or dy . S.
    inputs = x, sketch.astype(x.dtype)

    def sketched(inputs: tuple[Array, Array]) -> Array:
        x, sketch = inputs
        return contract(x, x_names, sketch, s_names, between, precision=out.precision)

    if sketch_first:
        maps = out.by_factor(between, f_names)
        return weight.attached(y, inputs, *maps, keep=sketched, whole=whole)

    def push(known: tuple[Array, Array], factor: Array) -> Array:
        x, sketch = known
        factor = factor.astype(x.dtype)
        middle = contract(x, x_names, factor, f_names, between, precision=out.precision)
        return out.made(middle, between, sketch, s_names)

    def pull(known: tuple[Array, Array], cotangent: Array) -> Array:
        x, sketch = known
        middle = out.met(cotangent, sketch, s_names, between, wide=False)
        return contract(
            x, x_names, middle, between, f_names, dtype=out.wide, precision=out.precision
        )

    return weight.attached(y, inputs, push, pull, whole=whole)


def _order(
    weight: Weight, x_names: Names, y_names: Names, sizes: dict[Label, int]
) -> tuple[bool, list[Label]]:
    """Whether the sketch meets x first, and the axes of what comes out of it.

    By the multiplications of both orders, unless the dearer one spares memory: with the
    sketch first only ``x . S`` is kept for the backward pass, else all of ``x``.
    """
    s_names, f_names = weight.sketch_axes, weight.factor_axes

    def size(*names: Iterable[Label]) -> int:
        return math.prod(sizes[name] for name in {n for group in names for n in group})

    rank_last = [name for name in s_names if name != RANK] + [RANK]

    def middle(start: Iterable[Label], end: Iterable[Label]) -> list[Label]:
        names = dict.fromkeys((*start, *rank_last))
        return [name for name in names if name in f_names or name in end]

    with_x, with_y = middle(x_names, y_names), middle(y_names, x_names)
    x_cost = size(x_names, s_names) + size(with_x, y_names, f_names)
    y_cost = size(y_names, s_names) + size(with_y, x_names, f_names)
    # Where the view is that of the product, the wrong order costs a whole side more. They
    # come near each other only where a view cuts across the product; there half as many
    # multiplications again, of thin matrices, are a fair price for memory held from the
    # forward pass to the backward pass: x . S has a rank where x has a side.
    spares_x = size(with_x) < size(x_names) and x_cost <= 1.5 * y_cost
    sketch_first = x_cost <= y_cost or spares_x
    return sketch_first, with_x if sketch_first else with_y


def conv_general_dilated(eqn: Eqn, x: Operand, weight: Operand) -> Array | None:
    """A convolution whose kernel is the leaf; sketch and factor make thin kernels."""
    params = eqn.params
    if isinstance(x, Weight) or not isinstance(weight, Weight):
        return None
    numbers = params["dimension_numbers"]
    features, place = numbers.rhs_spec[0], numbers.out_spec[1]
    others = [axis for i, axis in enumerate(weight.axes) if i != features]
    if params["feature_group_count"] * params["batch_group_count"] > 1:
        return None
    weight.saw(atoms_of(others))
    y: Array = eqn.primitive.bind(x, weight.array, **params)
    if weight.sketch is None or weight.factor is None:
        return y
    # x (n, h, w, in), W (kh, kw, in, out), y (n, h, w, out). A sketch of the rows,
    # S (r, kh, kw, in), is a kernel of r features; so is a factor F (r, kh, kw, in) of
    # one of the columns, S (r, out).
    y_axes = [own(axis, size) for axis, size in enumerate(y.shape)]
    thin_names = [RANK if i == place else a.atom for i, (a,) in enumerate(y_axes)]
    y_axes[place] = weight.axes[features]
    out = Output.of(y, y_axes, params["precision"], weight.factor)
    if isinstance(weight.sketch, Picks) and not weight.stack:
        found = picked.convolution(eqn, x, weight, weight.sketch, y, features, place)
        if found is not None:
            return found
    weight = weight.formed()
    kernel = [atoms_of([axis]) for axis in weight.axes]
    kernel[features] = [RANK]
    kernel_names = [name for names in kernel for name in names]
    s_names, f_names = weight.sketch_axes, weight.factor_axes
    if {*s_names} & {*f_names} != {RANK}:  # a stack, which no convolution has
        return None

    def thin(x: Array, part: Array, names: Names) -> Array:
        """The convolution with a kernel that has a rank for features."""
        part = part.astype(x.dtype)
        part = lax.transpose(part, [names.index(name) for name in kernel_names])
        shape = list(weight.shape)
        shape[features] = part.shape[kernel_names.index(RANK)]
        thinned: Array = eqn.primitive.bind(x, part.reshape(shape), **params)
        return thinned

    if {*s_names} == {*kernel_names}:
        return weight.attached(
            y,
            (x, weight.sketch),
            *out.by_factor(thin_names, f_names),
            keep=lambda inputs: thin(inputs[0], inputs[1], s_names),
        )
    if {*f_names} != {*kernel_names}:
        return None

    def push(known: tuple[Array, Array], factor: Array) -> Array:
        x, sketch = known
        return out.made(thin(x, factor, f_names), thin_names, sketch, s_names)

    return weight.attached(y, (x, weight.sketch), push)


def gather(eqn: Eqn, weight: Operand, indices: Operand) -> Array | None:
    """A lookup along one axis of the leaf, which counts as contracted."""
    params = eqn.params
    if isinstance(indices, Weight) or not isinstance(weight, Weight):
        return None
    axis = _looked_up(weight, params)
    if axis is None:
        return None
    numbers = params["dimension_numbers"]
    (part,) = weight.axes[axis]
    weight.saw([part.atom], is_lookup=True)
    y: Array = eqn.primitive.bind(weight.array, indices, **params)
    if weight.sketch is None or weight.factor is None:
        return y
    in_sketch, in_factor = (
        part.atom in names for names in (weight.sketch_axes, weight.factor_axes)
    )
    if in_sketch == in_factor:
        return None
    # W (vocabulary, width), indices (batch, length, 1), y (batch, length, width). The
    # array that has the vocabulary, S (r, vocabulary) or F (r, vocabulary), is looked up
    # as the leaf is; the other one, (r, width), meets what was found, (batch, length, r).
    lead = [own(place, size) for place, size in enumerate(indices.shape[:-1])]
    kept = [
        () if i == axis else parts
        for i, parts in enumerate(weight.axes)
        if i not in numbers.collapsed_slice_dims
    ]
    places = [*numbers.offset_dims]
    places += [place for place in range(y.ndim) if place not in places]
    y_axes = [a for _, a in sorted(zip(places, (*kept, *lead), strict=True))]
    out = Output.of(y, y_axes, None, weight.factor)
    column = tuple(numbers.start_index_map).index(axis)
    picks = lax.index_in_dim(indices, column, indices.ndim - 1)

    def pick(array: Array, names: Names, fill: float = 0) -> tuple[Array, list[Label]]:
        """What the model's own lookup does, along the same axis of a factor."""
        place = names.index(part.atom)
        offset = range(len(lead), len(lead) + array.ndim - 1)
        dimensions = lax.GatherDimensionNumbers(tuple(offset), (place,), (place,))
        sizes = tuple(1 if i == place else n for i, n in enumerate(array.shape))
        left = [*atoms_of(lead), *(name for name in names if name != part.atom)]

        @auto_axes(lambda *both: product_sharding(both, (atoms_of(lead), names), left))
        def looked_up(picks: Array, array: Array) -> Array:
            return lax.gather(array, picks, dimensions, sizes, mode=params["mode"],
                              fill_value=fill)  # fmt: skip

        return looked_up(picks, array), left

    if isinstance(weight.sketch, Picks) and not weight.stack:
        found = picked.lookup(weight, weight.sketch, y, out, part.atom, lead, pick)
        if found is not None:
            return found
    weight = weight.formed()
    assert isinstance(weight.sketch, Array)
    assert weight.factor is not None
    sketch, s_names = weight.sketch.astype(y.dtype), weight.sketch_axes
    if in_sketch:
        known, names = pick(sketch, s_names)
        return weight.attached(y, known, *out.by_factor(names, weight.factor_axes))
    factor, names = pick(weight.factor, weight.factor_axes)
    push, pull = out.by_factor(s_names, names)
    return weight.attached(y, sketch, push, pull, factor=factor)


def ragged_dot_general(
    eqn: Eqn, x: Operand, weight: Operand, groups: Operand
) -> Array | None:
    """A product of groups of rows, each with its own matrix of the stack."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    standard = (((1,), (1,)), ((), ()))
    if isinstance(x, Weight) or isinstance(groups, Weight):
        return None
    if not isinstance(weight, Weight):
        return None
    if numbers.dot_dimension_numbers != standard or len(weight.axes) != 3:
        return None
    stack, summed, free = (atoms_of([axis]) for axis in weight.axes)
    weight.saw(summed, stack)

    def ragged(x: Array, matrices: Array, groups: Array) -> Array:
        matrices = matrices.astype(x.dtype)
        product: Array = eqn.primitive.bind(x, matrices, groups, **eqn.params)
        return product

    y = ragged(x, weight.array, groups)
    if weight.sketch is None or weight.factor is None:
        return y
    # x (tokens, in), W (groups, in, out), y (tokens, out); S (groups, r, in) with
    # F (groups, r, out), or S (groups, r, out) with F (groups, r, in). ``thin`` are the
    # axes of a stack (groups, in, r), ``wide`` those of one (groups, r, out).
    if len(stack) != 1 or weight.side not in (summed, free):
        weight = weight.formed()
    s_names, f_names = weight.sketch_axes, weight.factor_axes
    rank: list[Atom] = [RANK]
    thin, wide = (stack, summed, rank), (stack, rank, free)

    def stacked(array: Array, names: Names, axes: Sequence[list[Atom]]) -> Array:
        """A factor as a stack of matrices, its parts merged as those of the base are."""
        order = [names.index(name) for axis in axes for name in axis]
        array = lax.transpose(array, order)
        sizes = iter(array.shape)
        return array.reshape([math.prod(next(sizes) for _ in axis) for axis in axes])

    def fit(names: Names, axes: Sequence[list[Atom]]) -> bool:
        return {*names} == {name for axis in axes for name in axis}

    inputs = x, weight.sketch, groups
    Inputs: TypeAlias = tuple[Array, Array | Picks, Array]
    if fit(s_names, thin) and fit(f_names, wide):

        def sketched(inputs: Inputs) -> tuple[Array, Array]:
            x, sketch, groups = inputs
            if isinstance(sketch, Picks):
                return sketch.taken_by_group(x, groups), groups
            return ragged(x, stacked(sketch, s_names, thin), groups), groups

        def push(known: tuple[Array, Array], factor: Array) -> Array:
            narrow, groups = known
            return ragged(narrow, stacked(factor, f_names, wide), groups)

        return weight.attached(y, inputs, push, keep=sketched)
    if not (fit(s_names, wide) and fit(f_names, thin)):
        return None

    def push_late(known: Inputs, factor: Array) -> Array:
        x, sketch, groups = known
        middle = ragged(x, stacked(factor, f_names, thin), groups)
        if isinstance(sketch, Picks):
            return sketch.placed_by_group(middle, groups)
        return ragged(middle, stacked(sketch, s_names, wide), groups)

    return weight.attached(y, inputs, push_late)


def _looked_up(weight: Weight, params: dict[str, Any]) -> int | None:
    """The one axis along which a gather picks, if it is as simple as that."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims:
        return None
    short = [i for i, size in enumerate(sizes) if size != weight.shape[i]]
    short = short or [*numbers.collapsed_slice_dims]
    if len(short) != 1 or short[0] not in numbers.start_index_map:
        return None
    (axis,) = short
    if sizes[axis] != 1 or len(weight.axes[axis]) != 1:
        return None
    # A full slice starts at 0 whatever its index, but where an index may be out of range.
    fills = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return None if fills and len(numbers.start_index_map) > 1 else axis


RULES: dict[str, Callable[..., Array | None]] = {
    "conv_general_dilated": conv_general_dilated,
    "dot_general": dot_general,
    "gather": gather,
    "ragged_dot_general": ragged_dot_general,
}
