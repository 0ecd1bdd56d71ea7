"""A step of a run in the adapter form as a message, and what it makes of the run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from raclora_jax._core import checks, paths
from raclora_jax._core.digest import digests
from raclora_jax._core.keys import step_keys
from raclora_jax._core.sides import named
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaf, Leaves, PyTree
from raclora_jax._forms.link_end import placed
from raclora_jax.follow._adapted import Adapted, check_adapted, next_link, weights_of
from raclora_jax.follow._checks import check_key, check_outside
from raclora_jax.follow._exact import numbers_of
from raclora_jax.follow._message import Message, Part, check_weights
from raclora_jax.follow._numbers import NUMBERS, Numbers, packed
from raclora_jax.follow._position import Position


def encode_adapter(
    run: Adapted,
    factors: PyTree,
    position: Position,
    spec: Spec | int,
    *,
    numbers: Numbers = "float32",
) -> bytes:
    """A step of a run in the adapter form as a message.

    It holds the factors after the step, ``rank x n`` numbers for each adapted leaf, and
    the differences of leaves trained in full; those that are zero cost no number. The
    first message of a link also has the digests of its weights, codes, scales and errors.
    The trainer takes its factors from the message too, with ``apply``: what is rounded
    is then rounded for all alike.

    Args:
      run: The run before the step.
      factors: The trained tree after it.
      position: Where the run stands.
      spec: The spec of the run.
      numbers: Dtype of the numbers of a factor, as in ``encode``; differences of leaves
        trained in full are sent in float32.

    Returns:
      The message.

    Raises:
      ValueError: If run, factors, spec and position do not belong together, a number is
        not finite, or a factor has 64 bits.
      TypeError: If it is called inside ``jit``.

    Example:
      >>> import jax.numpy as jnp, raclora_jax as rl
      >>> run = rl.follow.begin({"kernel": jnp.ones((6, 4))}, 2, key=0)
      >>> position = rl.follow.start(run, key=0)
      >>> factors = {"kernel": run.factors["kernel"] + 0.1}  # stands for training
      >>> message = encode_adapter(run, factors, position, 2)
      >>> follower, _ = rl.follow.apply(run, message, position)
      >>> bool((follower.factors["kernel"] == factors["kernel"]).all())
      True
    """
    checks.choice("numbers", numbers, NUMBERS)
    spec = as_spec(spec)
    check_outside((run, factors))
    check_key(run.chain.key_data, position, "the chain of the run")
    check_adapted(run, spec)
    plans = check_adapted(run._replace(factors=factors), spec)
    found, _ = paths.flatten(factors)
    sides = {name: one for plan in plans.values() for name, one in named(plan).items()}
    keys = step_keys(run.chain.key_data, "message", found, position.step)
    packs = {}
    for path, value in found.items():
        if value.dtype != jnp.float32:
            raise ValueError(
                f"leaf {paths.show(path)}: expected a factor of float32, got "
                f"{value.dtype}; a message holds at most 32 bits a number: train it in "
                "float32"
            )
        # Scaled by one and without its path, so that leaves of one kind share a program.
        plan = dataclasses.replace(sides[path], path="", sharding=None, scaling=1.0)
        packs[path] = packed(
            value, keys[path], plan, numbers if plan.adapted else "float32"
        )
    # Factors are zero where a link begins, and nowhere else unless nothing has moved.
    moved = [jnp.any(leaf) for leaf in jax.tree.leaves(run.factors)]
    sent, moved = jax.device_get((packs, moved))
    begins = not any(moved)
    parts = {}
    for path, one in sent.items():
        if not one.finite:
            raise ValueError(
                f"leaf {paths.show(path)}: expected finite numbers, got a factor with "
                "others; leave such steps out, as optax.apply_if_finite does"
            )
        if one.moves:
            parts[path] = Part("trained", "float32", one.numbers, one.scales)
    return Message(
        *position,
        link=int(run.chain.link),
        parts=parts,
        weights=digests(weights_of(run)) if begins else None,
        before=True,
        adapter=True,
        spec=spec.to_json() if begins else None,
    ).to_bytes()


def trained(run: Adapted, message: Message, position: Position) -> Adapted:
    """The run after a message, of which ``check_next`` and ``check_form`` know.

    Raises:
      ValueError: If the message does not fit the run, or begins a link with other bits
        than the run has.
    """
    check_key(run.chain.key_data, position, "the chain of the run")
    check_link(run, message, may_end=message.spec is not None)
    found, treedef = paths.flatten(run.factors)
    for path, part in message.parts.items():
        _check_fits(path, part, found)
    if message.spec is not None:
        spec = Spec.from_json(message.spec)
        check_adapted(run, spec)
        if message.link > int(run.chain.link):
            run = next_link(run, spec)
        check_weights(digests(weights_of(run)), message)

    def taken(path: str, old: Leaf) -> Leaf:
        part = message.parts.get(path)
        if part is None:
            return jnp.zeros_like(old)
        return placed(numbers_of(part.numbers, part.scales), old)

    new = {path: taken(path, old) for path, old in found.items()}
    return run._replace(factors=paths.unflatten(treedef, new))


def check_form(params: PyTree, message: Message) -> None:
    """Refuses weights for a run in the adapter form, and the reverse."""
    if message.adapter == isinstance(params, Adapted):
        return
    names = ["weights", "a run in the adapter form (follow.Adapted)"]
    raise ValueError(
        f"this message is of {names[message.adapter]}: expected that, got "
        f"{names[not message.adapter]}; make what follows as the trainer does, with "
        "follow.begin in the adapter form"
    )


def check_link(run: Adapted, message: Message, *, may_end: bool = False) -> None:
    """Refuses a run in another link than a message, unless that ends the run's."""
    link = int(run.chain.link)
    expected = [link, link + 1] if may_end else [link]
    if message.link not in expected:
        raise ValueError(
            f"the message of step {message.step} is of link {message.link}: expected "
            f"link {' or '.join(map(str, expected))}, where the run stands; begin it "
            "with the weights of that link and its number: follow.begin(..., link=)"
        )


def _check_fits(path: str, part: Part, factors: Leaves) -> None:
    """Refuses a part that is not of a factor of the run."""
    where = f"leaf {paths.show(path)}"
    if path not in factors:
        raise ValueError(
            f"{where} of the message is none that this run trains; expected the tree and "
            "the spec that the trainer has"
        )
    wanted = jnp.shape(factors[path])
    if part.kind != "trained" or part.numbers.shape != wanted:
        raise ValueError(
            f"{where}: expected a factor of shape {wanted}, got {part.kind} numbers of "
            f"shape {part.numbers.shape}; begin with the spec that the trainer has"
        )
