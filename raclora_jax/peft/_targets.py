"""Where a leaf stands in a PyTorch model, and how its axes lie there."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np

from raclora_jax._core import checks, paths
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import PyTree

Kind = Literal["linear", "transposed", "embedding", "conv", "experts", "plain"]


@dataclasses.dataclass(frozen=True)
class Target:
    """The parameter of a PyTorch model that a leaf is.

    ========== ================================= =================================
    kind       our leaf                          PyTorch's parameter
    ========== ================================= =================================
    linear     (\\*in, \\*out)                     (out, in): ``nn.Linear``
    transposed (\\*in, \\*out)                     (in, out): GPT-2's ``Conv1D``
    embedding  (vocabulary, \\*features)          (vocabulary, features)
    conv       (\\*window, in, out)               (out, in, \\*window): ``nn.Conv2d``
    experts    (experts, \\*in, \\*out)            (experts, out, in): one parameter
    plain      as it is                          as it is: biases, norms
    ========== ================================= =================================

    Axis groups are flattened row-major.

    Args:
      name: Its name, such as ``"encoder.layer.0.output.dense.weight"``. A stacked leaf
        has a ``{}`` for the index along each of its batch axes, but for experts.
      kind: How its axes lie, from the table.
      order: Of experts: its place among such parameters of its module, in the order in
        which the module has them.
      tied: Of an embedding: the parameter of the head that is this leaf too, such as
        ``"lm_head.weight"``; ``False`` if none is. PEFT changes the two apart, so that
        an adapter with a change of the embedding needs it, but where a leaf is the head.

    Raises:
      ValueError: If the kind is unknown, or a name of a matrix does not end with
        ``.weight``.

    Example:
      >>> Target("model.layers.{}.mlp.up_proj.weight").module
      'model.layers.{}.mlp.up_proj'
    """

    name: str
    kind: Kind = "linear"
    order: int = 0
    tied: str | Literal[False] | None = None

    def __post_init__(self) -> None:
        checks.choice(f"{self.name}: kind", self.kind, get_args(Kind))
        if self.kind not in ("plain", "experts") and not self.name.endswith(".weight"):
            raise ValueError(
                f"{self.name}: a {self.kind} parameter is named '<module>.weight'; name "
                "it so, or say kind='plain' for one without rows and columns"
            )

        if self.tied is not None and self.kind != "embedding":
            raise ValueError(f"{self.name}: tied is of an embedding, got {self.kind}")
        if self.tied and not str(self.tied).endswith(".weight"):
            raise ValueError(
                f"{self.name}: tied must be the head's '<module>.weight' or False, got "
                f"{self.tied!r}"
            )

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]


class View(NamedTuple):
    """The axes of a leaf, as a plan has them.

    Attributes:
      shape: Shape of the leaf.
      batch: Axes that stack matrices.
      rows: Axes the model contracts over.
      cols: The other matrix axes.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def sizes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Sizes of some axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def indices(self) -> Iterator[tuple[int, ...]]:
        """Every index along the batch axes."""
        return np.ndindex(self.sizes(self.batch))


def targets(
    params: PyTree, rules: Iterable[tuple[str, str] | tuple[str, str, Kind]]
) -> dict[str, Target]:
    """Names every leaf by the first rule whose expression matches its whole path.

    Args:
      params: The weights, or their shapes.
      rules: ``(expression, name)`` or ``(expression, name, kind)``; the name may use the
        groups of the expression (``\\\\1``).

    Returns:
      ``{path: Target}``.

    Raises:
      ValueError: If no rule matches a leaf, or a rule matches none.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"h": {"0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
      >>> rules = [
      ...     (r"h/(\\d+)/kernel", r"h.\\1.weight"),
      ...     (r"h/(\\d+)/bias", r"h.\\1.bias", "plain"),
      ... ]
      >>> targets(params, rules)["h/0/kernel"]
      Target(name='h.0.weight', kind='linear', order=0, tied=None)
    """
    leaves, _ = paths.flatten(params)
    rules, used, found = list(rules), set(), {}
    for path in leaves:
        for index, (expression, name, *kind) in enumerate(rules):
            if re.fullmatch(expression, path):
                used.add(index)
                own = re.sub(expression, name, path)
                found[path] = Target(own, kind[0] if kind else "linear")
                break
        else:
            raise ValueError(
                f"leaf {paths.show(path)} has no name: no rule matches the whole path; "
                "add one"
            )
    for index, (expression, *_) in enumerate(rules):
        if index not in used:
            raise ValueError(f"the rule {expression!r} names no leaf; take it out")
    return found


def views(
    params: PyTree, spec: Spec | int, names: Mapping[str, Target]
) -> dict[str, View]:
    """The view of every named leaf: its plan's, or the plain one of a dense matrix.

    Raises:
      ValueError: If a leaf has no view, or view and target do not agree.
    """
    plans = plan_tree(spec, params)
    for path in names:
        if path not in plans:
            raise ValueError(
                f"a target is given for {paths.show(path)}, which is no leaf; the paths "
                f"are {', '.join(map(paths.show, list(plans)[:8]))}"
            )
    found = {}
    for path, target in names.items():
        plan = plans[path]
        axes = tuple(range(len(plan.shape)))
        if target.kind == "plain":
            view = View(plan.shape, plan.batch, (), ())
        elif plan.rows:
            view = View(plan.shape, plan.batch, plan.rows, plan.cols)
        elif target.kind == "conv":
            view = View(plan.shape, (), axes[:-1], axes[-1:])
        elif len(axes) == 2 + (target.kind == "experts"):
            view = View(plan.shape, axes[:-2], axes[-2:-1], axes[-1:])
        else:
            raise ValueError(
                f"leaf {paths.show(path)} of shape {plan.shape} has {len(axes)} axes and "
                "is trained in full, so that nothing says which are rows: adapt it with "
                "a Rule that names rows and batch, or split the leaf"
            )
        _check(path, view, target)
        found[path] = view
    return found


def _check(path: str, view: View, target: Target) -> None:
    """Refuses a name with too few or too many places, and experts of no one stack."""
    stacked = len(view.batch)
    wanted = 0 if target.kind == "experts" else stacked
    if target.kind == "plain" and "{}" not in target.name:
        return
    if target.kind == "experts" and stacked != 1:
        raise ValueError(
            f"leaf {paths.show(path)} of shape {view.shape} is to be {target.name}, one "
            f"parameter of all experts, and has {stacked} batch axes in place of one"
        )
    places = target.name.count("{}")
    if target.kind != "plain" and places != wanted:
        raise ValueError(
            f"leaf {paths.show(path)} of shape {view.shape} has {stacked} batch axes, "
            f"but its name {target.name} has {places} places for an index"
        )


def torch_shapes(view: View, target: Target) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that a leaf is, by name."""
    batch = view.sizes(view.batch)
    sides = (view.sizes(view.rows), view.sizes(view.cols))
    inputs, outputs = map(math.prod, sides)
    match target.kind:
        case "plain" if "{}" not in target.name:
            return {target.name: view.shape}
        case "plain":
            indices = range(view.shape[0])
            return {target.name.format(index): view.shape[1:] for index in indices}
        case "experts":
            return {target.name: (*batch, outputs, inputs)}
        case "linear":
            shape: tuple[int, ...] = (outputs, inputs)
        case "conv":
            # (*window, in, out) in JAX, (out, in, *window) in PyTorch.
            *window, channels = sides[0]
            shape = (outputs, channels, *window)
        case _:
            shape = (inputs, outputs)
    return {target.name.format(*index): shape for index in view.indices}


def to_torch(leaf: np.ndarray, view: View, target: Target, name: str) -> np.ndarray:
    """One of the parameters that a leaf is, contiguous."""
    if target.kind == "plain":
        number = list(torch_shapes(view, target)).index(name)
        return np.asarray(leaf[number] if "{}" in target.name else leaf, order="C")
    matrices = _matrices(leaf, view)
    if target.kind == "experts":
        return np.ascontiguousarray(np.swapaxes(matrices, 1, 2))
    index = next(i for i in view.indices if target.name.format(*i) == name)
    return _laid(matrices[index], view, target)


def from_torch(
    read: Mapping[str, np.ndarray], path: str, view: View, target: Target
) -> np.ndarray:
    """The leaf that ``to_torch`` took apart.

    Raises:
      ValueError: If a parameter is missing or has another shape.
    """
    expected = torch_shapes(view, target)
    for name, shape in expected.items():
        if name not in read:
            raise ValueError(f"leaf {paths.show(path)}: the file has no parameter {name}")
        if read[name].shape != shape:
            raise ValueError(
                f"leaf {paths.show(path)}: expected {name} of shape {shape}, got "
                f"{read[name].shape}"
            )
    if target.kind == "plain":
        if "{}" not in target.name:
            return read[target.name]
        return np.stack([read[name] for name in expected])
    if target.kind == "experts":
        return _from_matrices(np.swapaxes(read[target.name], 1, 2), view)
    matrices = np.stack([_unlaid(read[name], view, target) for name in expected])
    batch = view.sizes(view.batch)
    return _from_matrices(matrices.reshape(*batch, *matrices.shape[1:]), view)


def _matrices(leaf: np.ndarray, view: View) -> np.ndarray:
    """``(batch..., in, out)``."""
    moved = np.transpose(leaf, (*view.batch, *view.rows, *view.cols))
    sides = (math.prod(view.sizes(axes)) for axes in (view.rows, view.cols))
    return moved.reshape(*view.sizes(view.batch), *sides)


def _from_matrices(matrices: np.ndarray, view: View) -> np.ndarray:
    """What ``_matrices`` took apart."""
    order = (*view.batch, *view.rows, *view.cols)
    moved = matrices.reshape(view.sizes(order))
    return np.transpose(moved, np.argsort(order))


def _laid(matrix: np.ndarray, view: View, target: Target) -> np.ndarray:
    """One ``(in, out)`` as the parameter."""
    if target.kind in ("transposed", "embedding"):
        return np.ascontiguousarray(matrix)
    if target.kind == "linear":
        return np.ascontiguousarray(matrix.T)
    return np.ascontiguousarray(window_last(matrix.T, view))


def _unlaid(array: np.ndarray, view: View, target: Target) -> np.ndarray:
    """What ``_laid`` made of an ``(in, out)``."""
    if target.kind in ("transposed", "embedding"):
        return array
    if target.kind == "linear":
        return array.T
    return window_first(array).T


def window_last(rows: np.ndarray, view: View) -> np.ndarray:
    """Of a convolution: ``(n, window x in)`` as ``(n, in, *window)``."""
    apart = rows.reshape(len(rows), *view.sizes(view.rows))
    return np.moveaxis(apart, -1, 1)


def window_first(array: np.ndarray) -> np.ndarray:
    """What ``window_last`` made of ``(n, window x in)``."""
    return np.moveaxis(array, 1, -1).reshape(len(array), -1)
