"""The adapter form's forward pass: factors beside the weights, never added to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from raclora_jax._autodiff.interpret import arrays, evaluate
from raclora_jax._autodiff.stage import stage
from raclora_jax._autodiff.uses import Uses
from raclora_jax._autodiff.weight import leaf_weight
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sides import in_link, switched
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaf, PyTree
from raclora_jax._forms.adapter import (
    AdapterChain,
    is_quantised,
    matched,
    refuse_quantised,
    sketches_of,
)


def adapted(
    loss_fn: Callable[..., Any],
    spec: Spec | int,
    *,
    dequantize: Callable[[Any], Array] | None = None,
) -> Callable[..., Any]:
    """A loss of the weights turned into a loss of the factors.

    The sum ``W + lift(F)`` is never formed: a product is computed as
    ``x . W + scaling * (x . S) . F``. A use no rule is known for forms it, with a warning
    that names the leaf and the operation. The loss is differentiated once: a second
    derivative by the factors does not see what the first one holds fixed.

    Args:
      loss_fn: ``loss_fn(params, *args)``. It is staged, as by ``jax.jit``.
      spec: The spec of the run.
      dequantize: Reads a quantised leaf as an array, such as ``qwix.dequantize``; the
        loss sees such leaves in the dtype and shape they state.

    Returns:
      ``loss(factors, base_params, chain, *args)``: ``loss_fn`` at
      ``W + lift(F)`` in the dtypes of ``base_params``.

    Raises:
      ValueError: From the loss: if factors, chain and base do not belong together, or a
        leaf is quantised and there is no ``dequantize``.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> W, x = {"kernel": jnp.ones((6, 4))}, jnp.ones((3, 6))
      >>> factors, chain = rl.init_adapter(W, 2, key=0)
      >>> loss = adapted(lambda params, x: jnp.sum((x @ params["kernel"]) ** 2), 2)
      >>> jax.grad(loss)(factors, W, chain, x)["kernel"].shape
      (2, 6)
    """
    spec = as_spec(spec)

    def loss(
        factors: PyTree,
        base_params: PyTree,
        chain: AdapterChain,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        leaves, _, plans, values = matched(base_params, factors, chain, spec)
        if dequantize is None:
            refuse_quantised(leaves, plans, "read", "pass dequantize to adapted")
        beside = unmerged(
            loss_fn, plans, values, sketches_of(chain, plans), dequantize=dequantize
        )
        return beside(base_params, *args, **kwargs)

    return loss


def unmerged(
    loss_fn: Callable[..., Any],
    plans: dict[str, LeafPlan],
    values: dict[str, Array],
    sketches: dict[str, Array],
    *,
    dequantize: Callable[[Any], Array] | None = None,
) -> Callable[..., Any]:
    """A loss of ``W + lift(F)`` as a function of W, the sum never formed.

    Both factors and sketches may be differentiated.

    Args:
      loss_fn: ``loss_fn(params, *args)``.
      plans: ``{path: plan}`` of all leaves.
      values: ``{path: factor}``, and the trained differences of dense leaves.
      sketches: ``{path: sketch}`` of the adapted leaves.
      dequantize: As in ``adapted``.

    Returns:
      ``loss(base_params, *args)``.
    """

    def loss(base_params: PyTree, *args: Any, **kwargs: Any) -> Any:
        leaves, treedef = paths.flatten(base_params, is_leaf=is_quantised)
        seen = {path: _as_seen(leaf) for path, leaf in leaves.items()}
        staged = stage(
            lambda params: loss_fn(params, *args, **kwargs),
            paths.unflatten(treedef, seen),
        )
        uses = Uses()

        def forward(
            plans: dict[str, LeafPlan], sketches: dict[str, Array]
        ) -> list[Array]:
            def stand_in(path: str, leaf: Leaf) -> Leaf:
                plan, dense = plans[path], dequantize if is_quantised(leaf) else None
                if plan.mode == "lowrank":
                    factor, sketch = in_link(values[path], plan), sketches[path]
                    return leaf_weight(
                        leaf, plan, uses, sketch, factor, zero=False, read=dense
                    )
                array = leaf if dense is None else dense(leaf)
                if plan.mode == "frozen":
                    return array
                # Trained in full: no thin product to put beside, so the sum is read.
                wide = jnp.asarray(array, plan.wide_dtype) + values[path]
                return wide.astype(plan.dtype)

            inputs = [stand_in(path, leaf) for path, leaf in leaves.items()]
            return arrays(evaluate(staged.jaxpr, inputs), "output")

        out = switched(plans, sketches, forward)
        uses.warn()
        return staged.rebuilt(out)

    return loss


def _as_seen(leaf: Leaf) -> Leaf:
    """A leaf as the model sees it."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantised(leaf) else leaf
