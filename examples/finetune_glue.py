"""Fine-tune BERT or RoBERTa on labelled texts: a task of GLUE, or a table of your own.

    python examples/finetune_glue.py --model DIR --task sst2 --data-dir DIR --out sst2
    python examples/finetune_glue.py --model DIR --train train.tsv --dev dev.tsv \\
        --text review --label stars --regression --out stars

A model is a folder in the hub's layout: config.json, model.safetensors, tokenizer.json.
The run's folder holds config, metrics, figures, report.html, checkpoints to go on from,
and in model/ the fine-tuned weights for AutoModelForSequenceClassification.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
from typing import Any, NamedTuple

from needs import extra

with extra("finetuning", __name__):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from finetuning import asked, bert, folders, loop, tables, training
    from finetuning.metrics import METRICS

    import raclora_jax as rl
    from raclora_jax import flax as rl_flax
    from raclora_jax import peft

DEFAULTS = asked.Defaults(
    "raclora-memory",
    {
        "raclora-memory": 4e-4,
        "raclora": 4e-4,
        "raclora-orthogonal": 4e-4,
        "lora": 2e-3,
        "full": 2e-4,
    },
    "tasks of GLUE with an encoder 384 wide",
)


class Task(NamedTuple):
    """What a task reads and is judged by, and settings that suit it."""

    columns: tables.Columns
    metric: str = "accuracy"
    length: int = 64
    steps: int = 1000
    regression: bool = False


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Task(tables.Columns(("3",), "1"), "Matthews correlation", 32),
    "mrpc": Task(
        tables.Columns(("#1 String", "#2 String"), "Quality"), "accuracy and F1", 80, 500
    ),
    "rte": Task(tables.Columns(PAIR, "label"), length=96, steps=500),
    "sst2": Task(tables.Columns(("sentence",), "label"), length=32, steps=2000),
    "stsb": Task(tables.Columns(PAIR, "score"), "Pearson and Spearman", 64, 500, True),
}


def arguments() -> asked.RunParser:
    """The command line."""
    parser = asked.RunParser(__doc__, DEFAULTS)
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, help="folder of the checkpoint")
    add("--task", choices=TASKS, help="a preset; needs --data-dir")
    add("--data-dir", type=pathlib.Path, help="folder with glue_TASK/train.tsv[.gz]")
    add("--train", type=pathlib.Path, help="a table of your own, TSV or JSONL")
    add("--dev", type=pathlib.Path, help="the table to judge by")
    add("--text", help="its column, or two separated by a comma")
    add("--label", help="the column of the label")
    add("--regression", action="store_true", help="the label is a number")
    own = Task(tables.Columns((), ""))
    for name, said in (
        ("steps", ""),
        ("length", "tokens of a training text, the rest is cut "),
    ):
        presets = {task: getattr(preset, name) for task, preset in TASKS.items()}
        presets = ", ".join(f"{value} for {task}" for task, value in presets.items())
        said += f"(default: {presets}, {getattr(own, name)} for your own)"
        add(f"--{name}", type=asked.count, help=said)
    for name, default, said in (
        ("--batch", 32, "texts a step"),
        ("--eval-every", 100, "steps from one evaluation to the next"),
        ("--patience", 10, "evaluations without gain, then it stops"),
    ):
        add(name, type=asked.count, default=default, help=f"{said} (default: {default})")
    return parser


def task_of(options: argparse.Namespace) -> tuple[Task, pathlib.Path, pathlib.Path]:
    """The task and its two tables."""
    if options.task:
        if options.data_dir is None:
            raise ValueError("--task needs --data-dir")
        folder = options.data_dir / f"glue_{options.task}"
        found = [
            next(
                (
                    f
                    for f in (folder / f"{part}.tsv.gz", folder / f"{part}.tsv")
                    if f.exists()
                ),
                folder / f"{part}.tsv",
            )
            for part in ("train", "dev")
        ]
        return TASKS[options.task], *found
    if None in (options.train, options.dev, options.text, options.label):
        raise ValueError("give --task, or all of --train, --dev, --text and --label")
    columns = tables.Columns(tuple(options.text.split(",")), options.label)
    metric = "Pearson and Spearman" if options.regression else "accuracy"
    return (
        Task(columns, metric, regression=options.regression),
        options.train,
        options.dev,
    )


class Problem:
    """A model, its data, and the loss: everything that does not depend on the method."""

    defaults = DEFAULTS

    def __init__(self, options: argparse.Namespace):
        folders.check_program(options.model, "finetune_glue.py")
        self.task, *files = task_of(options)
        self.length = options.length or self.task.length
        config = bert.Config.read(options.model)
        most = config.positions - config.offset
        if self.length > most:
            raise ValueError(
                f"--length {self.length} is beyond the model's {most} positions"
            )
        rows = [tables.read(file, self.task.columns) for file in files]
        self.labels = None if self.task.regression else tables.labels_of(rows[0])
        tokenizer = options.model / "tokenizer.json"
        parts, self.longer = [], 0
        # Judged are texts as long as the model can read.
        for file, part, length in zip(files, rows, (self.length, most), strict=True):
            wanted = tables.targets(file, part, self.labels)
            encoded, longer = tables.encode(
                part, wanted, tokenizer, length, config.padding
            )
            parts.append(encoded)
            self.longer += longer
        self.train, self.dev = parts
        self.length = self.train.ids.shape[1]
        outputs = 1 if self.labels is None else len(self.labels)
        self.model, self.fresh = bert.load(options.model, outputs, options.seed)
        self.params, self.restore = rl_flax.to_tree(self.model)
        self.metric = self.task.metric
        self._predict = jax.jit(lambda params, *inputs: self.logits(params, *inputs))

    def logits(self, params: Any, ids: jax.Array, types: jax.Array) -> jax.Array:
        """Of each row."""
        return self.restore(params)(ids, types)

    def loss(self, params: Any, ids: Any, types: Any, wanted: Any) -> jax.Array:
        """Cross entropy, or half the squared error."""
        found = self.logits(params, ids, types)
        if self.labels is None:
            return jnp.mean(optax.squared_error(found[:, 0], wanted)) / 2
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, wanted))

    def trainer(
        self, method: str, rate: optax.Schedule, spec: rl.Spec, seed: int, fused: bool
    ) -> training.Trainer:
        """A method on this model."""
        return training.trainer(method, rate, spec, self.loss, seed, fused)

    def batch(self, step: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
        """The rows of a step."""
        return self.train.take(loop.rows_of(step, size, seed, len(self.train)))

    @property
    def facts(self) -> dict[str, str]:
        """For the report."""
        return {
            "training rows": f"{len(self.train):,}",
            "dev rows": f"{len(self.dev):,}",
            "texts cut": f"{self.longer:,}",
            "leaves that started at random": ", ".join(self.fresh) or "none",
        }

    def judge(self, params: Any) -> dict[str, float]:
        """Loss and metric on the dev table."""
        found = []
        for start in range(0, len(self.dev), 128):
            ids, types, _ = self.dev.take(slice(start, start + 128))
            rows = len(ids)
            padded = [np.pad(a, ((0, 128 - rows), (0, 0))) for a in (ids, types)]
            padded[0][rows:, 0] = 1  # a row of padding alone would attend to nothing
            found.append(np.asarray(self._predict(params, *padded))[:rows])
        said, truth = np.concatenate(found), self.dev.targets
        metric = METRICS[self.metric]
        if self.labels is None:
            loss = float(np.mean((said[:, 0] - truth) ** 2) / 2)
            return {"dev_loss": loss, "dev_metric": metric(truth, said[:, 0])}
        loss = optax.softmax_cross_entropy_with_integer_labels(said, truth).mean()
        return {
            "dev_loss": float(loss),
            "dev_metric": float(metric(truth, said.argmax(axis=1))),
        }


def spec_for(options: argparse.Namespace, width: int) -> rl.Spec:
    """The matrices of all layers through sketches, the head in full, the rest frozen."""
    if options.spec is not None:
        return training.spec_of(options.spec)
    return rl.Spec(
        **training.settings(options.method, options.rank, width),
        rules=[
            rl.Rule("(pooler|head)/.*", mode="dense"),
            rl.Rule(".*/kernel", rows=(0,)),
            rl.Rule(".*", mode="frozen"),
        ],
    )


def export(
    folder: pathlib.Path, options: argparse.Namespace, problem: Problem, params: Any
) -> None:
    """The model as Transformers loads it, with config and tokenizer of the old one."""
    names = bert.names(problem.model.config, problem.params, None)
    # No leaf has more than two axes: any spec says the views.
    peft.save_model(folder, params, 1, names)
    for file in sorted(options.model.iterdir()):
        if file.suffix in (".json", ".txt") and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    _say_labels(folder / "config.json", problem.labels)


def _say_labels(file: pathlib.Path, labels: list[str] | None) -> None:
    """Tells Transformers what the outputs are."""
    config = json.loads(file.read_text())
    config["problem_type"] = (
        "regression" if labels is None else "single_label_classification"
    )
    config["id2label"] = dict(enumerate(labels or ["value"]))
    config["label2id"] = {label: number for number, label in config["id2label"].items()}
    file.write_text(json.dumps(config, indent=1) + "\n")


def fine_tune(options: argparse.Namespace) -> Problem:
    """The run that the options ask for, and what it was about.

    Raises:
      ValueError: For bad input.
    """
    problem = Problem(options)
    steps = options.steps or problem.task.steps
    spec = spec_for(options, problem.model.config.width)
    loop.train(options, problem, spec, steps, export)
    return problem


def main() -> None:
    """One line and exit code 2 for bad input."""
    options = arguments().asked()
    with asked.one_line():
        fine_tune(options)


if __name__ == "__main__":
    main()
