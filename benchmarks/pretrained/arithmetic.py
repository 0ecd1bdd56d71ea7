"""Sums told as little stories, whose answers can be checked, and a model that tries.

The problems are this module's own, in the words of stories260K. That model is tuned on
some of them whose answers are often a little wrong, so that it knows how to answer and
does so as carelessly: this is where GRPO begins.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import optax
from finetuning import decoder
from finetuning.decoder import Decoder
from finetuning.tokens import Merges
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import load_file, save_file
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

PROMPT, ANSWER = 32, 4  # tokens at most
MOST = 6  # the largest number of a problem
NAMES = ("Tom", "Lily", "Ben", "Sue", "Mia", "Sam")
THINGS = ("apples", "toys", "balls", "cars", "books", "hats")
MORE = ("gets {} more", "finds {} more", "buys {} more")
LESS = ("loses {}", "gives {}", "sells {}")
WARM_STEPS, WARM_ROWS, WARM_RATE = 700, 32, 2e-3
WRONG = 0.6  # of the answers that the model is tuned on


class Problem(NamedTuple):
    """A story that ends in a question, and the number that answers it."""

    prompt: str
    answer: int


def problem(draw: np.random.Generator) -> Problem:
    """Something happens to a number of things, which stays above zero."""
    has = int(draw.integers(2, MOST + 1))
    number = int(draw.integers(1, MOST + 1))
    down = number < has and draw.random() < 0.5
    told = draw.choice(LESS if down else MORE).format(number)
    prompt = (
        f"{draw.choice(NAMES)} has {has} {draw.choice(THINGS)}, then {told}. How many?"
    )
    return Problem(prompt, has - number if down else has + number)


def problems(seed: int, count: int) -> list[Problem]:
    """The same for a seed; seeds below 100 are for training, those above for judging."""
    draw = np.random.default_rng(seed)
    return [problem(draw) for _ in range(count)]


def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
    """1 for each completion that is the number and a full stop, 0 for the others.

    Tunix leaves the token that ends a text out of the loss, so that the stop is what a
    policy learns to end by; what stands behind it does not count.
    """
    del prompts
    return [
        float(said.lstrip(" ").startswith(f"{right}."))
        for said, right in zip(completions, answer, strict=True)
    ]


class Tokens(Merges):
    """llama2.c's tokenizer as Tunix asks for it; the id of unknown pieces pads."""

    def decode(self, ids: Any) -> str:
        """The text of some ids, marks left out."""
        parts = [bytes([i - 3]) if i <= 258 else self.pieces[i] for i in ids if i > 2]
        return b"".join(parts).decode(errors="replace")

    def bos_id(self) -> int:
        """Before a text."""
        return 1

    def eos_id(self) -> int:
        """Behind a text."""
        return 2

    def pad_id(self) -> int:
        """Where no text is."""
        return 0


class Start(NamedTuple):
    """Where every run of GRPO begins."""

    model: Decoder
    tokens: Tokens


def start(data_dir: pathlib.Path, kept: pathlib.Path) -> Start:
    """stories260K after ``WARM_STEPS`` steps of AdamW on problems with answers.

    Args:
      data_dir: The folder with ``stories260k``.
      kept: Where the tuned weights are kept, and read from if they are there.
    """
    folder = data_dir / "stories260k"
    model = decoder.load(folder / "stories260K.bin", bf16=False, remat=False)
    tokens = Tokens(folder / "tok512.bin")
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(flatten_dict(_tuned(model, tokens), sep="/"), kept)
    params = unflatten_dict(load_file(kept), sep="/")
    return Start(model._replace(params=params), tokens)


def _tuned(model: Decoder, tokens: Tokens) -> Any:
    from raclora_jax import flax as rl_flax

    net = model.restore(model.params)
    config = TrainingConfig(eval_every_n_steps=10**9, max_steps=WARM_STEPS)
    rate = optax.warmup_cosine_decay_schedule(0, WARM_RATE, 50, WARM_STEPS)
    trainer = PeftTrainer(net, optax.adamw(rate, weight_decay=0.0), config)
    trainer.with_gen_model_input_fn(_inputs).train(_lessons(tokens))
    return rl_flax.to_tree(net)[0]


def _lessons(tokens: Tokens) -> Iterator[TrainingInput]:
    """Problems with answers, many of them wrong; the mask says what is learnt of it."""
    width = PROMPT + ANSWER + 1
    draw = np.random.default_rng(0)
    for _ in range(WARM_STEPS):
        ids = np.zeros((WARM_ROWS, width), np.int32)
        learnt = np.zeros((WARM_ROWS, width), bool)
        for row in range(WARM_ROWS):
            told = problem(draw)
            off = int(draw.integers(1, 4)) if draw.random() < WRONG else 0
            said = abs(told.answer + off * int(draw.choice((-1, 1))))
            begun = [tokens.bos_id(), *tokens.encode(told.prompt)]
            ended = [*tokens.encode(f"{said}."), tokens.eos_id()]
            both = begun + ended
            ids[row, : len(both)] = both
            learnt[row, len(begun) : len(both)] = True
        yield TrainingInput(ids, learnt)


def _inputs(example: TrainingInput) -> dict[str, Any]:
    there = example.input_tokens != 0
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": utils.build_positions_from_mask(there),
        "attention_mask": utils.make_causal_attn_mask(there),
    }
