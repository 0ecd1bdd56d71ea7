"""What a link's sketches hold of the gradient, against what their law promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from raclora_jax._core import paths
from raclora_jax._core.factor import check_factor, is_factor
from raclora_jax._core.keys import key_data, leaf_key
from raclora_jax._core.lowrank import formed
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.sides import is_drawn
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike, Leaf, PyTree
from raclora_jax._forms.gradient import grad
from raclora_jax._forms.optimizer import scale_by_raclora
from raclora_jax._forms.pure import project
from raclora_jax.theory._lambda import projector_plans

# Laws that know no direction at all.


class Captured(NamedTuple):
    """Of the gradient at the start of a link, what its sketches hold.

    Attributes:
      energy: Scalar, the squared norm of all that is trained: of every factor's gradient
        and of the gradients of leaves trained in full.
      share: ``{path: |H G|^2 / |G|^2}`` of every adapted leaf. In factor form, where
        ``|G|`` is not known, a number of the same mean; see ``captured_by_probe``.
      lam: ``{path: lambda}``, the mean of a share if the law is what it says.
      variance: ``{path: variance}`` of the share about lambda, given the gradient.
    """

    energy: Array
    share: dict[str, Array]
    lam: dict[str, Array]
    variance: dict[str, Array]


def captured(grads: PyTree, sketches: PyTree, spec: Spec | int) -> Captured:
    """What the sketches of a link hold of a dense gradient.

    The variance of a share is exact for the gradient at hand. With ``M = G G^T / |G|^2``
    on the sketched side, d = dim, r = rank and ``a = sum_i H_ii^2``, any law that is
    blind to the order and the signs of the axes has, given a,

      ``2 (r - a) / (d (d - 1)) (tr M^2 - sum_i M_ii^2)
      + (a - r^2 / d) / (d - 1) (sum_i M_ii^2 - 1 / d)``

    (our derivation; all laws but ``"block"``, whose places are few and are gone through).

    Args:
      grads: Dense gradients at the start of the link, of the loss to be certified.
      sketches: The sketches that the link trains with: ``state.sketches.values`` of the
        run, or what ``sample_sketch`` gives for its key and link.
      spec: The spec of the run.

    Returns:
      ``Captured``, to be kept until the link ends.

    Raises:
      ValueError: If the trees do not belong together, or a sketch is no projector.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W = jnp.ones((6, 4))
      >>> seen = captured(W, rl.sample_sketch(W, 2, key=0), 2)
      >>> float(seen.lam[""]), bool(0 < seen.share[""] < 1)
      (0.5, True)
    """
    spec = as_spec(spec)
    plans = projector_plans(grads, spec)
    leaves, treedef = paths.flatten(grads)
    drawn, _ = paths.flatten(sketches, is_leaf=is_drawn)
    peaks = {path: jnp.max(jnp.abs(leaf)) for path, leaf in leaves.items()}
    safe = {path: jnp.where(peak == 0, 1, peak) for path, peak in peaks.items()}
    # Of size 1 at most, so that squares of squares stay in range.
    scaled = {path: leaf / safe[path] for path, leaf in leaves.items()}
    tree = paths.unflatten(treedef, scaled)
    by_path = {path: sketch for path, sketch in drawn.items() if path in plans}
    wanted = {path: by_path.get(path, optax.MaskedNode()) for path in leaves}
    factors, _ = paths.flatten(
        project(tree, paths.unflatten(treedef, wanted), spec), is_leaf=is_factor
    )
    energy = jnp.zeros(())
    share: dict[str, Array] = {}
    variance: dict[str, Array] = {}
    for path, factor in factors.items():
        held = _energy(factor)
        energy = energy + held * safe[path] ** 2
        if path in plans:
            plan, dense = plans[path], scaled[path].astype(plans[path].wide_dtype)
            total = jnp.sum(dense**2)
            none = total == 0
            total = jnp.where(none, 1, total)
            part = held / plan.scaling**2 / total
            # A gradient of zero says nothing of its sketch: at lambda its excess is zero.
            share[path] = jnp.where(none, plan.lam, part)
            spread = _variance(dense / jnp.sqrt(total), by_path[path], plan)
            variance[path] = spread + _rounding(plan)
    return Captured(energy, share, _lam(plans), variance)


def captured_by_probe(
    factors: PyTree, probed: PyTree, params: PyTree, spec: Spec | int
) -> Captured:
    """What the sketches of a link hold, beside what independent ones of their law hold.

    With ``h = |S G|^2`` of the link and ``k = |Q G|^2`` of the probe, the difference
    ``y = (h - k) / (h + k)`` changes its sign when both trade places, so its mean is zero
    whatever G is. The share is given as ``lambda (1 + y)``. Its variance is
    ``lambda^2 / (rank + 1)`` at most for orthonormal sketches, reached by a gradient of
    rank 1 on a long side; for other laws ``lambda^2 y^2``, which makes the score of
    ``certify`` a self-normalised sum of symmetric numbers. Our derivation.

    Args:
      factors: Gradients in factor form at the start of the link, from
        ``raclora_jax.value_and_grad`` or, in the adapter form, at zero factors.
      probed: The same from ``probe``, on the same data.
      params: The weights; shapes are enough.
      spec: The spec of the run.

    Returns:
      ``Captured``, to be kept until the link ends.

    Raises:
      ValueError: If the trees do not belong together, or a sketch is no projector.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> W = G = jnp.ones((6, 4))
      >>> one, other = (rl.project(G, rl.sample_sketch(W, 2, key=k), 2) for k in (0, 1))
      >>> seen = captured_by_probe(one, other, W, 2)
      >>> bool(0 <= seen.share[""] <= 2 * seen.lam[""])
      True
    """
    plans = projector_plans(params, spec)
    leaves, _ = paths.flatten(factors, is_leaf=is_factor)
    others, _ = paths.flatten(probed, is_leaf=is_factor)
    energy = jnp.zeros(())
    share: dict[str, Array] = {}
    variance: dict[str, Array] = {}
    for path in plans:
        for name, tree in (("factors", leaves), ("probed", others)):
            if path not in tree:
                raise ValueError(
                    f"leaf {paths.show(path)} is adapted in this spec but has no entry "
                    f"in {name}; hand over the gradients of value_and_grad and probe"
                )
            check_factor(tree[path], plans[path])
    for path, leaf in leaves.items():
        peak = jnp.max(jnp.abs(_array(leaf)))
        if path in plans:
            peak = jnp.maximum(peak, jnp.max(jnp.abs(_array(others[path]))))
        safe = jnp.where(peak == 0, 1, peak)
        held = jnp.sum((_array(leaf) / safe) ** 2)
        energy = energy + held * safe**2
        if path in plans:
            plan = plans[path]
            beside = jnp.sum((_array(others[path]) / safe) ** 2)
            both = held + beside
            y = (held - beside) / jnp.where(both == 0, 1, both)
            haar = plan.law == "orthonormal"
            spread = jnp.full_like(y, 1 / (plan.rank + 1)) if haar else y**2
            share[path] = plan.lam * (1 + y)
            variance[path] = plan.lam**2 * spread + _rounding(plan)
    return Captured(energy, share, _lam(plans), variance)


def probe(
    loss_fn: Callable[..., Any], spec: Spec | int, *, key: KeyLike
) -> Callable[..., Any]:
    """Gradients in factor coordinates of sketches that the run does not use.

    Args:
      loss_fn: ``loss_fn(params, *args)``, the loss of the run.
      spec: The spec of the run.
      key: Typed threefry key, raw key data, or int seed; the run's own will do, because
        probes are drawn in a domain of their own.

    Returns:
      ``function(params, link, *args)`` that returns what ``raclora_jax.grad`` would, for
      sketches of the same law that are independent of the run's and of other links'. It
      costs one backward pass; call it once a link.

    Example:
      >>> import jax.numpy as jnp
      >>> W, x = jnp.zeros((6, 4)), jnp.ones((3, 6))
      >>> function = probe(lambda W, x: jnp.sum((x @ W - 1) ** 2), 2, key=0)
      >>> function(W, 0, x).value.shape
      (2, 6)
    """
    spec = as_spec(spec)
    domain = leaf_key(key_data(key), "probe", "")
    factor_grad = grad(loss_fn, spec)

    def compute(params: PyTree, link: Array | int, *args: Any) -> PyTree:
        own = jax.random.fold_in(domain, link)
        state = scale_by_raclora(spec, inner=optax.identity(), key=own).init(params)
        return factor_grad(params, state, *args)

    return compute


def _variance(unit: Array, sketch: Array, plan: LeafPlan) -> Array:
    """Of the share, given a gradient of norm 1."""
    stack = len(plan.batch)
    order = (*plan.batch, *plan.sketched_axes, *plan.kept_axes)
    laid = lax.transpose(unit, order)
    ends = tuple(range(stack + len(plan.sketched_axes), unit.ndim))
    weights = jnp.sum(laid**2, axis=ends)
    if plan.law == "block":
        return _over_places(weights, plan)
    d, r = plan.dim, plan.rank
    middle = tuple(range(stack, stack + len(plan.sketched_axes)))
    # |G^T G| = |G G^T|, and the smaller product is the cheaper one.
    contracted = ends if d <= plan.size_of(plan.kept_axes) else middle
    batch = tuple(range(stack))
    gram = lax.dot_general(
        laid, laid, ((contracted, contracted), (batch, batch)), precision="highest"
    )
    whole = jnp.sum(gram**2, axis=tuple(range(stack, gram.ndim)))
    own = jnp.sum(weights**2, axis=middle)
    even = jnp.sum(weights, axis=middle) ** 2 / d
    # P = S^T S is a projector: |P|^2 = tr P = r. So r - a is the sum of squares off its
    # diagonal, where it has d (d - 1) places.
    diagonal = jnp.sum(formed(sketch, plan) ** 2, axis=stack)
    a = jnp.sum(diagonal**2, axis=middle)
    apart = 2 * (r - a) / (d * (d - 1)) * (whole - own)
    along = (a - r**2 / d) / (d - 1) * (own - even)
    return jnp.maximum(jnp.sum(apart + along), 0)


def _over_places(weights: Array, plan: LeafPlan) -> Array:
    """The variance of a block's share over all the places it may have."""
    chosen = plan.selection
    assert chosen is not None
    if chosen.sliced:
        places = jnp.arange(chosen.blocks) * (chosen.rank // chosen.runs)
    else:
        places = jnp.arange(chosen.dim)
    rows = jax.vmap(chosen.rows)(places.astype(jnp.int32))
    flat = weights.reshape(*weights.shape[: len(plan.batch)], plan.dim)
    shares = jnp.sum(jnp.take(flat, rows, axis=-1), axis=-1)
    return jnp.sum(jnp.var(shares, axis=-1))


def _energy(leaf: Leaf) -> Array:
    return jnp.sum(jnp.square(_array(leaf)))


def _array(leaf: Leaf) -> Array:
    array = jnp.asarray(leaf.value if is_factor(leaf) else leaf)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _lam(plans: dict[str, LeafPlan]) -> dict[str, Array]:
    return {p: jnp.asarray(plan.lam, plan.wide_dtype) for p, plan in plans.items()}


def _rounding(plan: LeafPlan) -> float:
    """Square of what a share may be off by, so that a variance of zero is no oracle."""
    return float((64 * jnp.finfo(plan.wide_dtype).eps) ** 2)
