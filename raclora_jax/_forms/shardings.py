"""Where a run's arrays live on a mesh: the shardings of its state and of its factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from raclora_jax._chain.start import tell_lacking
from raclora_jax._core import paths
from raclora_jax._core.plan import LeafPlan, with_sharding
from raclora_jax._core.planning import plan_tree
from raclora_jax._core.sharding import as_explicit, explicit_mesh, mesh_of, on_mesh
from raclora_jax._core.sides import of_factors
from raclora_jax._core.spec import Spec
from raclora_jax._core.types import Leaves, PyTree


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """How every array of an optimizer state is sharded, for ``jit``'s ``out_shardings``.

    A factor, a sketch or a moment keeps the mesh axes of the leaf's axes that it has. The
    mesh axes of those that it lost, because that side is sketched or summed, go to an
    axis of it that they divide: an unsharded one before others, the longest first, and
    each by itself where a tuple of them fits nowhere. ``tx.init`` called on sharded
    arrays makes the state so. Under ``jit`` it does on explicit meshes; automatic axes
    are not known there, and these shardings are what to ask for. Counters and key are on
    every device.

    Args:
      tx: Any optax transformation, of which ``raclora`` may be a part.
      params: The parameters on a mesh, or their ``ShapeDtypeStruct``s with shardings.
        Leaves without one count as replicated.

    Returns:
      A ``NamedSharding`` for each array of ``tx.init(params)``, in its tree.

    Raises:
      ValueError: If no leaf is on a mesh, or leaves are on different ones.

    Warns:
      UserWarning: If mesh axes of a leaf divide no axis of its factor or its sketch; the
        array is then held in full along them.

    Example:
      >>> import jax, raclora_jax as rl
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), (AxisType.Explicit,))
      >>> place = NamedSharding(mesh, PartitionSpec("fsdp", None))
      >>> W = jax.ShapeDtypeStruct((6, 4), "float32", sharding=place)
      >>> found = state_shardings(rl.raclora(0.1, 2, key=0), W)
      >>> [*found.sketches.values[""].spec], [*found.inner_state.lowrank.mu[""].spec]
      ([None, 'fsdp'], [None, 'fsdp'])
    """
    leaves, treedef, places = _places(params, "state_shardings")
    mesh = mesh_of(places)
    assert mesh is not None
    shapes = {
        path: jax.ShapeDtypeStruct(
            jnp.shape(leaf), jnp.result_type(leaf), sharding=as_explicit(places[path])
        )
        for path, leaf in leaves.items()
    }
    # On explicit axes a sharding is part of a type, so that shapes alone tell where init
    # puts its arrays; on auto axes only a compiled program tells.
    with jax.sharding.use_abstract_mesh(explicit_mesh(mesh)):
        state = jax.eval_shape(tx.init, paths.unflatten(treedef, shapes))
    return jax.tree.map(lambda leaf: on_mesh(leaf, mesh), state)


def factor_shardings(params: PyTree, spec: Spec | int) -> PyTree:
    """How what is trained is sharded: the factors of ``init_adapter``, or gradients.

    By the rules of ``state_shardings``.

    Args:
      params: As in ``state_shardings``.
      spec: The spec of the run.

    Returns:
      The tree of ``params`` with the ``NamedSharding`` of the factor for each adapted
      leaf (a pair ``left``, ``right`` where its side is drawn), the leaf's own for each
      one trained in full, and ``optax.MaskedNode()`` for frozen ones.

    Raises:
      ValueError: As ``state_shardings``, or if the spec does not fit.

    Warns:
      UserWarning: As ``state_shardings``.

    Example:
      >>> import jax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), (AxisType.Auto,))
      >>> place = NamedSharding(mesh, PartitionSpec("fsdp", None))
      >>> params = {"kernel": jax.device_put(jax.numpy.ones((4, 6)), place)}
      >>> [*factor_shardings(params, 2)["kernel"].spec]
      [None, 'fsdp']
    """
    leaves, treedef, places = _places(params, "factor_shardings")
    plans = {
        path: with_sharding(plan, places[path])
        for path, plan in plan_tree(spec, params).items()
    }
    tell_lacking(plans.values())

    def one(plan: LeafPlan) -> PyTree:
        found = of_factors(plan, lambda one: one.trained_sharding)
        return optax.MaskedNode() if found is None else found

    return paths.unflatten(treedef, {path: one(plans[path]) for path in leaves})


def _places(params: PyTree, name: str) -> tuple[Leaves, Any, dict[str, NamedSharding]]:
    """The leaves, their tree, and where each is; replicated if it does not say."""
    leaves, treedef = paths.flatten(params)
    said = {path: getattr(leaf, "sharding", None) for path, leaf in leaves.items()}
    places = {p: s for p, s in said.items() if isinstance(s, NamedSharding)}
    mesh = mesh_of(places)
    if mesh is None:
        raise ValueError(
            f"{name} needs params on a mesh of devices, but none of the {len(leaves)} "
            "leaves has a NamedSharding on one; put them there with jax.device_put, or "
            "pass ShapeDtypeStructs with sharding=NamedSharding(...)"
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return leaves, treedef, {path: places.get(path, everywhere) for path in leaves}
