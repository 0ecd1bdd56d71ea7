"""One step of each method, its state, and where it stands: the same for every model."""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

import raclora_jax as rl
from raclora_jax import methods, theory

# Of ``Spec``, by method. ``alpha="dim"`` gives both of ours one rate at every rank.
SETTINGS: dict[str, dict[str, Any]] = {
    "raclora-orthogonal": {
        "alpha": "dim",
        "sketch": "block",
        "side": "left",
        "resample_every": 25,
    },
    "raclora-memory": {
        "alpha": "dim",
        "sketch": "block",
        "side": "smaller",
        "resample_every": 25,
    },
    "raclora": {"alpha": "dim", "side": "smaller", "resample_every": 100},
    "lora": {"side": "smaller"},
    "full": {},
}
KEPT = {
    "raclora-orthogonal": "no optimizer state",
    "raclora-memory": "rank x rank numbers a leaf",
    "raclora": "Adam's moments of one factor",
    "lora": "Adam's moments of two factors",
    "full": "Adam's moments of every weight",
}
# By method, a number or a share of the model's width. A full one has none.
RANKS = {"raclora-orthogonal": 1 / 2, "raclora-memory": 1 / 6, "raclora": 16, "lora": 8}
MEMORIES = {"raclora-orthogonal": 0.0, "raclora-memory": 0.8}  # the others have Adam


class Trainer(NamedTuple):
    """A method as three functions of one state.

    Attributes:
      init: ``init(params) -> state``.
      step: ``step(state, *batch) -> (state, loss)``.
      params: ``params(state) -> params``.
      bytes: ``bytes(params) -> int``, of the optimizer's state.
    """

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Array]]
    params: Callable[[Any], Any]
    bytes: Callable[[Any], int]


def rank_said(method: str) -> str:
    """The default rank of a method, in words."""
    rank = RANKS[method]
    return str(rank) if rank >= 1 else f"1/{round(1 / rank)} of the model's width"


def settings(method: str, rank: int | None, width: int) -> dict[str, Any]:
    """The arguments of ``Spec`` for a method, besides its rules.

    Args:
      method: How it trains.
      rank: Asked for, if any.
      width: Of the model.
    """
    default = RANKS.get(method, 1)
    if default < 1:
        default = max(1, round(default * width))
    return {"rank": rank or default} | SETTINGS[method]


def effective(method: str, spec: rl.Spec) -> dict[str, Any]:
    """What of a spec a method goes by, for a config."""
    if method == "full":
        return {}
    if method == "lora":
        return {"rank": spec.rank, "alpha": spec.alpha or spec.rank}
    names = "rank", "alpha", "sketch", "side", "resample_every"
    inner = "orthogonal" if method in MEMORIES else "Adam"
    if memory := MEMORIES.get(method):
        inner += f", memory {memory:g}"
    stated = {name: getattr(spec, name) for name in names}
    return stated | {"alpha": spec.alpha or spec.rank, "inner": inner}


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth, cosine to zero."""
    warm = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(steps, warm + 1))


def spec_of(file: pathlib.Path) -> rl.Spec:
    """A spec in TOML: the arguments of ``Spec``, and tables ``[[rules]]`` of ``Rule``.

    Raises:
      ValueError: If the file is no TOML, or names what there is not.
    """
    try:
        stated = tomllib.loads(file.read_text())
        rules = [rl.Rule(**rule) for rule in stated.pop("rules", [])]
        return rl.Spec(**stated, rules=rules)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def trainer(
    method: str,
    rate: optax.Schedule,
    spec: rl.Spec,
    loss_fn: Any,
    seed: int,
    fused: bool,
) -> Trainer:
    """``raclora``, fused or in factor form, ``lora`` beside the weights, or ``full``."""
    if method.startswith("raclora"):
        memory = MEMORIES.get(method)
        inner = None if memory is None else rl.orthogonal(memory=memory)
        return _raclora(rate, spec, loss_fn, inner, seed, fused)
    made = methods.full(rate)
    if method == "lora":
        made = methods.lora(rate, spec, key=seed)
    return Trainer(
        made.init,
        lambda state, *batch: made.step(state, loss_fn, *batch),
        made.params,
        made.optimizer_bytes,
    )


def _raclora(
    rate: optax.Schedule,
    spec: rl.Spec,
    loss_fn: Any,
    inner: optax.GradientTransformation | None,
    seed: int,
    fused: bool,
) -> Trainer:
    tx = rl.raclora(rate, spec, inner=inner, key=seed)
    grad_fn, fused_step = rl.value_and_grad(loss_fn, spec), rl.fused_step(loss_fn, tx)

    def in_parts(params: Any, opt_state: Any, *batch: Array) -> tuple[Any, Any, Array]:
        loss, grads = grad_fn(params, opt_state, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return rl.apply_updates(params, updates), opt_state, loss

    def step(state: Any, *batch: Array) -> tuple[Any, Array]:
        take = fused_step if fused else in_parts
        params, opt_state, loss = take(*state, *batch)
        return (params, opt_state), loss

    def size(params: Any) -> int:
        kept = jax.eval_shape(tx.init, params).inner_state
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    return Trainer(
        lambda params: (params, tx.init(params)), step, lambda state: state[0], size
    )


def projects(spec: rl.Spec) -> bool:
    """Whether its sketches are projectors, of which one can ask what they hold."""
    laws = (spec.sketch, *(rule.sketch for rule in spec.rules))
    return "gaussian_raw" not in laws


def captured(
    loss_fn: Any, spec: rl.Spec, seed: int
) -> Callable[..., tuple[float, float]]:
    """A function of weights, link and batch that asks what the link's sketches hold.

    It gives the mean share of the gradient and the mean lambda. The gradients are dense,
    of the adapted leaves alone.
    """

    @jax.jit
    def seen(params: Any, link: Array, *batch: Array) -> tuple[Array, Array]:
        leaves = flatten_dict(params, sep="/")
        rows = rl.summary(params, spec).rows
        adapted = {row.path: leaves[row.path] for row in rows if row.mode == "lowrank"}

        def loss(adapted: dict[str, Array]) -> Array:
            return loss_fn(unflatten_dict(leaves | adapted, sep="/"), *batch)

        zeros = jax.tree.map(jnp.zeros_like, leaves)
        grads = unflatten_dict(zeros | jax.grad(loss)(adapted), sep="/")
        sketches = rl.sample_sketch(params, spec, key=seed, link=link)
        found = theory.captured(grads, sketches, spec)
        share, lam = (
            jnp.mean(jnp.stack([jnp.asarray(one) for one in part.values()]))
            for part in (found.share, found.lam)
        )
        return share, lam

    def ask(params: Any, link: int, *batch: Array) -> tuple[float, float]:
        share, lam = seen(params, link, *batch)
        return float(share), float(lam)

    return ask


def moved(before: Any, after: Any) -> dict[str, float]:
    """By leaf, the norm of what training added over the norm of the weights.

    Leaves that began at zero have none.
    """
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        "/".join(str(key.key) for key in keys): float(jnp.linalg.norm(new - old) / norm)
        for (keys, old), new in pairs
        if (norm := float(jnp.linalg.norm(old)))
    }
