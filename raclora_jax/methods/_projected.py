"""Methods that form the dense gradient and keep their state in a low-rank basis.

GaLore, GoLore, Fira, APOLLO and Flora. The basis has the shape of the plan's sketch and
what is kept in it that of the factor, so projecting and lifting are the library's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._chain.inner import as_rule, check_inner, in_bases, knowing
from raclora_jax._core import paths
from raclora_jax._core.lowrank import change_of_basis, lift_leaf, project_leaf
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sketch import draw_all
from raclora_jax._core.spec import Spec, as_spec, check_side_is_fixed
from raclora_jax._core.types import RANK, Leaves, PyTree
from raclora_jax.methods._method import Method, from_transform

Plans = dict[str, LeafPlan]
# Dense gradients, plans and the count of steps to ``{path: basis}``.
Choose = Callable[[Leaves, Plans, Array], dict[str, Array]]
# Plan, dense gradient, its coordinates, what the rule made of them, basis to a direction.
Beyond = Callable[[LeafPlan, Array, Array, Array, Array], Array]

_GROWTH = 1.01  # times its last norm: the longest that a term beyond the basis may be
EPSILON = 1e-8  # beside norms, as the papers' code has it


class ProjectedState(NamedTuple):
    """State of a method that steps in a basis; every dict is keyed by path.

    Attributes:
      basis: Arrays of ``plan.sketch_shape``, with orthonormal rows where they are stored.
      inner: State of the inner rule.
      norms: Scalars, the last norms of what a method adds beyond the basis.
      count: int32 scalar, steps taken.
    """

    basis: dict[str, Array]
    inner: Any
    norms: dict[str, Array]
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def projected_method(
    learning_rate: optax.ScalarOrSchedule,
    spec: Spec,
    *,
    inner: optax.GradientTransformation | None,
    choose: Choose,
    transport: bool = False,
    stored: bool = True,
    lifts: bool = True,
    beyond: Beyond | None = None,
) -> Method:
    """A method with the step ``W <- W - lr * (scaling * P inner(P^T G) + beyond)``.

    Args:
      learning_rate: A float or a schedule.
      spec: Which leaves, ranks and scaling, and the steps a basis lives.
      inner: Preconditioner without learning rate; Adam by default.
      choose: What gives the basis, called every ``spec.resample_every`` steps.
      transport: Whether first moments are re-expressed in a new basis.
      stored: Whether the basis is kept, or chosen again from the count in every step.
      lifts: Whether the first term is taken at all.
      beyond: The second term, if any. Its norm grows by a factor of 1.01 a step at most.

    Returns:
      A ``Method``.
    """
    if inner is not None:
        check_inner(inner)
    rule = as_rule(optax.scale_by_adam() if inner is None else inner)

    def init(params: PyTree) -> ProjectedState:
        plans = basis_plans(spec, params)
        adapted = {path: plan for path, plan in plans.items() if plan.adapted}
        basis = {
            path: jnp.zeros(plan.sketch_shape, plan.wide_dtype)
            for path, plan in adapted.items()
            if stored
        }
        norms = {
            path: jnp.zeros(plan.batch_shape, plan.wide_dtype)
            for path, plan in adapted.items()
            if beyond is not None
        }
        stepped = {
            path: jnp.zeros(plan.trained_shape, plan.wide_dtype)
            for path, plan in plans.items()
            if plan.mode != "frozen"
        }
        with knowing(plans):
            inner = rule.init(stepped)
        return ProjectedState(basis, inner, norms, jnp.zeros((), jnp.int32))

    def renewed(grads: Leaves, state: ProjectedState, plans: Plans) -> ProjectedState:
        basis = choose(grads, plans, state.count)
        if not transport:
            return state._replace(basis=basis)
        bases = {
            path: change_of_basis(basis[path], old, plans[path])
            for path, old in state.basis.items()
        }
        return state._replace(basis=basis, inner=in_bases(state.inner, bases, plans))

    def update(
        grads: PyTree, state: ProjectedState, params: PyTree = None
    ) -> tuple[PyTree, ProjectedState]:
        del params
        plans = basis_plans(spec, grads)
        leaves, treedef = paths.flatten(grads)
        begins = state.count % spec.resample_every == 0
        # A branch and not a select: an SVD of every leaf is for the first step of a link.
        if stored:
            state = lax.cond(begins, lambda: renewed(leaves, state, plans), lambda: state)
        basis = state.basis if stored else choose(leaves, plans, state.count)
        coordinates = {
            path: seen_in(basis, leaves[path], plan)
            for path, plan in plans.items()
            if plan.mode != "frozen"
        }
        with knowing(plans):
            moved, inner = rule.update(coordinates, state.inner, None, plans=plans)

        updates, norms = jax.tree.map(jnp.zeros_like, leaves), {}
        for path, step in moved.items():
            plan = plans[path]
            if not plan.adapted:
                updates[path] = step
                continue
            terms = [lift_leaf(step, basis[path], plan)] if lifts else []
            if beyond is not None:
                dense = leaves[path].astype(plan.wide_dtype)
                term = beyond(plan, dense, coordinates[path], step, basis[path])
                last = state.norms[path]
                term, norms[path] = _limited(plan, term, last, state.count)
                terms.append(term)
            updates[path] = functools.reduce(operator.add, terms)
        count = optax.safe_increment(state.count)
        after = ProjectedState(state.basis, inner, norms, count)
        return paths.unflatten(treedef, updates), after

    def trained(params: PyTree) -> int:
        plans = basis_plans(spec, params).values()
        if beyond is None:
            return sum(plan.trained_size for plan in plans)
        return size_of_moved(plans)

    tx = optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )
    return from_transform(
        tx,
        trained=trained,
        moments=lambda opt_state: opt_state[0][:3],
    )


def _limited(
    plan: LeafPlan, term: Array, last: Array, count: Array
) -> tuple[Array, Array]:
    """Each matrix no longer than 1.01 times what it was, and its new norm."""
    axes = (*plan.rows, *plan.cols)
    norm = jnp.sqrt(jnp.sum(term**2, axes))
    longest = jnp.where(count == 0, norm, _GROWTH * (last + EPSILON))
    share = jnp.minimum(1, longest / jnp.maximum(norm, EPSILON))
    return term * jnp.expand_dims(share, axes), jnp.minimum(norm, longest)


def ratio(
    plan: LeafPlan, direction: Array, coordinates: Array, axes: tuple[int, ...] = ()
) -> Array:
    """``|direction| / |coordinates|``, laid out to meet the leaf.

    Args:
      plan: Plan of the leaf.
      direction: Array of ``plan.factor_shape``.
      coordinates: Likewise.
      axes: The axes of the other side that norms run over beside the rank.

    Returns:
      Array that broadcasts against the leaf.
    """
    summed = tuple(plan.factor_axes.index(axis) for axis in (RANK, *axes))
    above, below = (
        jnp.sqrt(jnp.sum(array**2, summed, keepdims=True))
        for array in (direction, coordinates)
    )
    share = jnp.squeeze(above / (below + EPSILON), plan.factor_axes.index(RANK))
    held = (*plan.batch, *plan.kept_axes)
    share = jnp.transpose(share, [held.index(axis) for axis in sorted(held)])
    return jnp.expand_dims(share, plan.sketched_axes)


def size_of_moved(plans: Iterable[LeafPlan]) -> int:
    """Numbers of the leaves that are not frozen."""
    return sum(math.prod(plan.shape) for plan in plans if plan.mode != "frozen")


def of_one_side(spec: Spec | int) -> Spec:
    """The spec, refused where it draws the side: moments live on one side for good."""
    spec = as_spec(spec)
    check_side_is_fixed(
        spec, "the moments of this method, unlike those of methods.raclora, stay on one"
    )
    return spec


def basis_plans(spec: Spec, tree: PyTree) -> Plans:
    """The plans of a tree, each with a basis that is an array.

    These methods are about the smaller side, where the spec leaves it to them.
    """
    if spec.side == "auto":
        spec = dataclasses.replace(spec, side="smaller")
    plans = plan_tree(spec, tree)
    for plan in plans.values():
        other = plan.size_of(plan.kept_axes)
        if plan.adapted and plan.rank > other:
            raise ValueError(
                f"leaf {paths.show(plan.path)} of shape {plan.shape}: a basis of rank "
                f"{plan.rank} has more directions than the {other} numbers beside it; "
                "lower the rank, or take side='smaller'"
            )
    return {p: dataclasses.replace(plan, law="") for p, plan in plans.items()}


def seen_in(basis: dict[str, Array], dense: Array, plan: LeafPlan) -> Array:
    """What the inner rule is given of a leaf: its coordinates, or the whole of it."""
    if not plan.adapted:
        return dense.astype(plan.wide_dtype)
    # Scaling once, on the way back: the step is scaling P inner(P^T G).
    return project_leaf(dense, basis[plan.path], dataclasses.replace(plan, scaling=1.0))


def top_directions(grads: Leaves, plans: Plans) -> dict[str, Array]:
    """The leading singular vectors of each gradient on its sketched side.

    Args:
      grads: ``{path: dense gradient}``.
      plans: ``{path: LeafPlan}``.

    Returns:
      ``{path: array of plan.sketch_shape}`` for the adapted leaves.
    """

    def of(gradient: Array, plan: LeafPlan) -> Array:
        order = (*plan.batch, *plan.sketched_axes, *plan.kept_axes)
        matrix = jnp.transpose(gradient.astype(plan.wide_dtype), order)
        matrix = matrix.reshape(*plan.batch_shape, plan.dim, -1)
        left, _, _ = jnp.linalg.svd(matrix, full_matrices=False)
        return left[..., : plan.rank].mT.reshape(plan.sketch_shape)

    return {path: of(grads[path], plan) for path, plan in plans.items() if plan.adapted}


def drawn_directions(
    data: Array, link: Array | int, plans: Plans, law: str
) -> dict[str, Array]:
    """A random basis for each adapted leaf, a pure function of key, path and link."""
    lawful = (dataclasses.replace(plan, law=law) for plan in plans.values())
    return dict(draw_all(data, link, lawful))


def unit_projections(data: Array, link: Array | int, plans: Plans) -> dict[str, Array]:
    """Entries N(0, 1 / rank), so that the mean of ``A^T A`` is the identity."""
    drawn = drawn_directions(data, link, plans, "gaussian_raw")
    return {path: a / math.sqrt(plans[path].rank) for path, a in drawn.items()}
