"""Federated training of a small network on digits by label: accuracy against bytes up.

Clients hold two shards of data sorted by label, so that none sees all digits. FedAvg of
the weights sets the scale; every other rule may send 1/20 of its bytes up. All rules are
tuned over the same rates, local steps and ranks, on validation images with seeds of
their own: the rates at the middle setting, then steps and ranks at the best rate.

    python -m benchmarks.federated [--data-dir DIR] [--explore] [--quick]

Rows are saved after each run, and a run that has its row is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from jax import Array

import raclora_jax as rl
from benchmarks.federated.report import draw
from benchmarks.finetune import data as images
from benchmarks.shared import rows as result_rows
from raclora_jax import federated as fed

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
STEPS = (60, 20)  # local steps a round, the first of them while the rate is tuned
RANKS = (4, 1, 8)  # likewise
SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)
CLIP = 1.0  # of a local gradient's norm: without, the best rates diverge on some seeds
SHARE = 20  # FedAvg may send this many times the bytes of the others
BATCH, HIDDEN, CLASSES = 32, 64, 10
POINTS = 8  # of a curve


class Rule(NamedTuple):
    """One way to train together.

    Attributes:
      make: ``make(rank)``, the strategy.
      inner: What a client does to a local gradient.
      rates: Local rates to try.
    """

    make: Callable[[int], fed.Strategy]
    inner: optax.GradientTransformation = optax.clip_by_global_norm(CLIP)
    rates: tuple[float, ...] = RATES


def _left(make: Callable[[rl.Spec], fed.Strategy]) -> Rule:
    """A rule with the sketch, or the factor that starts random, at the input."""
    return Rule(lambda rank: make(rl.Spec(rank, side="left")))


RULES: dict[str, Rule] = {
    "FedAvg": _left(fed.fedavg),
    "Fed-RAC-LoRA": _left(fed.raclora),
    "FedEx-LoRA": _left(fed.fedex),
    "FedIT": _left(fed.fedit),
    "FlexLoRA": _left(fed.flexlora),
    "FFA-LoRA": _left(fed.ffa_lora),
}
MOMENTUM = optax.chain(optax.clip_by_global_norm(CLIP), optax.trace(0.9))
# Fed-RAC-LoRA otherwise; see ``--explore``.
EXPLORED: dict[str, Rule] = {
    "blocks": Rule(lambda rank: fed.raclora(rl.Spec(rank, side="left", sketch="block"))),
    "the smaller side": Rule(lambda rank: fed.raclora(rl.Spec(rank, side="smaller"))),
    "the other side": Rule(lambda rank: fed.raclora(rl.Spec(rank, side="right"))),
    "orthogonal local steps": Rule(
        lambda rank: fed.raclora(rl.Spec(rank, side="left", alpha="dim")),
        rl.orthogonal(),
        tuple(rate / 100 for rate in RATES),
    ),
    "local momentum 0.9": _left(fed.raclora)._replace(inner=MOMENTUM),
    "FedAvg, local momentum 0.9": _left(fed.fedavg)._replace(inner=MOMENTUM),
}


def rule_of(name: str) -> Rule:
    """By its name in the rows."""
    return (RULES | EXPLORED)[name]


class Task(NamedTuple):
    """The clients' data and what the global model is judged on.

    Attributes:
      clients: Images ``(clients, n, pixels)`` and labels ``(clients, n)``.
      take: How many clients take part in a round.
      validation: Images and labels to tune on.
      test: Images and labels to report.
      start: ``start(seed) -> params``.
    """

    clients: tuple[Array, Array]
    take: int
    validation: tuple[Array, Array]
    test: tuple[Array, Array]
    start: Callable[[int], Any]


class Setting(NamedTuple):
    """One run of one rule."""

    rule: str
    rank: int
    steps: int
    rate: float
    rounds: int  # of FedAvg; another rule has what fits in 1/SHARE of its bytes
    seed: int


def network(pixels: int, seed: int) -> dict[str, Array]:
    """An MLP pixels-64-64-10 from scratch."""
    sizes = (pixels, HIDDEN, HIDDEN, CLASSES)
    draw = jax.nn.initializers.he_normal()
    params = {}
    for index, key in enumerate(jax.random.split(jax.random.key(seed), 3)):
        params[f"kernel_{index}"] = draw(key, sizes[index : index + 2])
        params[f"bias_{index}"] = jnp.zeros(sizes[index + 1])
    return params


def logits(params: dict[str, Array], x: Array) -> Array:
    """Of each class."""
    for index in range(3):
        x = x @ params[f"kernel_{index}"] + params[f"bias_{index}"]
        x = jax.nn.relu(x) if index < 2 else x
    return x


def loss_fn(params: dict[str, Array], x: Array, y: Array) -> Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return jnp.mean(losses)


@jax.jit
def accuracy(params: dict[str, Array], x: Array, y: Array) -> Array:
    """Share of the images that are told right."""
    return jnp.mean(jnp.argmax(logits(params, x), axis=1) == y)


@functools.partial(jax.jit, static_argnames=("steps",))
def pretrained(params: dict[str, Array], x: Array, y: Array, steps: int) -> Any:
    """Some steps of Adam on the digits 0-4."""
    tx = optax.adam(1e-3)

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, opt_state = carry
        rows = jax.random.choice(key, x.shape[0], (128,))
        grads = jax.grad(loss_fn)(params, x[rows], y[rows])
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def by_label(
    x: np.ndarray, y: np.ndarray, clients: int, per_client: int
) -> tuple[Array, Array]:
    """Two shards for each client, of the images sorted by label."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(y))[: clients * per_client]
    chosen = chosen[np.argsort(y[chosen], kind="stable")]
    shards = chosen.reshape(2 * clients, per_client // 2)
    shards = shards[rng.permutation(2 * clients)].reshape(clients, per_client)
    return jnp.asarray(x[shards]), jnp.asarray(y[shards])


def task(folder: pathlib.Path | None, clients: int, start: str) -> Task:
    """MNIST with a folder, scikit-learn's digits without."""
    if folder is None:
        x, y = sklearn.datasets.load_digits(return_X_y=True)
        order = np.random.default_rng(1).permutation(len(y))
        x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
        parts = np.split(x, [1200, 1500]), np.split(y, [1200, 1500])
        train, validation, test = zip(*parts, strict=True)
        per_client, warm = 1200 // clients // 2 * 2, 100
    else:
        full, test = (
            (images.standardised(part.images), part.labels.astype(np.int32))
            for part in images.all_mnist(folder)
        )
        train = tuple(part[:55_000] for part in full)
        validation = tuple(part[55_000:] for part in full)
        per_client, warm = min(2000, 55_000 // clients // 2 * 2), 300
    few = train[1] < 5
    pixels, old = train[0].shape[1], tuple(jnp.asarray(part[few]) for part in train)

    def begin(seed: int) -> dict[str, Array]:
        params = network(pixels, seed)
        return params if start == "scratch" else pretrained(params, *old, warm)

    return Task(
        by_label(*train, clients, per_client),
        10,
        tuple(map(jnp.asarray, validation)),
        tuple(map(jnp.asarray, test)),
        begin,
    )


@functools.partial(
    jax.jit, static_argnames=("strategy", "inner", "steps", "rounds", "take")
)
def some_rounds(
    strategy: fed.Strategy,
    inner: optax.GradientTransformation,
    steps: int,
    rounds: int,
    take: int,
    state: fed.State,
    clients: tuple[Array, Array],
    rate: Array,
    last: Array,
    key: Array,
) -> fed.State:
    """Rounds in one program; the local rate follows a cosine to 0 over the run."""

    def decayed(round: Array) -> Array:
        return rate * (1 + jnp.cos(jnp.pi * round / last)) / 2

    local = fed.Local(loss_fn, decayed, batch_size=BATCH, steps=steps, inner=inner)
    number = clients[1].shape[0]

    def one(state: fed.State, _: None) -> tuple[fed.State, None]:
        ids, own = jnp.arange(number), clients
        if take < number:
            ids = fed.sample_clients(number, take, round=state.round, key=key)
            own = tuple(array[ids] for array in clients)
        messages = fed.client_updates(
            strategy, state, own, local, clients=ids, key=jax.random.fold_in(key, 1)
        )
        step = fed.combine(strategy, state, messages)
        return fed.server_step(strategy, state, step)[0], None

    return jax.lax.scan(one, state, None, length=rounds)[0]


def traffic(strategy: fed.Strategy, task: Task, params: Any) -> tuple[int, int]:
    """Bytes of a client's message and of the server's answer, from their arrays."""
    state = fed.init(strategy, params, key=0)
    some = tuple(array[: task.take] for array in task.clients)
    local = fed.Local(loss_fn, 0.1, batch_size=BATCH, steps=1)

    def round(state: fed.State, some: tuple[Array, Array]) -> tuple[Any, Any]:
        ids = jnp.arange(task.take)
        messages = fed.client_updates(strategy, state, some, local, clients=ids, key=0)
        return messages, fed.combine(strategy, state, messages)

    messages, step = jax.eval_shape(round, state, some)
    return fed.nbytes(messages) // task.take, fed.nbytes(step)


def run(setting: Setting, task: Task, judged: tuple[Array, Array]) -> dict[str, Any]:
    """One run: what it sent, and the accuracy at some points of it."""
    rule = rule_of(setting.rule)
    strategy = rule.make(setting.rank)
    params = task.start(setting.seed)
    up, down = traffic(strategy, task, params)
    rounds = setting.rounds
    if strategy.name != "fedavg":
        rounds = setting.rounds * traffic(RULES["FedAvg"].make(1), task, params)[0]
        rounds //= SHARE * up
    points = min(POINTS, rounds)
    each = rounds // points
    last = points * each
    state, key = (
        fed.init(strategy, params, key=setting.seed),
        jax.random.key(setting.seed),
    )
    curve = []
    for point in range(1, points + 1):
        state = some_rounds(
            strategy,
            rule.inner,
            setting.steps,
            each,
            task.take,
            state,
            task.clients,
            jnp.float32(setting.rate),
            jnp.float32(last),
            key,
        )
        now = float(accuracy(fed.params_of(strategy, state), *judged))
        curve.append([point * each * up, now])
    sent = {"exchanges": last, "bytes_up": last * up, "bytes_down": last * down}
    return {**sent, "curve": curve, "accuracy": curve[-1][1]}


class Book:
    """The rows of a file, written after each run and read before it."""

    def __init__(self, path: pathlib.Path, **shared: Any) -> None:
        self.path, self.shared, self.rows = path, shared, []
        if path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def row(self, study: dict[str, Any], setting: Setting, task: Task) -> dict[str, Any]:
        """The row of a run, made if it is not there."""
        facts = {**study, **setting._asdict()}
        for row in self.rows:
            if all(row.get(name) == value for name, value in facts.items()):
                return row
        judged = task.validation if study["judged"] == "validation" else task.test
        self.rows.append({**facts, **run(setting, task, judged)})
        result_rows.save(
            self.path, "python -m benchmarks.federated", self.rows, **self.shared
        )
        print(facts, f"{self.rows[-1]['accuracy']:.4f}", flush=True)
        return self.rows[-1]


def tuned(
    book: Book, study: dict[str, Any], task: Task, rule: str, rounds: int
) -> Setting:
    """The best setting of a rule on validation images."""
    study = {**study, "judged": "validation"}

    def mean(setting: Setting) -> float:
        own = (setting._replace(seed=seed) for seed in TUNING_SEEDS)
        return sum(book.row(study, one, task)["accuracy"] for one in own)

    def best(settings: Iterable[Setting]) -> Setting:
        return max(settings, key=mean)

    ranks = RANKS[:1] if "FedAvg" in rule else RANKS
    middle = Setting(rule, RANKS[0], STEPS[0], 0.0, rounds, 0)
    rate = best(middle._replace(rate=rate) for rate in rule_of(rule).rates).rate
    return best(
        Setting(rule, rank, steps, rate, rounds, 0) for rank in ranks for steps in STEPS
    )


def main() -> None:
    """All studies, the first ones first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=result_rows.folder(__file__))
    parser.add_argument("--rounds", type=int, default=40, help="of FedAvg")
    parser.add_argument("--explore", action="store_true", help="Fed-RAC-LoRA otherwise")
    parser.add_argument("--quick", action="store_true", help="a few rounds of each rule")
    options = parser.parse_args()
    name = "federated_digits" if options.data_dir is None else "federated_mnist"
    panels = list(itertools.product((10, 100), ("scratch", "pretrained")))
    rules = RULES
    if options.explore:
        name, panels, rules = f"{name}_explored", [(10, "scratch")], EXPLORED
    grid = {
        "rates": RATES,
        "steps": STEPS,
        "ranks": RANKS,
        "seeds": SEEDS,
        "batch": BATCH,
    }
    book = Book(
        options.out / f"{name}.json",
        tuning_seeds=TUNING_SEEDS,
        share=SHARE,
        clip=CLIP,
        **grid,
    )
    rounds = 4 if options.quick else options.rounds
    for clients, start in panels:
        job = task(options.data_dir, clients, start)
        study = {"clients": clients, "start": start}
        for rule in rules:
            # 100 clients keep what was best for 10.
            few = {**study, "clients": 10}
            tuning = job if clients == 10 else task(options.data_dir, 10, start)
            best = tuned(book, few, tuning, rule, rounds)
            for seed in SEEDS[:1] if options.quick else SEEDS:
                final = {**study, "judged": "test"}
                book.row(final, best._replace(seed=seed), job)
    if not options.quick and not options.explore:
        draw(options.out / f"{name}.png", book.rows)
