"""A decoder 512 wide, made here, learns another text by every method.

A Llama of six layers and 21 million numbers is trained in full from nothing, by AdamW on
WikiText-2 and GSM8K, and kept in ``--scratch``. Then the seven matrices of each layer are
tuned on tiny Shakespeare: 8 windows of 64 tokens a step, 10 % warm-up, a cosine to zero.
The learning rate of every method is searched on one grid of powers of two, by windows
and a seed that are not reported: by runs of a third of the steps, and downwards from
what these found by whole ones.

Studies: 300 steps, steps timed in turn in this run, those of the orthogonal rule in
blocks timed beside whole ones, and as many steps as fit into the time of full Adam's
300. Rows are saved as they come and missing ones are added.
``--full`` is a decoder of 1024 and 12 layers at equal steps, for a GPU.

    python -m benchmarks.pretrained.wide --data-dir DIR --scratch DIR [--quick] [--full]
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from finetuning.llama2c import Sizes
from jax import Array, lax

import raclora_jax as rl
from benchmarks.pretrained import entries, run, stories, texts
from benchmarks.pretrained.entries import Entry
from benchmarks.shared import timing
from benchmarks.shared.results import Results, use_one_core
from raclora_jax import methods

SEEDS = (0, 1, 2)
STEPS, TUNING_STEPS = 300, 100
WINDOWS = 128  # that do not overlap: a token of this vocabulary is longer
PRETRAINING_RATE = 1e-3


class Size(NamedTuple):
    """A decoder, and how long it is trained from nothing.

    Attributes:
      width: Of a layer.
      layers: How many.
      vocabulary: Tokens of its tokenizer.
      steps: Of training from nothing.
      batch: Windows in each of them.
    """

    width: int
    layers: int
    vocabulary: int
    steps: int
    batch: int

    def config(self) -> Sizes:
        """As a header of llama2.c."""
        hidden = 43 * self.width // 16
        heads = self.width // 64
        return Sizes(
            self.width, hidden, self.layers, heads, heads, self.vocabulary, run.LENGTH
        )


HERE = Size(512, 6, 4096, 3000, 16)
WHOLE = Size(1024, 12, 8192, 10_000, 64)
TINY = Size(64, 2, 300, 20, 2)


class Base(NamedTuple):
    """What was trained from nothing.

    Attributes:
      model: The decoder.
      tokenizer: Of its own text.
      loss: On the tenth of that text that was held out.
    """

    model: stories.Model
    tokenizer: tokenizers.Tokenizer
    loss: float


def fresh(config: Sizes, key: Array) -> stories.Model:
    """A decoder at random."""
    kv_width = config.dim * config.kv_heads // config.heads
    shapes = {
        "wq": (config.dim, config.dim),
        "wk": (config.dim, kv_width),
        "wv": (config.dim, kv_width),
        "wo": (config.dim, config.dim),
        "w1": (config.dim, config.hidden),
        "w3": (config.dim, config.hidden),
        "w2": (config.hidden, config.dim),
    }
    draw = iter(jax.random.split(key, 1 + len(shapes) * config.layers))

    def matrix(shape: tuple[int, int]) -> Array:
        return jax.random.normal(next(draw), shape) * shape[0] ** -0.5

    layers = {
        f"layer_{i}": {name: matrix(shape) for name, shape in shapes.items()}
        for i in range(config.layers)
    }
    rest = {
        "embedding": 0.02 * jax.random.normal(next(draw), (config.vocab, config.dim)),
        "attention_norm": jnp.ones((config.layers, config.dim)),
        "feed_forward_norm": jnp.ones((config.layers, config.dim)),
        "final_norm": jnp.ones(config.dim),
    }
    return stories.Model(config, layers, rest)


def own_tokenizer(texts: list[str], size: int) -> tokenizers.Tokenizer:
    """Byte pairs of some texts."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    return made


def trained(size: Size, data_dir: pathlib.Path, scratch: pathlib.Path) -> Base:
    """The decoder trained from nothing, read if it has been before."""
    scratch.mkdir(parents=True, exist_ok=True)
    name = f"{size.width}x{size.layers}-{size.steps}"
    weights, words = scratch / f"{name}.npz", scratch / f"{name}.json"
    config = size.config()
    text = stories.wikitext(data_dir) + stories.gsm8k(data_dir, problems=None)
    if not words.exists():
        own_tokenizer([text], size.vocabulary).save(str(words))
    tokenizer = tokenizers.Tokenizer.from_file(str(words))
    own = stories.encoded(text, lambda part: tokenizer.encode(part).ids)
    model = fresh(config, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(model[1:])
    if weights.exists():
        with np.load(weights) as kept:
            leaves = [jnp.asarray(kept[str(i)]) for i in range(len(leaves))]
    else:
        leaves = jax.tree.leaves(_pretrained(model, own.train, size))
        np.savez(weights, **{str(i): leaf for i, leaf in enumerate(leaves)})
    model = stories.Model(config, *jax.tree.unflatten(treedef, leaves))
    spread = stories.spread_windows(own.validation, run.WINDOWS, run.LENGTH)
    loss = jax.jit(stories.loss, static_argnums=3)
    score = float(loss(model.layers, model.rest, jnp.asarray(spread), config))
    return Base(model, tokenizer, score)


def _pretrained(model: stories.Model, ids: np.ndarray, size: Size) -> Any:
    rate = run.warm_cosine(PRETRAINING_RATE, size.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))

    def loss(params: Any, tokens: Array) -> Array:
        return stories.loss(*params, tokens, model.config)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def chunk(params: Any, state: Any, tokens: Array) -> Any:
        def step(carry: Any, batch: Array) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return lax.scan(step, (params, state), tokens)

    params: Any = (model.layers, model.rest)
    state, draw = tx.init(params), np.random.default_rng(0)
    for done in range(size.steps // run.CHUNK):
        starts = draw.integers(len(ids) - run.LENGTH, size=(run.CHUNK, size.batch))
        tokens = stories.windows(ids, starts, run.LENGTH)
        (params, state), losses = chunk(params, state, tokens)
        if done % 10 == 0:
            print(
                f"from nothing: step {done * run.CHUNK}, {losses.mean():.3f}", flush=True
            )
    return params


class Task(texts.Task):
    """The decoder, and the text that it has not seen."""

    def __init__(self, size: Size, data_dir: pathlib.Path, scratch: pathlib.Path):
        base = trained(size, data_dir, scratch)
        self.model, self.loss_before = base.model, base.loss
        self.text = stories.encoded(
            stories.shakespeare(data_dir), lambda part: base.tokenizer.encode(part).ids
        )
        self._score = jax.jit(self.loss)
        self._halve(WINDOWS)


def contenders(width: int) -> list[Entry]:
    """The contenders: rank is a part of the width where nothing is kept."""

    def blocks(part: int, name: str, **options: Any) -> Entry:
        options = {"side": "left", "sketch": "block", "rules": [], **options}
        named = f"blocks of dim/{part}, {name}"
        return entries.ours(named, width // part, **{"guess": 1e-3} | options)

    eighths = {
        "inner": functools.partial(rl.orthogonal, block_size=width // 8),
        "guess": 4e-3,
    }
    adam = {"inner": None, "resample_every": 100, "guess": 1e-3, "rules": []}
    whole = {"rules": [rl.Rule(".*", mode="full")], "fused": True, "guess": 1e-3}
    return [
        entries.full("full Adam", 5e-4),
        entries.pair("LoRA r8 Adam", methods.lora, 8, 4e-3),
        *(blocks(part, "orthogonal") for part in (4, 8, 2, 16)),
        entries.ours("full orthogonal, fused", 8, **whole),
        entries.pair("LoRA r32 Adam", methods.lora, 32, 4e-3),
        blocks(4, "memory 0.9", inner=functools.partial(rl.orthogonal, memory=0.9)),
        entries.ours("RAC r12 Adam, links of 100", 12, **adam),
        entries.ours("full orthogonal in blocks of dim/8, fused", 8, **whole | eighths),
        blocks(2, "orthogonal in quarters", **eighths),
    ]


# The program ---------------------------------------------------------------------------


@functools.cache
def _task(*where: Any) -> Task:
    return Task(*where)


def _work(where: tuple[Any, ...], name: str, **job: Any) -> dict[str, Any]:
    """One row, in a process of its own."""
    task = _task(*where)
    entry = next(entry for entry in contenders(where[0].width) if entry.name == name)
    row = run.contest(run.Runner(task, entry), held_out=texts.TUNING_SEED, **job)
    return row | {"base_loss": task.loss_before}


def jobs(
    results: Results, study: str, where: tuple[Any, ...], options: Any
) -> Iterator[dict[str, Any]]:
    """The rows of a study that are missing and can be made."""
    for entry in contenders(where[0].width):
        if not re.search(options.only, entry.name) or results.get(study, entry.name):
            continue
        job = {"where": where, "name": entry.name, "study": study, "seeds": options.seeds}
        if study == "equal steps":
            steps = run.CHUNK if options.quick else STEPS
            yield job | {
                "steps": steps,
                "guess": entry.guess,
                "tune": not options.quick,
                "tuning_steps": TUNING_STEPS,
            }
            continue
        before = results.get("equal steps", entry.name)
        own = next(filter(None, (results.get(race, entry.name) for race in RACES)), None)
        if before and own:
            steps = run.CHUNK * round(STEPS / own["over_full_adam"] / run.CHUNK)
            if steps == before["steps"]:  # the same run
                results.add(before | {"study": study})
            else:
                yield job | {"steps": steps, "guess": before["rate"], "tune": False}


RACES = {"time": "", "time, blocks": "^full|dim/2"}  # and what takes part
STUDIES = ("equal steps", *RACES, "equal time")


def main() -> None:
    """Runs the studies and prints their rows."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--full", action="store_true", help="1024 wide: for a GPU")
    parser.add_argument("--only", default="", help="methods, a regular expression")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    options = timing.parse(parser, __file__)
    options.seeds = SEEDS[:1] if options.quick else SEEDS
    size = WHOLE if options.full else HERE
    if options.quick:
        size, options.studies = TINY, STUDIES[:1]
        options.only = "^(full Adam|full orth|blocks of dim/4, memory)"
    where = (size, options.data_dir, options.scratch)
    # From nothing on all cores, and in this process, so that the others read it.
    base = trained(*where)
    print(f"from nothing: {base.loss:.3f} on text held out", flush=True)
    if options.full:
        options.studies = STUDIES[:1]  # the others time a processor
    else:
        use_one_core()
    name = "wide_full" if options.full else "wide"
    results = Results(
        None if options.out is None else options.out / f"{name}.json",
        "pretrained.wide" + (" --full" if options.full else ""),
        size=size._asdict(),
        warm_up=run.WARM_UP,
    )
    for study in options.studies:
        if study in RACES:
            asked = [
                entry
                for entry in contenders(size.width)
                if re.search(options.only, entry.name)
                and re.search(RACES[study], entry.name)
            ]
            rounds = 1 if options.quick else 2
            results.replace(study, run.race(_task(*where), asked, rounds))
        else:
            results.fill(_work, jobs(results, study, where, options), options.workers)


if __name__ == "__main__":
    main()
