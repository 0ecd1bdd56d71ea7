"""A run in one object: its spec, its transformation and its compiled step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from raclora_jax._autodiff.stage import abstracted
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import KeyLike, Leaf, OptState, PyTree
from raclora_jax._forms.apply import apply_updates
from raclora_jax._forms.costs import Summary
from raclora_jax._forms.fused import fused_step
from raclora_jax._forms.gradient import check_loss, value_and_grad
from raclora_jax._forms.optimizer import raclora
from raclora_jax._forms.shardings import state_shardings
from raclora_jax._forms.summary import summary
from raclora_jax._forms.trace import trace_spec


class Trainer:
    """A run in one object: a traced spec, a transformation and a compiled step.

    It is ``trace_spec``, ``raclora`` and, with ``params`` and ``opt_state`` donated, the
    jitted ``fused_step``, which leaves all as it is where the loss is not finite. Where
    its rule needs the gradients of all leaves at once the step is ``value_and_grad``,
    ``tx.update`` and ``apply_updates``, without that guard. For a run that is otherwise
    use these.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a real scalar, or ``(scalar, aux)``.
      params: Tree of arrays or ``ShapeDtypeStruct``s; only shapes, dtypes and shardings
        are read. On a mesh of devices a step keeps them and its state where they are.
      *args: What else the loss takes, a batch for example: trees of arrays, abstract
        ones are enough. Close over what is none.
      rank: Rank of every sketch, unless a rule says otherwise.
      learning_rate: A float or a schedule.
      key: Typed threefry key, raw key data, or int seed.
      has_aux: Whether ``loss_fn`` returns ``(loss, aux)``.
      **options: Further fields of ``Spec`` and further arguments of ``raclora``.

    Attributes:
      spec: What ``trace_spec`` read.
      tx: What ``raclora`` returned.
      fused: Whether the step updates inside the backward pass.

    Raises:
      TypeError: If there is no option of a name.
      ValueError: As ``trace_spec`` and ``raclora``, or if the loss is no real scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((6, 4)) / 6}
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((x @ params["kernel"] - y) ** 2)
      >>> x, y = jnp.ones((3, 6)), jnp.zeros((3, 4))
      >>> trainer = Trainer(loss_fn, params, x, y, rank=2, learning_rate=1e-2, key=0)
      >>> opt_state = trainer.init(params)
      >>> params, opt_state, before = trainer.step(params, opt_state, x, y)
      >>> bool(trainer.step(params, opt_state, x, y)[2] < before)
      True

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024.
    """

    spec: Spec
    tx: optax.GradientTransformationExtraArgs
    fused: bool

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        params: PyTree,
        *args: Any,
        rank: int,
        learning_rate: optax.ScalarOrSchedule,
        key: KeyLike,
        has_aux: bool = False,
        **options: Any,
    ) -> None:
        of_spec, of_raclora = _parted(options)
        check_loss(jax.eval_shape(loss_fn, params, *args), has_aux)
        self.spec = trace_spec(loss_fn, params, *args, rank=rank, **of_spec)
        self.tx = raclora(learning_rate, self.spec, key=key, **of_raclora)
        self._inner = of_raclora.get("inner")
        self._loss = loss_fn, has_aux
        # Shapes, since the first step gives the arrays away.
        self._shapes = *abstracted(params), *abstracted(args)
        self._not_fused = None
        try:
            step = fused_step(loss_fn, self.tx, has_aux=has_aux)
        except ValueError as error:
            self._not_fused = str(error)
            step = self._in_parts()
        self.fused = self._not_fused is None
        # Else the compiler chooses where outputs live: where one moves, the next step has
        # an input elsewhere and is compiled again.
        places = _places(self.tx, params)
        self._step = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)

    def init(self, params: PyTree) -> OptState:
        """The state before the first step, ``tx.init(params)``.

        Args:
          params: Tree of arrays.

        Returns:
          The state of ``raclora``.
        """
        return self.tx.init(params)

    def step(
        self, params: PyTree, opt_state: OptState, *args: Any
    ) -> tuple[PyTree, OptState, Any]:
        """One compiled step; ``params`` and ``opt_state`` are given away.

        Args:
          params: Tree of arrays, whose memory the new ones take.
          opt_state: The state, likewise.
          *args: What else the loss takes: trees of arrays.

        Returns:
          ``(params, opt_state, loss)``, or ``(params, opt_state, (loss, aux))``.

        Raises:
          ValueError: As ``value_and_grad``, or if an array stands twice in what is given.
        """
        check_given_once(params, opt_state, args)
        new: tuple[PyTree, OptState, Any] = self._step(params, opt_state, *args)
        return new

    def summary(self) -> Summary:
        """What the run costs, leaf by leaf, and the peak of its compiled step.

        Returns:
          As ``raclora_jax.summary``.
        """
        loss_fn, has_aux = self._loss
        leaves, with_leaves, batch, with_batch = self._shapes
        found = summary(
            with_leaves(leaves),
            self.spec,
            loss_fn,
            *with_batch(batch),
            inner=self._inner,
            has_aux=has_aux,
            fused=self.fused,
        )
        if self.fused:
            return found
        said = (
            "the step is in factor form, which a loss that is not finite moves too: "
            f"{self._not_fused}"
        )
        return dataclasses.replace(found, warnings=(*found.warnings, said))

    def _in_parts(self) -> Callable[..., Any]:
        loss_fn, has_aux = self._loss
        grad_fn = value_and_grad(loss_fn, self.spec, has_aux=has_aux)

        def step(params: PyTree, opt_state: OptState, *args: Any) -> PyTree:
            value, grads = grad_fn(params, opt_state, *args)
            updates, opt_state = self.tx.update(grads, opt_state, params)
            return apply_updates(params, updates), opt_state, value

        return step


_OF_SPEC = frozenset(field.name for field in dataclasses.fields(Spec))
_OF_RACLORA = frozenset(["inner", "weight_decay", "mask", "moments", "clip_norm"])


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of ``Spec`` and those of ``raclora``."""
    unknown = options.keys() - _OF_SPEC - _OF_RACLORA
    if unknown:
        known = ", ".join(sorted(_OF_SPEC | _OF_RACLORA))
        raise TypeError(
            f"Trainer has no option {min(unknown)!r}; it has {known}. A spec made "
            "beforehand is for rl.raclora and rl.fused_step"
        )
    of_spec = {name: options[name] for name in options.keys() & _OF_SPEC}
    return of_spec, {name: options[name] for name in options.keys() & _OF_RACLORA}


def _places(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Where weights and state are to stay, if they are on a mesh of devices."""
    places = jax.tree.map(place_on_mesh, params)
    if not jax.tree.leaves(places):
        return None
    return places, state_shardings(tx, params), None


def place_on_mesh(leaf: Leaf) -> NamedSharding | None:
    """Where an array is on a mesh of several devices."""
    place = getattr(leaf, "sharding", None)
    on_mesh = isinstance(place, NamedSharding) and place.mesh.size > 1
    return place if on_mesh else None


def check_given_once(params: PyTree, opt_state: PyTree, args: PyTree) -> None:
    """Refuses an array in two places, of which a step would give one away.

    Raises:
      ValueError: With both places.
    """
    given = {"params": params, "opt_state": opt_state}
    seen: dict[int, str] = {}
    for name, tree in {**given, "args": args}.items():
        for keypath, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
                continue
            place = name + jax.tree_util.keystr(keypath)
            other = seen.setdefault(id(leaf), place)
            # Arguments are not given away, so two of them may be one array.
            if other != place and not (name == "args" and other.startswith("args")):
                raise ValueError(
                    f"{other} and {place} are one array, whose memory a step gives away; "
                    "hand over a copy of one of them, jnp.copy(array)"
                )
