"""What every method of the field must pass: one table, and the checks as functions.

To add a method, give it a row in ``ROWS``. ``make(learning_rate, spec, key)`` builds it
for the problem below; the checks know nothing else of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import compiled_once

import raclora_jax as rl
from raclora_jax import methods
from raclora_jax._chain.state import find_state

RULES = [rl.Rule("stack", batch=(0,)), rl.Rule("offset", mode="frozen")]
SPEC = rl.Spec(2, alpha=2.0, resample_every=4, rules=RULES)
ONES = rl.Spec(1, resample_every=4, rules=RULES)
STEPS = 24


class Row(NamedTuple):
    """One method of the table.

    Attributes:
      make: ``make(learning_rate, spec, key) -> Method``.
      learning_rate: With which the loss falls.
      spec: What it is built for.
      moments: ``moments(state)``, the part of a state that is optimizer memory.
      whole: Whether it trains every number whatever the spec says.
      draws: Whether its key matters.
      subset: Whether it leaves some adapted leaves at rest.
      rounded: Whether it starts within a rounding of the weights and not at them.
    """

    make: Callable[..., methods.Method]
    learning_rate: float = 0.02
    spec: Any = SPEC
    moments: Callable[[Any], Any] = lambda state: state.inner
    whole: bool = False
    draws: bool = True
    subset: bool = False
    rounded: bool = False


# What ``methods`` has beside the methods: what they are made of.
PARTS = {
    "Cases",
    "Joint",
    "Method",
    "Pieces",
    "Subset",
    "from_transform",
    "pair_method",
}


def pair(name: str, **options: Any) -> Callable[..., methods.Method]:
    """A method of ``raclora_jax.methods`` that takes a rate, a spec and a key."""
    made = getattr(methods, name)
    return lambda rate, spec, key: made(rate, spec, key=key, **options)


def inner_state(state: Any) -> Any:
    """The moments of the library's own chain."""
    return find_state(state.opt_state).inner_state


def in_a_basis(state: Any) -> Any:
    """What GaLore and its kin keep, the basis and the norms of a limiter included."""
    own = state.opt_state[0]
    return own.basis, own.inner, own.norms


def compressed(state: Any) -> Any:
    """What Flora keeps."""
    return state.opt_state[0].momentum, state.opt_state[0].inner


def in_opt_state(state: Any) -> Any:
    """All that an optax transformation keeps."""
    return state.opt_state


LAYERS = {"up": "0", "stack": "1", "down": "2"}.get
PLAIN = rl.Spec(2, resample_every=4, rules=RULES)  # without a scaling

ROWS = {
    "full": Row(
        lambda rate, spec, key: methods.full(rate),
        moments=in_opt_state,
        whole=True,
        draws=False,
    ),
    "raclora": Row(pair("raclora"), moments=inner_state),
    "published_raclora": Row(pair("published_raclora")),
    "lora": Row(pair("lora")),
    "rslora": Row(pair("rslora")),
    "lora_fa": Row(pair("lora_fa")),
    "asymmetric": Row(pair("asymmetric")),
    "cola": Row(pair("cola")),
    "dora": Row(pair("dora")),
    "sora": Row(pair("sora")),
    "lora_pro": Row(pair("lora_pro")),
    "lora_pro_sgd": Row(pair("lora_pro", form="sgd"), learning_rate=0.1),
    "lora_rite": Row(pair("lora_rite")),
    "xgblora": Row(
        pair("xgblora", boosters=6, steps=STEPS, leaves=2), spec=ONES, subset=True
    ),
    "heterolora": Row(pair("heterolora", search=4, budget=0.5), subset=True),
    "galore": Row(
        lambda rate, spec, key: methods.galore(rate, spec),
        moments=in_a_basis,
        draws=False,
    ),
    "golore": Row(pair("golore", random_from=STEPS // 2), moments=in_a_basis),
    "flora": Row(pair("flora"), spec=rl.Spec(2, rules=RULES), moments=compressed),
    "allora": Row(pair("allora", eta=2.0), spec=rl.Spec(2, rules=RULES)),
    "lora_plus": Row(pair("lora_plus", ratio=4.0)),
    "pissa": Row(
        lambda rate, spec, key: methods.pissa(rate, spec), draws=False, rounded=True
    ),
    "rso": Row(pair("rso", proximal=1.0), spec=PLAIN),
    "fed_krso": Row(pair("fed_krso", seeds=2, links=3), spec=PLAIN),
    "layered": Row(pair("layered", layer=LAYERS)),
    "fira": Row(
        lambda rate, spec, key: methods.fira(rate, spec), moments=in_a_basis, draws=False
    ),
    "apollo": Row(pair("apollo"), spec=PLAIN, moments=in_a_basis),
    "apollo_mini": Row(pair("apollo_mini"), spec=PLAIN, moments=in_a_basis),
    "muon": Row(
        lambda rate, spec, key: methods.muon(rate, spec),
        moments=in_opt_state,
        draws=False,
    ),
    "adalomo": Row(
        lambda rate, spec, key: methods.adalomo(rate),
        moments=lambda state: state.opt_state[0],
        whole=True,
        draws=False,
    ),
    "badam": Row(
        lambda rate, spec, key: methods.badam(rate, steps=4, key=key),
        moments=lambda state: state.moments,
        whole=True,
    ),
    "lisa": Row(
        lambda rate, spec, key: methods.lisa(
            rate, steps=4, layers=2, layer=LAYERS, key=key
        ),
        moments=lambda state: (state.drawn, state.rest),
        whole=True,
    ),
}


def params() -> dict[str, Any]:
    """Lopsided leaves: a stack, a bfloat16 one, a bias, and one the spec freezes."""
    shapes = {"up": (7, 9), "stack": (3, 9, 9), "down": (9, 5)}
    keys = jax.random.split(jax.random.key(3), len(shapes))
    made = {
        name: jax.random.normal(key, shape) / np.sqrt(shape[-2])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    made["down"] = made["down"].astype(jnp.bfloat16)
    return made | {"bias": jnp.zeros(9), "offset": jnp.ones(5)}


def batch() -> tuple[jax.Array, jax.Array]:
    """Inputs and targets."""
    x, y = jax.random.split(jax.random.key(4))
    return jax.random.normal(x, (16, 7)), jax.random.normal(y, (16, 5))


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """A regression through all leaves, the stack under a scan."""
    h = jnp.tanh(x @ params["up"] + params["bias"])
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["stack"])
    h = h @ params["down"].astype(h.dtype) + params["offset"] - 1
    return jnp.mean((h - y) ** 2)


class Run(NamedTuple):
    """A few steps of a method.

    Attributes:
      method: The method, of the first key.
      states: Its states.
      shown: Its weights at the start and at the end.
      losses: Its losses.
      again: The last state of the same run once more.
      other: The last weights under another key.
    """

    method: methods.Method
    states: list[Any]
    shown: tuple[Any, Any]
    losses: list[float]
    again: Any
    other: Any


def run(row: Row) -> Run:
    """Runs a row of the table, twice with one key and once with another.

    The key is an argument of the step, which is compiled once for all of it.
    """

    @compiled_once
    @jax.jit
    def step(key, state, *batch):
        method = row.make(row.learning_rate, row.spec, key)
        return method.step(state, loss_fn, *batch)

    @jax.jit
    def see(key, state):
        return row.make(row.learning_rate, row.spec, key).params(state)

    def states(key):
        states, losses = [row.make(row.learning_rate, row.spec, key).init(params())], []
        for _ in range(STEPS):
            state, loss = step(key, states[-1], *batch())
            states.append(state)
            losses.append(float(loss))
        return states, losses

    first, second = jax.random.key(1), jax.random.key(2)
    (held, losses), (again, _), (other, _) = map(states, (first, first, second))
    method = row.make(row.learning_rate, row.spec, first)
    shown = see(first, held[0]), see(first, held[-1])
    return Run(method, held, shown, losses, again[-1], see(second, other[-1]))


def leaf_arrays(tree: Any) -> list[np.ndarray]:
    """The leaves of a tree as NumPy arrays."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def check_loss_falls(done: Run, row: Row) -> None:
    """The first loss is that of the weights shown, and the last is well below."""
    first = float(loss_fn(done.shown[0], *batch()))
    # A pair beside a weight of 16 bits is added to its product, not to its entries.
    assert np.isclose(done.losses[0], first, rtol=1e-3 if row.rounded else 1e-5)
    assert done.losses[-1] < 0.9 * done.losses[0]
    assert np.all(np.isfinite(done.losses))


def check_what_is_trained(done: Run, row: Row) -> None:
    """Adapted and dense leaves move, every matrix of a stack, and no frozen leaf."""
    before, after = done.shown
    moved = {name: np.asarray(after[name] != before[name]) for name in before}
    assert np.any(moved["bias"])
    assert row.subset or (np.any(moved["up"]) and np.any(moved["down"]))
    assert row.subset or all(np.any(one) for one in moved["stack"])
    assert np.any(moved["offset"]) == row.whole


def check_params(done: Run, row: Row) -> None:
    """The weights keep their structure, shapes and dtypes, and start as given."""
    given = params()
    for shown in (*done.shown, jax.eval_shape(done.method.params, done.states[0])):
        assert jax.tree.structure(shown) == jax.tree.structure(given)
        for name, leaf in given.items():
            assert (shown[name].shape, shown[name].dtype) == (leaf.shape, leaf.dtype)
    for name, leaf in given.items():
        wide = np.asarray(leaf, np.float32), np.asarray(done.shown[0][name], np.float32)
        largest = jnp.finfo(leaf.dtype).eps * np.abs(wide[0]).max()
        atol = float(largest) if row.rounded else 0
        np.testing.assert_allclose(*wide, rtol=1e-6, atol=atol)


def check_state(done: Run, row: Row) -> None:
    """Types never drift, bytes are those of the state, no two arrays are one."""
    first, last = done.states[0], done.states[-1]
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (first, last)]
    assert kinds[0] == kinds[1]
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(last))
    held = sum(leaf.nbytes for leaf in leaf_arrays(row.moments(last)))
    assert done.method.optimizer_bytes(params()) == held
    shapes = jax.eval_shape(params)
    assert done.method.trained(shapes) == done.method.trained(params()) > 0
    arrays = jax.tree.leaves(done.method.init(params()))
    assert len({leaf.unsafe_buffer_pointer() for leaf in arrays}) == len(arrays)


def check_same_key_same_bits(done: Run, row: Row) -> None:
    """The key is all the randomness there is."""
    pairs = zip(leaf_arrays(done.states[-1]), leaf_arrays(done.again), strict=True)
    assert all(np.array_equal(first, second) for first, second in pairs)
    equal = np.array_equal(done.shown[1]["up"], done.other["up"])
    assert equal != row.draws
