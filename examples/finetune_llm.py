"""Fine-tune a Llama, Qwen 3 or Gemma 3 on text, or on prompts and their completions.

    python examples/finetune_llm.py --model DIR --train train.jsonl --dev dev.jsonl \\
        --out run
    python examples/finetune_llm.py --model stories260K.bin --tokenizer tok512.bin \\
        --train input.txt --out run

A model is a folder in the hub's layout (config.json, safetensors, tokenizer.json) or a
checkpoint of llama2.c. JSONL has the fields prompt and completion, and the loss is that
of the completions; any other file is one text. The run's folder holds config, metrics,
figures, report.html, checkpoints to go on from, and in model/ the fine-tuned weights.

    pip install 'raclora_jax[finetuning]'
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import shutil
from typing import Any

from needs import extra

with extra("finetuning", __name__):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from finetuning import asked, beside, decoder, folders, loop, texts, training
    from finetuning.tokens import tokenizer_of

    import raclora_jax as rl

# Rates by factors of 2 on three models (benchmarks/pretrained/default_rates.py). Without
# state 4e-3 is the best or 0.006 behind it, and ahead of LoRA's best on each of them.
DEFAULTS = asked.Defaults(
    "raclora-orthogonal",
    {"raclora-orthogonal": 4e-3, "raclora": 4e-3, "lora": 8e-3, "full": 2e-3},
    "decoders 64, 128 and 256 wide",
)


def arguments() -> asked.RunParser:
    """The command line."""
    parser = asked.RunParser(__doc__, DEFAULTS)
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, help="folder, or llama2.c's .bin")
    add("--tokenizer", type=pathlib.Path, help="of a llama2.c checkpoint")
    add("--train", type=pathlib.Path, required=True, help="text or JSONL, gzipped or not")
    add("--dev", type=pathlib.Path, help="to judge by (default: a tenth of the rows)")
    for name, default, said in (
        ("--steps", 300, ""),
        ("--batch", 8, "rows a step"),
        ("--length", 64, "tokens a row"),
        ("--eval-every", 50, "steps from one evaluation to the next"),
        ("--eval-rows", 256, "rows to judge by at most"),
        ("--patience", 5, "evaluations without gain, then it stops"),
    ):
        said = f"{said} (default: %(default)s)".strip()
        add(name, type=asked.count, default=default, help=said)
    add("--bf16", action="store_true", help="weights in bfloat16")
    add("--remat", action="store_true", help="compute layers again in the backward pass")
    return parser


def losses(
    model: decoder.Decoder, params: Any, *batch: Any
) -> tuple[jax.Array, jax.Array]:
    """The sum over the tokens of a batch that count, and how many these are."""
    ids, places, seen, wanted, counts = batch
    logits = model.logits(params, ids, places, seen)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return jnp.sum(each * counts), jnp.sum(counts)


def mean_loss(model: decoder.Decoder, params: Any, *batch: Any) -> jax.Array:
    """Mean cross entropy of the tokens that count."""
    total, count = losses(model, params, *batch)
    return total / jnp.maximum(count, 1)


class Problem:
    """A decoder, its texts, and the loss."""

    metric = "loss"
    defaults = DEFAULTS

    def __init__(self, options: argparse.Namespace):
        self.length = options.length
        if options.model.is_dir():
            folders.check_program(options.model, "finetune_llm.py")
        self.decoder = decoder.load(options.model, bf16=options.bf16, remat=options.remat)
        if self.length > self.decoder.length:
            raise ValueError(
                f"--length {self.length} is beyond the model's {self.decoder.length}"
            )
        where = options.tokenizer or options.model / "tokenizer.json"
        tokenizer, begin, end = tokenizer_of(where)
        pack = functools.partial(
            texts.pack, tokenizer=tokenizer, length=self.length, begin=begin, end=end
        )
        rows, left = pack(texts.read(options.train))
        if options.dev is None:
            kept = max(1, len(rows.ids) // 10)
            if len(rows.ids) < 2:
                raise ValueError(f"{options.train} fills one row only; give --dev too")
            dev = texts.Rows(*(part[-kept:] for part in rows))
            rows = texts.Rows(*(part[:-kept] for part in rows))
        else:
            dev, more = pack(texts.read(options.dev))
            left = texts.Left(left.cut + more.cut, left.out + more.out)
        if max(rows.ids.max(), dev.ids.max()) >= self.decoder.vocab:
            raise ValueError(f"{where} has more tokens than the model")
        if len(rows.ids) < options.batch:
            raise ValueError(
                f"{options.train} fills {len(rows.ids)} rows, fewer than --batch"
            )
        at = np.linspace(0, len(dev.ids) - 1, min(len(dev.ids), options.eval_rows))
        self.rows, self.dev = rows, texts.Rows(*(part[at.astype(int)] for part in dev))
        self.params = self.decoder.params
        self._score = jax.jit(functools.partial(losses, self.decoder))
        self.facts = {
            "training rows": f"{len(rows.ids):,}",
            "dev rows": f"{len(self.dev.ids):,}",
            "completions cut": f"{left.cut:,}",
            "prompts left out, being too long": f"{left.out:,}",
        }

    def loss(self, params: Any, *batch: Any) -> jax.Array:
        """Mean cross entropy of the tokens that count."""
        return mean_loss(self.decoder, params, *batch)

    def trainer(
        self, method: str, rate: optax.Schedule, spec: rl.Spec, seed: int, fused: bool
    ) -> training.Trainer:
        """A method on this model; LoRA is qwix's."""
        if method != "lora":
            return training.trainer(method, rate, spec, self.loss, seed, fused)
        return beside.trainer(
            self.decoder,
            spec,
            rate,
            lambda model: functools.partial(mean_loss, model),
            seed,
        )

    def batch(self, step: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
        """The rows of a step."""
        chosen = loop.rows_of(step, size, seed, len(self.rows.ids))
        return texts.inputs(texts.Rows(*(part[chosen] for part in self.rows)))

    def judge(self, params: Any) -> dict[str, float]:
        """Loss of the dev rows, by token."""
        total = count = 0.0
        for start in range(0, len(self.dev.ids), 8):
            part = texts.Rows(*(part[start : start + 8] for part in self.dev))
            one, tokens = self._score(params, *texts.inputs(part))
            total, count = total + float(one), count + float(tokens)
        return {"dev_loss": total / count}


def export(
    folder: pathlib.Path, options: argparse.Namespace, problem: Problem, params: Any
) -> None:
    """The model as Transformers loads it, or its parameters alone for llama2.c."""
    del problem
    like = options.model if options.model.is_dir() else None
    decoder.save(folder, params, like=like)
    if like is None and options.tokenizer is not None:
        shutil.copy(options.tokenizer, folder / options.tokenizer.name)


def fine_tune(options: argparse.Namespace) -> Problem:
    """The run that the options ask for, and what it was about.

    Raises:
      ValueError: For bad input.
    """
    problem = Problem(options)
    if options.spec is not None:
        spec = training.spec_of(options.spec)
    else:
        width = problem.params["embedder"]["input_embedding"].shape[1]
        settings = training.settings(options.method, options.rank, width)
        spec = decoder.spec_for(problem.params, **settings)
    loop.train(options, problem, spec, options.steps, export)
    return problem


def main() -> None:
    """One line and exit code 2 for bad input."""
    options = arguments().asked()
    with asked.one_line():
        fine_tune(options)


if __name__ == "__main__":
    main()
