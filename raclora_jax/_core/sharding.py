"""Shardings: what a leaf's says of its factor and sketch, on explicit and auto axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from raclora_jax._core import paths
from raclora_jax._core.types import RANK, Label, Leaf, PyTree, TreeDef

P = ParamSpec("P")
T = TypeVar("T")
# The mesh axes along which each axis of an array is sharded.
Entries = list[tuple[str, ...]]


class Inherited(NamedTuple):
    """The sharding that an array has from its leaf.

    Attributes:
      sharding: The sharding.
      lacking: Mesh axes of the leaf that found no axis of the array to divide.
    """

    sharding: NamedSharding
    lacking: tuple[str, ...]


def sharding_of(leaf: Leaf) -> NamedSharding | None:
    """How a leaf is sharded, where its type or the array itself says so.

    A traced array on auto axes does not: the compiler decides.
    """
    if isinstance(leaf, jax.core.Tracer):
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        return sharding if is_explicit(sharding) else None
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return sharding if sharding.mesh.size > 1 or is_explicit(sharding) else None


def mesh_of(places: Mapping[str, NamedSharding | None]) -> Mesh | None:
    """The one mesh of devices that leaves are on, ``None`` for types and for no mesh.

    Raises:
      ValueError: If they are on different ones.
    """
    first: tuple[str, Mesh] | None = None
    for path, sharding in places.items():
        if sharding is None or not isinstance(sharding.mesh, Mesh):
            continue
        if first is None:
            first = path, sharding.mesh
        elif first[1] != sharding.mesh:
            raise ValueError(
                f"params are on different meshes: leaf {paths.show(first[0])} on "
                f"{first[1]}, leaf {paths.show(path)} on {sharding.mesh}; put them on "
                "one with jax.device_put"
            )
    return None if first is None else first[1]


def is_explicit(sharding: object) -> bool:
    """Whether a sharding is of explicit axes: part of the types of its arrays."""
    if not isinstance(sharding, NamedSharding):
        return False
    return AxisType.Explicit in sharding.mesh.axis_types


def as_explicit(sharding: NamedSharding) -> NamedSharding:
    """The same sharding on a mesh of explicit axes, as types would say it."""
    return NamedSharding(explicit_mesh(sharding.mesh), sharding.spec)


def explicit_mesh(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """A mesh without devices, all of whose axes are explicit."""
    types = (AxisType.Explicit,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def on_mesh(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """The sharding that a type says, on a mesh with devices; replicated if it says none.

    Spelled as compiled programs spell it, lest the second step be compiled anew: types
    name every axis, the compiler none after the last that is sharded.
    """
    entries = [*leaf.sharding.spec] if is_explicit(leaf.sharding) else []
    entries += [None] * (len(leaf.shape) - len(entries))
    if not _explicit_axes(mesh):
        while entries and entries[-1] is None:
            entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))


def inherited(
    sharding: NamedSharding,
    shape: Sequence[int],
    axes: Sequence[Label],
    *,
    spread: bool = True,
) -> Inherited:
    """The sharding of an array that has some of the axes of a leaf.

    It keeps the leaf's mesh axes. Those of the axes that it lost go, as they stand
    together or else one by one, to a free axis behind the rank that they divide, the
    longest first; and to one that is sharded already where none is free. On a mesh of
    fsdp=4, tp=2 the factor (8, n) of a leaf whose rows are sketched is ::

        leaf (512, 640)    spec               factor       its spec
        rows on fsdp       ("fsdp", "tp")     (8, 640)     (None, ("tp", "fsdp"))
        columns on fsdp    (None, "fsdp")     (8, 640)     (None, "fsdp")
        rows on both       (("fsdp", "tp"),)  (8, 640)     (None, ("fsdp", "tp"))
        leaf (512, 642)    ("fsdp", None)     (8, 642)     (None, None), lacking fsdp

    Args:
      sharding: The leaf's.
      shape: Shape of the array.
      axes: Which axis of the leaf each of its axes is, ``RANK`` for the rank.
      spread: Whether mesh axes of lost axes go anywhere.

    Returns:
      The sharding, and what found no place.
    """
    sizes = dict(sharding.mesh.shape)
    leaf = _entries(sharding)
    kept = [leaf[a] if isinstance(a, int) and a < len(leaf) else () for a in axes]
    lost = [names for axis, names in enumerate(leaf) if names and axis not in axes]
    behind = [*axes].index(RANK) + 1 if RANK in axes else len(shape)

    def place(names: tuple[str, ...]) -> bool:
        free_first = sorted(
            range(behind, len(shape)), key=lambda i: (bool(kept[i]), -shape[i])
        )
        for i in free_first:
            parts = math.prod(sizes[name] for name in (*kept[i], *names))
            if shape[i] % parts == 0:
                kept[i] = (*kept[i], *names)
                return True
        return False

    lacking: list[str] = []
    for names in lost if spread else ():
        if not place(names):
            apart = names if len(names) > 1 else ()
            placed = {name for name in apart if place((name,))}
            lacking += [name for name in names if name not in placed]
    spec = PartitionSpec(*(_entry(names) for names in kept))
    return Inherited(NamedSharding(sharding.mesh, spec), tuple(lacking))


def zeros(
    shape: Sequence[int], dtype: DTypeLike, sharding: NamedSharding | None
) -> Array:
    """Zeros that are sharded so; of a type that says so where the leaf's does."""
    if sharding is None or not is_explicit(sharding):
        return jnp.zeros(shape, dtype, device=sharding)
    if isinstance(jnp.zeros(()), jax.core.Tracer) and isinstance(sharding.mesh, Mesh):
        # Inside jit a mesh of devices would make it a constant without the type.
        sharding = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec)
    return lax.full(tuple(shape), 0, dtype, sharding=sharding)


def auto_axes(
    out_sharding: Callable[..., PyTree],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a decorator: where shardings are types, a function's results alone have them.

    Inside, the compiler decides: no operation has to say where its output lives, and the
    program is the one that automatic mesh axes give.

    Args:
      out_sharding: Given the function's arguments, the shardings of its results: a tree
        of them, or ``None``.

    Returns:
      The decorator. What is no array among the arguments is handed on as it is.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def around(*args: P.args, **kwargs: P.kwargs) -> T:
            out = out_sharding(*args, **kwargs)
            explicit = [s for s in jax.tree.leaves(out) if is_explicit(s)]
            outside = jax.sharding.get_abstract_mesh()
            # A function that calls another one is on automatic axes already.
            inside_one = bool(outside.axis_names) and not _explicit_axes(outside)
            if not explicit or inside_one:
                return function(*args, **kwargs)
            treedef: TreeDef
            leaves, treedef = jax.tree.flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Array)]

            def inside(*arrays: Array) -> T:
                filled = dict(zip(places, arrays, strict=True))
                own = [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
                args, kwargs = treedef.unflatten(own)
                return function(*args, **kwargs)

            mesh = explicit[0].mesh
            # A constant among the arguments is on no mesh: what is made of it is whole.
            whole = NamedSharding(mesh, PartitionSpec())
            out = jax.tree.map(lambda s: s or whole, out, is_leaf=lambda s: s is None)
            axes = _explicit_axes(mesh)
            called = jax.sharding.auto_axes(inside, axes=axes, out_sharding=out)
            result: T = called(*(leaves[i] for i in places))
            return result

        return around

    return decorate


def constrained(array: Array, sharding: NamedSharding) -> Array:
    """An array that lives so where it is used, on auto axes or explicit ones."""
    place: Any = sharding.spec if is_explicit(sharding) else sharding
    out: Array = lax.with_sharding_constraint(array, place)
    return out


def resharded(array: Array, like: Any) -> Array:
    """An array with the sharding that another type says, if it says one."""
    sharding = getattr(like, "sharding", None)
    if not is_explicit(sharding) or jax.typeof(array).sharding == sharding:
        return array
    return jax.sharding.reshard(array, sharding)


def product_sharding(
    operands: Sequence[Array], labels: Sequence[Sequence[Any]], out: Sequence[Any]
) -> NamedSharding | None:
    """The sharding of a product of arrays whose axes have labels.

    Every label has the mesh axes of the first operand that shards it; none is used
    twice. ``None`` where no type says a sharding.
    """
    by_label: dict[Any, tuple[str, ...]] = {}
    mesh = None
    for array, names in zip(operands, labels, strict=True):
        sharding = sharding_of(array)
        if sharding is None or not is_explicit(sharding):
            continue
        mesh = sharding.mesh
        for label, entry in zip(names, _entries(sharding), strict=False):
            if entry:
                by_label.setdefault(label, entry)
    if mesh is None:
        return None
    used: set[str] = set()
    spec = []
    for label in out:
        entry = by_label.get(label, ())
        spec.append(_entry(entry) if not used & {*entry} else None)
        used |= {*entry}
    return NamedSharding(mesh, PartitionSpec(*spec))


def without_axis(array: Array, axis: int) -> NamedSharding | None:
    """The sharding that an array's type says, with an axis of it in one piece."""
    sharding = sharding_of(array)
    if sharding is None or not is_explicit(sharding):
        return None
    spec = [None if i == axis else entry for i, entry in enumerate(sharding.spec)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def stack_sharding(array: Array, axis: int) -> NamedSharding | None:
    """The sharding that an array's type says of the axes before one, and no others."""
    sharding = sharding_of(array)
    if sharding is None or not is_explicit(sharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axis]))


def _explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The explicit axes of a mesh."""
    return tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )


def _entries(sharding: NamedSharding) -> Entries:
    found: Entries = []
    for entry in sharding.spec:
        if isinstance(entry, str):
            found.append((entry,))
        else:
            found.append(tuple(entry) if isinstance(entry, tuple) else ())
    return found


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names[0] if len(names) == 1 else names or None
