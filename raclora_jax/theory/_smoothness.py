"""L where a run stands, from Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from raclora_jax._core import paths
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.types import KeyLike, PyTree, widened
from raclora_jax.theory._numbers import check_count


def smoothness(
    loss_fn: Callable[..., Array],
    params: PyTree,
    *args: Any,
    iterations: int = 30,
    key: KeyLike,
) -> Array:
    """A lower bound on L: the largest curvature that power iteration finds at W.

    ``|H v|`` after ``v <- H v / |H v|`` with H the Hessian of the loss, one product a
    step and no matrix. It sees the curvature here and not what the run will meet, and
    comes from below: take ``1 / (1.1 * smoothness(...))`` for gamma, and halve it where
    ``certify`` says that the loss does not descend.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a real scalar, twice differentiable.
      params: The weights, floating leaves only; low-precision ones are read in float32.
      *args: The other arguments of the loss, such as a batch.
      iterations: Power steps.
      key: Typed threefry key, raw key data, or int seed.

    Returns:
      Scalar array, in units of ``f / |W|^2``.

    Raises:
      ValueError: If a leaf is not real and floating.

    Example:
      >>> import jax.numpy as jnp
      >>> curvature = jnp.array([1.0, 2.0, 5.0])
      >>> found = smoothness(lambda W: jnp.sum(curvature * W**2) / 2, jnp.ones(3), key=0)
      >>> round(float(found), 4)
      5.0
    """
    check_count(iterations=iterations)
    leaves, treedef = paths.flatten(params)
    data = key_data(key)
    start = {}
    for path, leaf in leaves.items():
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"leaf {paths.show(path)} has dtype {dtype}: curvature is known of "
                "floating leaves only; close over the others in loss_fn"
            )
        word = leaf_key(data, "smoothness", path)
        start[path] = jax.random.normal(word, jnp.shape(leaf), widened(dtype))
    # Wide: the norm that is returned would have two or three digits in bfloat16.
    wide = paths.unflatten(
        treedef, {p: jnp.asarray(leaf, start[p].dtype) for p, leaf in leaves.items()}
    )

    @jax.jit
    def power(wide: PyTree, start: PyTree, args: Any) -> Array:
        slope = jax.grad(lambda params: loss_fn(params, *args))

        def step(_: int, found: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            vector = _unit(found[0])[0]
            # Forward over reverse: reverse over reverse would keep a tape of the tape.
            product = jax.jvp(slope, (wide,), (vector,))[1]
            return product, _unit(product)[1]

        return lax.fori_loop(0, iterations, step, (start, _unit(start)[1]))[1]

    return power(wide, paths.unflatten(treedef, start), args)


def _unit(tree: PyTree) -> tuple[PyTree, Array]:
    """A tree over its norm, and the norm; a zero stays zero."""
    squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)]
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    safe = jnp.where(norm == 0, 1, norm)
    return jax.tree.map(lambda leaf: leaf / safe.astype(leaf.dtype), tree), norm
