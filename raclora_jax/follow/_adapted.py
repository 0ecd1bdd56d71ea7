"""A run in the adapter form, as trainer and followers hold it alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from raclora_jax._core import checks, paths
from raclora_jax._core.plan import LeafPlan
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import KeyLike, Leaves, PyTree
from raclora_jax._forms import link_end
from raclora_jax._forms.adapter import AdapterChain, init_adapter, is_quantised, matched


class Adapted(NamedTuple):
    """A run in the adapter form: arrays only.

    Attributes:
      base_params: The weights of the link, quantised or not.
      error: The carried errors of quantised leaves, as of ``quantized.quantize``;
        ``None`` where no leaf is quantised.
      factors: The trained tree.
      chain: Where the chain stands.

    Example:
      >>> import jax.numpy as jnp
      >>> begin({"kernel": jnp.ones((6, 4))}, 2, key=0).factors["kernel"].shape
      (2, 6)
    """

    base_params: Any
    error: Any
    factors: Any
    chain: AdapterChain


def begin(
    base_params: PyTree,
    spec: Spec | int,
    *,
    key: KeyLike,
    error: PyTree = None,
    link: int = 0,
) -> Adapted:
    """A run in the adapter form at the beginning of a link.

    As ``raclora_jax.init_adapter``, with sketches that are drawn by one program on one
    device, so that they are the same on every mesh.

    Args:
      base_params: The weights that the link begins with, quantised or not.
      spec: A ``Spec`` or a rank.
      key: Typed threefry key, raw key data, or int seed.
      error: What ``quantized.quantize`` or ``zero_error`` gave beside them.
      link: The link, where the weights are those of a later one, such as
        ``ChainLog.rebuild`` gives.

    Returns:
      The run.

    Raises:
      ValueError: If the spec does not fit, or base and error do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> int(begin({"kernel": jnp.ones((6, 4))}, 2, key=0, link=3).chain.link)
      3
    """
    checks.count("link", link, least=0)
    spec = as_spec(spec)
    factors, chain = init_adapter(base_params, spec, key=key)
    chain = chain._replace(link=jnp.full((), link, jnp.int32))
    run = Adapted(base_params, error, factors, chain)
    plans = check_adapted(run, spec)
    return run._replace(chain=link_end.with_sketches(chain, plans, spec))


def next_link(run: Adapted, spec: Spec | int) -> Adapted:
    """Ends a link as followers do: the same bits on every mesh of one kind of device.

    ``raclora_jax.next_link`` or ``quantized.next_link``, each leaf by a program of its
    own that runs on one device. The trainer calls it where a link ends; a follower has
    ``apply`` do it when the first message of the next link comes.

    Args:
      run: The run, with the factors that the link has trained.
      spec: The spec of the run.

    Returns:
      The run at the beginning of the next link, each array where it was.

    Raises:
      ValueError: If base, error, factors, chain and spec do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> run = begin({"kernel": jnp.ones((6, 4))}, 2, key=0)
      >>> int(next_link(run, 2).chain.link)
      1
    """
    spec = as_spec(spec)
    check_adapted(run, spec)
    base, error, factors, chain = run
    if not _any_quantised(base):  # which needs no qwix
        base, *rest = link_end.link_end([base], factors, chain, spec)
        return Adapted(base, error, *rest)
    from raclora_jax.quantized._merge import compiled_merge

    return Adapted(
        *link_end.link_end([base, error], factors, chain, spec, compiled_merge)
    )


def check_adapted(run: Adapted, spec: Spec) -> dict[str, LeafPlan]:
    """The plans of a run whose base, error, factors and chain belong together."""
    found = matched(run.base_params, run.factors, run.chain, spec)
    if _any_quantised(run.base_params):
        from raclora_jax.quantized._codes import matched as matched_errors

        matched_errors(run.error, found.leaves, found.plans)
    elif jax.tree.leaves(run.error):
        raise ValueError(
            "expected no error, since no leaf of base_params is quantised, got one of "
            f"{len(jax.tree.leaves(run.error))} arrays; hand over both of what "
            "quantized.quantize returned, or leave error out"
        )
    return found.plans


def weights_of(params: PyTree) -> Leaves:
    """The leaves that tell a run: weights, or base and errors in the adapter form."""
    if isinstance(params, Adapted):
        held = {"base_params": params.base_params, "error": params.error}
        return paths.flatten(held)[0]
    return paths.flatten(params)[0]


def _any_quantised(tree: PyTree) -> bool:
    return any(map(is_quantised, jax.tree.leaves(tree, is_leaf=is_quantised)))
