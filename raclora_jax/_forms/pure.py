"""The pure functions on whole trees: draw sketches, project gradients, lift factors."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from raclora_jax._core import paths
from raclora_jax._core.factor import Factor, check_factor, is_factor
from raclora_jax._core.keys import key_data
from raclora_jax._core.lowrank import lift_leaf, project_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_leaves, plan_tree
from raclora_jax._core.sides import is_both, is_drawn, shapes, sketch_shapes
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Drawn, KeyLike, Leaf, PyTree


def sample_sketch(
    params: PyTree, spec: Spec | int, *, key: KeyLike, link: Array | int = 0
) -> PyTree:
    """Draws the sketches of a whole tree, or of one leaf.

    Args:
      params: Tree of arrays or ``ShapeDtypeStruct``s.
      spec: A ``Spec`` or a rank.
      key: Typed threefry key, raw key data, or int seed.
      link: Index of the link, int or int32 scalar.

    Returns:
      The same tree with the sketch ``(batch..., rank, *axes of the sketched side)``
      for each adapted leaf and ``optax.MaskedNode()`` elsewhere. Laws that pick rows give
      ``Picks``, whose ``rows`` are int32 ``(batch..., rank)``. Where the side is drawn,
      the sketches ``left`` and ``right``, and ``is_left``, a bool scalar that says which
      of them the link uses.

    Raises:
      ValueError: If the spec does not fit the tree, or the key is no threefry key.

    Example:
      >>> import jax.numpy as jnp
      >>> S = sample_sketch(jnp.zeros((6, 4)), 2, key=0)
      >>> S.shape, bool(jnp.allclose(S @ S.T, jnp.eye(2), atol=1e-6))
      ((2, 4), True)

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Assumption 5.1.
    """
    data, link = key_data(key), jnp.asarray(link, jnp.int32)
    plans = plan_tree(spec, params)
    _, treedef = paths.flatten(params)
    drawn = draw_all(data, link, plans.values())
    return paths.unflatten(treedef, {p: drawn.get(p, optax.MaskedNode()) for p in plans})


def project(grads: PyTree, sketches: PyTree, spec: Spec | int) -> PyTree:
    """Projects dense gradients on their sketches, leaf by leaf.

    For a left sketch S (dim x rank) of a leaf W (rows x cols) this is
    ``scaling * S^T G``; for a right sketch ``scaling * G S``, stored rank first.

    Args:
      grads: Tree of dense gradients, or one.
      sketches: What ``sample_sketch`` gave for the same tree.
      spec: The spec the sketches were drawn with.

    Returns:
      The same tree with a ``Factor`` for each adapted leaf, decay 0; dense leaves as
      they were; ``optax.MaskedNode()`` for frozen ones.

    Raises:
      ValueError: If sketches and gradients do not belong together.

    Example:
      >>> import jax, jax.numpy as jnp, raclora_jax as rl
      >>> W = jnp.zeros((6, 4))
      >>> S = rl.sample_sketch(W, 2, key=0)
      >>> rl.project(jnp.ones((6, 4)), S, 2).value.shape
      (2, 6)

    References:
      Malinovsky et al., `Randomized Asymmetric Chain of LoRA
      <https://arxiv.org/abs/2410.08305>`_, 2024, Section 5.1.
    """
    leaves, treedef = paths.flatten(grads)
    plans = plan_leaves(as_spec(spec), leaves)
    drawn = _matched(sketches, plans)

    def one(path: str, grad: Leaf) -> Leaf:
        plan = plans[path]
        if plan.mode == "frozen":
            return optax.MaskedNode()
        if plan.mode == "dense":
            return grad
        value = project_leaf(jnp.asarray(grad), drawn[path], plan)
        return Factor.gradient(value, plan)

    return paths.unflatten(treedef, {p: one(p, g) for p, g in leaves.items()})


def lift(factors: PyTree, sketches: PyTree, params: PyTree, spec: Spec | int) -> PyTree:
    """Lifts factors to dense deltas: the transpose of ``project``.

    For a left sketch S (dim x rank) and a factor F (rank x cols) this is
    ``scaling * S F``; for a right sketch and F (rows x rank), ``scaling * F S^T``.

    Args:
      factors: Tree of ``Factor``s or factor arrays, or one; other leaves pass.
      sketches: What ``sample_sketch`` gave for ``params``.
      params: The parameters, or their ``ShapeDtypeStruct``s: they fix the views.
      spec: The spec the sketches were drawn with.

    Returns:
      The tree with a dense array for each adapted leaf, ``decay`` left out.

    Raises:
      ValueError: If sketches, factors and parameters do not belong together.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W = jnp.zeros((6, 4))
      >>> S = rl.sample_sketch(W, 2, key=0)
      >>> rl.lift(jnp.ones((2, 6)), S, W, 2).shape
      (6, 4)
    """
    leaves, _ = paths.flatten(params)
    plans = plan_leaves(as_spec(spec), leaves)
    drawn = _matched(sketches, plans)
    values, treedef = paths.flatten(
        factors, is_leaf=lambda node: is_factor(node) or is_both(node)
    )
    for path, value in values.items():
        plan = plans.get(path)
        if plan is None:
            raise ValueError(f"factor {paths.show(path)} has no leaf in params")
        if plan.mode == "lowrank":
            array = value.value if is_factor(value) else value
            check_factor(value, plan)
            values[path] = lift_leaf(array, drawn[path], plan)
    return paths.unflatten(treedef, values)


def _matched(sketches: PyTree, plans: dict[str, LeafPlan]) -> dict[str, Drawn]:
    drawn, _ = paths.flatten(sketches, is_leaf=is_drawn)
    for path, plan in plans.items():
        if plan.mode != "lowrank":
            continue
        got = shapes(drawn[path]) if path in drawn else None
        if got != sketch_shapes(plan):
            raise ValueError(
                f"leaf {paths.show(path)}: expected a sketch of shape "
                f"{sketch_shapes(plan)}, got {got or 'none'}; draw it with sample_sketch "
                "for this tree and this spec"
            )
    return drawn
