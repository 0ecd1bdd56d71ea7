"""Linen and nnx in, one plain tree with canonical paths out, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from raclora_jax._core import paths
from raclora_jax._core.factor import is_factor
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaf, PyTree
from raclora_jax._extras import extra
from raclora_jax._forms import apply, gradient

with extra("flax"):
    from flax import nnx, struct
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state

# An nnx.Module, or any view that holds a model's parameters.
Model: TypeAlias = Any


def to_tree(model: Model) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The trainable leaves of any Flax view of a model as one plain tree.

    Every view of one model gives the same tree, so the same paths and sketches: an
    ``nnx.Module``, its ``nnx.State`` or pure dict, linen variables or params, as a dict
    or ``FrozenDict``, with or without ``nn.Partitioned`` boxes.

    Args:
      model: One of the above. Of a module, a state or linen variables only the
        parameters are taken (``nnx.Param``, the collection ``"params"``).

    Returns:
      ``(tree, restore)``: nested plain dicts of arrays, and a function that puts such a
      tree back into a new object of the kind that came in.

    Raises:
      TypeError: If ``model`` is none of these.
      ValueError: From ``restore``, if a leaf is missing, new or of another shape.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
      >>> tree, restore = to_tree(layer)
      >>> sorted(tree), restore(tree).kernel.shape
      (['bias', 'kernel'], (6, 4))
    """
    return _part_as_tree(model, nnx.Param)


def _part_as_tree(model: Model, wrt: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """``to_tree`` of the variables that a filter of nnx takes."""
    params, finish = _parameters(model, wrt)
    leaves, treedef = paths.flatten(params)
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = leaf

    def restore(tree: PyTree) -> PyTree:
        back, _ = paths.flatten(tree)
        for path in [*leaves, *back]:
            expected = _shape(leaves, path)
            if _shape(back, path) != expected:
                raise ValueError(
                    f"leaf {paths.show(path)}: expected {expected}, got "
                    f"{_shape(back, path)}; restore takes a tree like the one to_tree "
                    "gave"
                )
        return finish(jax.tree.unflatten(treedef, [back[path] for path in leaves]))

    return tree, restore


def value_and_grad(
    loss_fn: Callable[..., Any], spec: Spec | int, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``raclora_jax.value_and_grad`` for an nnx module in place.

    What the loss changes in the module besides parameters (batch statistics, counters of
    random streams) is changed in ``model``, as ``nnx.value_and_grad`` does.

    Args:
      loss_fn: ``loss_fn(model, *args)``, a real scalar, or ``(scalar, aux)``.
      spec: The spec of the run.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.

    Returns:
      ``function(model, optimizer, *args)`` that returns ``(loss, grads)``, or
      ``((loss, aux), grads)``, by what the optimizer trains, its ``wrt``. In place of
      an ``Optimizer`` it takes an ``opt_state`` that began as
      ``tx.init(to_tree(model)[0])``.

    Raises:
      TypeError: From the function, if ``model`` is no ``nnx.Module``.
      ValueError: From the function, as ``raclora_jax.value_and_grad``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, rl.raclora(0.1, 2, key=0), 2)
      >>> grad_fn = value_and_grad(lambda model, x: jnp.sum(model(x) ** 2), 2)
      >>> loss, grads = grad_fn(model, optimizer, jnp.ones((3, 6)))
      >>> grads["kernel"].value.shape
      (2, 6)
    """

    def compute(model: Model, optimizer: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        _check_module(model, "value_and_grad")
        opt_state: PyTree = optimizer
        wrt: Any = nnx.Param
        if isinstance(optimizer, nnx.Optimizer):
            opt_state, wrt = nnx.as_pure(optimizer.opt_state), optimizer.wrt
        tree, restore = _part_as_tree(model, wrt)

        def loss(tree: PyTree) -> tuple[Any, tuple[Any, Any]]:
            inside = restore(tree)
            out = loss_fn(inside, *args, **kwargs)
            value, aux = out if has_aux else (out, None)
            return value, (aux, nnx.state(inside, nnx.Not(wrt)))

        grad_fn = gradient.value_and_grad(loss, spec, has_aux=True)
        (value, (aux, rest)), grads = grad_fn(tree, opt_state)
        nnx.update(model, rest)
        return ((value, aux) if has_aux else value), grads

    return compute


def apply_updates(model: nnx.Module, updates: PyTree, *gone: Any) -> nnx.Module:
    """``raclora_jax.apply_updates`` on the parameters of an nnx module, in place.

    Args:
      model: The module.
      updates: What ``tx.update`` returned.
      *gone: State and spec are no arguments any more, and are refused.

    Returns:
      The same module.

    Raises:
      TypeError: If ``model`` is no ``nnx.Module``.
      ValueError: As ``raclora_jax.apply_updates``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model, tx = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rl.raclora(0.1, 2, key=0)
      >>> tree, _ = to_tree(model)
      >>> grad_fn = value_and_grad(lambda model, x: jnp.sum(model(x) ** 2), 2)
      >>> loss, grads = grad_fn(model, tx.init(tree), jnp.ones((3, 6)))
      >>> updates, opt_state = tx.update(grads, tx.init(tree), tree)
      >>> model = apply_updates(model, updates)
    """
    _check_module(model, "apply_updates")
    tree, restore = to_tree(model)
    stepped = apply.apply_updates(tree, updates, *gone)
    nnx.update(model, nnx.state(restore(stepped), nnx.Param))
    return model


class Optimizer(nnx.Optimizer[Any]):
    """An ``nnx.Optimizer`` that takes gradients in factor coordinates.

    ``update(model, grads)`` takes what ``value_and_grad(loss_fn, spec)(model, optimizer,
    *args)`` of this room returned, or dense gradients as ``nnx.grad`` gives them, and
    moves the model in place.

    Args:
      model: The module.
      tx: With one ``raclora(...)`` in it.
      spec: The spec it was given.
      wrt: What is trained, as in ``nnx.Optimizer``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> from flax import nnx
      >>> model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, rl.raclora(0.1, 2, key=0), 2)
      >>> grad_fn = value_and_grad(lambda model, x: jnp.sum(model(x) ** 2), 2)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, grads = grad_fn(model, optimizer, x)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> before = step(model, optimizer, jnp.ones((3, 6)))
      >>> bool(step(model, optimizer, jnp.ones((3, 6))) < before)
      True
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        spec: Spec | int,
        *,
        wrt: Any = nnx.Param,
    ) -> None:
        _check_module(model, "Optimizer")
        super().__init__(model, tx, wrt=wrt)
        self.spec = as_spec(spec)

    def update(self, model: nnx.Module, grads: PyTree, /, **kwargs: Any) -> PyTree:
        """Moves the model and the state by one step.

        Args:
          model: The module.
          grads: Dense, in factor coordinates, or some leaves the one and some the other.
          **kwargs: Extra arguments of ``tx.update``.

        Returns:
          The updates, in the structure of the parameters.

        Raises:
          ValueError: If a parameter has no gradient, or as
            ``raclora_jax.apply_updates``.
        """
        params = nnx.as_pure(nnx.state(model, self.wrt))
        opt_state = nnx.as_pure(self.opt_state)
        given = (_as_params(grads, params), opt_state, params)
        updates, new_state = self.tx.update(*given, **nnx.as_pure(kwargs))
        stepped = apply.apply_updates(params, updates)
        nnx.update(model, stepped)
        nnx.update(self.opt_state, nnx.state(new_state))
        self.step[...] += 1
        return updates


def _as_params(grads: PyTree, params: PyTree) -> PyTree:
    """Gradients by path, in the structure of the parameters."""

    def is_leaf(node: Leaf) -> bool:
        return is_factor(node) or isinstance(node, optax.MaskedNode)

    by_path, _ = paths.flatten(nnx.as_pure(grads), is_leaf=is_leaf)
    leaves, treedef = paths.flatten(params)
    for path in leaves:
        if path not in by_path:
            raise ValueError(
                f"leaf {paths.show(path)} has no gradient; make gradients with "
                "raclora_jax.flax.value_and_grad and the optimizer's own spec and model"
            )
    return paths.unflatten(treedef, {path: by_path[path] for path in leaves})


class TrainState(train_state.TrainState):
    """A linen ``TrainState`` that steps in factor form.

    Gradients come from ``raclora_jax.value_and_grad(loss_fn, spec)(state.params,
    state.opt_state, *args)``; dense ones are taken as well.

    Attributes:
      spec: The spec that ``raclora(...)`` in ``tx`` was given.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((3, 6))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = rl.raclora(0.1, 2, key=0)
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=tx, spec=rl.Spec(2)
      ... )
      >>> def loss_fn(params, x):
      ...     return jnp.mean(state.apply_fn({"params": params}, x) ** 2)
      >>> grad_fn = rl.value_and_grad(loss_fn, state.spec)
      >>> loss, grads = grad_fn(state.params, state.opt_state, x)
      >>> int(state.apply_gradients(grads=grads).step)
      1
    """

    spec: Spec = struct.field(pytree_node=False)

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> TrainState:
        """The state after one step.

        Args:
          grads: Gradients of the params, dense or in factor coordinates. As in Flax, the
            collection ``_overwrite_with_gradient`` of 8-bit layers beside ``params`` is
            no business of the optimizer: what comes for it is what it becomes.
          **kwargs: Other fields to replace.

        Returns:
          The new state.
        """
        params: PyTree = self.params
        given = grads
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        if overwrites:
            given, params = grads["params"], params["params"]
        updates, opt_state = self.tx.update(given, self.opt_state, params)
        params = apply.apply_updates(params, updates)
        if overwrites:
            whole = {"params": params}
            whole[OVERWRITE_WITH_GRADIENT] = grads[OVERWRITE_WITH_GRADIENT]
            params = whole
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )


def _check_module(model: object, name: str) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"flax.{name} takes an nnx.Module, got {type(model).__name__}; for linen "
            f"params and plain trees use raclora_jax.{name}"
        )


def _parameters(model: Model, wrt: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The trainable part of a view, and how to put a new one in its place."""
    if isinstance(model, nnx.Module):
        graphdef, *states = nnx.split(model, wrt, ...)
        params, rest = states

        def merged(new: PyTree) -> nnx.Module:
            # Variables of its own: those of the model may be of an outer trace.
            return nnx.merge(graphdef, new, jax.tree.map(lambda leaf: leaf, rest))

        return params, merged
    if isinstance(model, nnx.State) and _holds_variables(model):
        split = nnx.split_state(model, wrt, ...)
        return split[0], lambda new: nnx.merge_state(new, split[1])
    if isinstance(model, Mapping) and isinstance(model.get("params"), Mapping):
        kind: Callable[[Any], Any] = type(model)
        return model["params"], lambda new: kind({**model, "params": new})
    if isinstance(model, Mapping | nnx.State):
        return model, lambda new: new
    raise TypeError(
        f"to_tree takes an nnx.Module, an nnx.State, or linen variables or params, got "
        f"{type(model).__name__}; of a TrainState pass .params"
    )


def _holds_variables(state: PyTree) -> bool:
    def is_variable(node: Leaf) -> bool:
        return isinstance(node, nnx.Variable)

    return any(map(is_variable, jax.tree.leaves(state, is_leaf=is_variable)))


def _shape(leaves: dict[str, Any], path: str) -> str:
    if path not in leaves:
        return "no leaf"
    return f"shape {jnp.shape(leaves[path])}"
