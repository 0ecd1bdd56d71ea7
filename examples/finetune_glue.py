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
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from finetuning import bert, runs, tables, training
from finetuning.metrics import METRICS

import raclora_jax as rl
from raclora_jax import checkpoint, peft
from raclora_jax import flax as rl_flax


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
    "sst2": Task(tables.Columns(("sentence",), "label"), length=32, steps=1500),
    "stsb": Task(tables.Columns(PAIR, "score"), "Pearson and Spearman", 64, 500, True),
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, help="folder of the checkpoint")
    add("--task", choices=TASKS, help="a preset; needs --data-dir")
    add("--data-dir", type=pathlib.Path, help="folder with glue_TASK/train.tsv[.gz]")
    add("--train", type=pathlib.Path, help="a table of your own, TSV or JSONL")
    add("--dev", type=pathlib.Path, help="the table to judge by")
    add("--text", help="its column, or two separated by a comma")
    add("--label", help="the column of the label")
    add("--regression", action="store_true", help="the label is a number")
    add("--method", choices=training.RATES, default="raclora")
    add("--rank", type=int, default=16)
    add("--spec", type=pathlib.Path, help="a spec in TOML, in place of --rank")
    add("--learning-rate", type=float, help="peak; after 10 %% warm-up a cosine to zero")
    add("--steps", type=int)
    add("--batch", type=int, default=32)
    add("--length", type=int, help="tokens a text, the rest is cut")
    add("--eval-every", type=int, default=100)
    add("--patience", type=int, default=5, help="evaluations without gain before a stop")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, help="the run's folder")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--dry-run", action="store_true", help="say what it would cost, and stop")
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

    def __init__(self, options: argparse.Namespace):
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
        for file, part in zip(files, rows, strict=True):
            wanted = tables.targets(file, part, self.labels)
            encoded, longer = tables.encode(
                part, wanted, tokenizer, self.length, config.padding
            )
            parts.append(encoded)
            self.longer += longer
        self.train, self.dev = parts
        outputs = 1 if self.labels is None else len(self.labels)
        self.model, self.fresh = bert.load(options.model, outputs, options.seed)
        self.params, self.restore = rl_flax.to_tree(self.model)
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

    def batch(self, step: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
        """The rows of a step: whole passes in new orders, a function of seed and step."""
        each = max(1, len(self.train) // size)
        epoch, place = divmod(step, each)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.train))
        return self.train.take(order[place * size : (place + 1) * size])

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
        metric = METRICS[self.task.metric]
        if self.labels is None:
            loss = float(np.mean((said[:, 0] - truth) ** 2) / 2)
            return {"dev_loss": loss, "dev_metric": metric(truth, said[:, 0])}
        loss = optax.softmax_cross_entropy_with_integer_labels(said, truth).mean()
        return {
            "dev_loss": float(loss),
            "dev_metric": float(metric(truth, said.argmax(axis=1))),
        }


def spec_for(options: argparse.Namespace) -> rl.Spec:
    """The matrices of all layers through sketches, the head in full, the rest frozen."""
    if options.spec is not None:
        return training.spec_of(options.spec)
    return rl.Spec(
        options.rank,
        rules=[
            rl.Rule("(pooler|head)/.*", mode="dense"),
            rl.Rule(".*/kernel", rows=(0,)),
            rl.Rule(".*", mode="frozen"),
        ],
    )


def train(options: argparse.Namespace, problem: Problem) -> None:
    """Trains, from the last checkpoint if there is one, and writes everything."""
    steps = options.steps or problem.task.steps
    peak = options.learning_rate or training.RATES[options.method]
    spec = spec_for(options)
    rate = training.schedule(peak, steps, 0.1)
    method = training.trainer(options.method, rate, spec, problem.loss, options.seed)
    inputs = problem.batch(0, options.batch, options.seed)
    if options.dry_run:
        print(rl.summary(problem.params, spec, problem.loss, *inputs))
        return
    asked = {
        k: str(v) for k, v in vars(options).items() if k not in ("resume", "dry_run")
    }
    run = runs.Run(options.out, asked, resume=options.resume)
    step_fn = jax.jit(method.step, donate_argnums=0)
    state = jax.jit(method.init)(problem.params)
    best: dict[str, float] = {"step": 0, "metric": -np.inf, "stale": 0}
    with checkpoint.Checkpointer(options.out / "checkpoints", spec, keep=2) as keeper:
        done = 0
        held = {"state": state, "best": method.params(state)}
        if keeper.latest() is not None:
            done, held, best, _ = keeper.restore(held)
            run.console.print(f"going on from step {done}")
        state, best_params = held["state"], held["best"]
        run.begin(done)
        with run.progress() as progress:
            bar = progress.add_task(
                options.out.name, total=steps, completed=done, said=""
            )
            while done < steps and best["stale"] < options.patience:
                begun, first = time.perf_counter(), done
                until = min(steps, done - done % options.eval_every + options.eval_every)
                losses = []
                while done < until:
                    batch = problem.batch(done, options.batch, options.seed)
                    state, loss = step_fn(state, *batch)
                    done += 1
                    losses.append(loss)
                    progress.update(bar, completed=done)
                params = method.params(state)
                row = {"loss": float(np.mean(jax.device_get(losses)))}
                if not np.isfinite(row["loss"]):
                    raise ValueError(
                        f"the loss is {row['loss']} at step {done}: lower "
                        "--learning-rate; the last checkpoint is as it was"
                    )
                spent = time.perf_counter() - begun
                row["tokens_per_second"] = (
                    (done - first) * options.batch * problem.length / spent
                )
                row |= problem.judge(params)
                if options.method == "raclora":
                    link = done // spec.resample_every
                    row["captured"], row["lambda"] = training.captured(
                        problem.loss, params, spec, link, options.seed, *batch
                    )
                run.log(done, **row)
                best["stale"] += 1
                if row["dev_metric"] > best["metric"]:
                    best = {"step": done, "metric": row["dev_metric"], "stale": 0}
                    best_params = jax.tree.map(jnp.copy, params)
                held = {"state": state, "best": best_params}
                keeper.save(done, held, data=best)
                said = f"loss {row['loss']:.3f}, dev {row['dev_metric']:.4f}, "
                said += f"{row['tokens_per_second']:,.0f} tokens/s"
                progress.update(bar, said=said)
    finish(options, problem, run, method, spec, best, best_params)


def finish(
    options: argparse.Namespace,
    problem: Problem,
    run: runs.Run,
    method: training.Trainer,
    spec: rl.Spec,
    best: dict[str, float],
    params: Any,
) -> None:
    """The model of the best evaluation, and the page about the run."""
    folder = options.out / "model"
    if not folder.exists():
        names = bert.names(problem.model.config, problem.params, None)
        # No leaf has more than two axes: any spec says the views.
        peft.save_model(folder, params, 1, names)
        for file in sorted(options.model.iterdir()):
            if file.suffix in (".json", ".txt") and "index" not in file.name:
                shutil.copy(file, folder / file.name)
        _say_labels(folder / "config.json", problem.labels)
    metric = problem.task.metric
    lead = (
        f"{options.method} on {options.task or options.train.name}: {metric} "
        f"{100 * best['metric']:.2f} % on the dev table, at step {best['step']}."
    )
    figures = {
        "Loss": runs.lines(
            {"training": run.curve("loss"), "dev": run.curve("dev_loss")}, "loss"
        ),
        "Dev metric": runs.lines({metric: run.curve("dev_metric")}, metric),
        "Update size per layer": runs.bars(
            training.moved(problem.params, params), "|change| / |weight|"
        ),
    }
    if options.method == "raclora":
        figures["Captured share per link"] = runs.lines(
            {"captured": run.curve("captured"), "lambda": run.curve("lambda")},
            "share of the gradient",
        )
    facts = {
        "training rows": f"{len(problem.train):,}",
        "dev rows": f"{len(problem.dev):,}",
        "texts cut": f"{problem.longer:,}",
        "leaves that started at random": ", ".join(problem.fresh) or "none",
        "optimizer bytes": f"{method.bytes(problem.params):,}",
        "tokens a second": f"{np.median(run.curve('tokens_per_second')[1]):,.0f}",
    }
    page = run.report(lead, facts, figures, str(rl.summary(problem.params, spec)))
    run.console.print(lead)
    run.console.print(f"{page} and {folder}")


def _say_labels(file: pathlib.Path, labels: list[str] | None) -> None:
    """Tells Transformers what the outputs are."""
    config = json.loads(file.read_text())
    config["problem_type"] = (
        "regression" if labels is None else "single_label_classification"
    )
    config["id2label"] = dict(enumerate(labels or ["value"]))
    config["label2id"] = {label: number for number, label in config["id2label"].items()}
    file.write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """One line and exit code 2 for bad input."""
    parser = arguments()
    options = parser.parse_args()
    if options.out is None and not options.dry_run:
        parser.error("give --out, or --dry-run")
    try:
        train(options, Problem(options))
    except (ValueError, OSError) as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
