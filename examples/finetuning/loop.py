"""The loop of a run: steps, evaluations, checkpoints, the report at its end."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import raclora_jax as rl
from finetuning import folders, runs, training
from raclora_jax import checkpoint


class Problem(Protocol):
    """A model, its data and its loss.

    Attributes:
      params: The weights before, a tree.
      length: Tokens a row.
      metric: What ``dev_metric`` is, more of it is better; or ``"loss"``, of which it is
        the negative.
      facts: What the report says of the data.
    """

    params: Any
    length: int
    metric: str
    facts: dict[str, str]

    def loss(self, params: Any, *batch: Any) -> jax.Array:
        """Of a batch."""

    def trainer(
        self, method: str, rate: optax.Schedule, spec: rl.Spec, seed: int
    ) -> training.Trainer:
        """A method on this model."""

    def batch(self, step: int, size: int, seed: int) -> tuple[np.ndarray, ...]:
        """The rows of a step, a function of its number."""

    def judge(self, params: Any) -> dict[str, float]:
        """``dev_loss`` and ``dev_metric``."""


def rows_of(step: int, size: int, seed: int, count: int) -> np.ndarray:
    """Which of some rows a step takes: whole passes, each in an order of its own."""
    epoch, place = divmod(step, max(1, count // size))
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[place * size : (place + 1) * size]


class Parser(argparse.ArgumentParser):
    """The command line that both programs share; what is wrong with one is one line.

    Args:
      description: The program's own.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add = self.add_argument
        add(
            "--method",
            choices=training.RATES,
            default="raclora",
            help="raclora has Adam inside; raclora-orthogonal keeps no state",
        )
        add("--rank", type=count, default=16)
        add("--spec", type=pathlib.Path, help="a spec in TOML, in place of --rank")
        add("--learning-rate", type=rate, help="peak; 10 %% warm-up, a cosine to zero")
        add("--seed", type=int, default=0)
        add("--out", type=pathlib.Path, help="the run's folder")
        add("--resume", action="store_true", help="go on with the run in --out")
        add("--dry-run", action="store_true", help="say what it would cost, and stop")

    def error(self, message: str) -> NoReturn:
        """Without the list of all options before it."""
        self.exit(2, f"{self.prog}: {message}\n")

    def asked(self) -> argparse.Namespace:
        """What was asked for; a run has a folder."""
        options = self.parse_args()
        if options.out is None and not options.dry_run:
            self.error("give --out, or --dry-run")
        return options


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def rate(text: str) -> float:
    """A number above 0."""
    found = float(text)
    if not 0 < found < np.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return found


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Bad input ends the program with one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def train(
    options: argparse.Namespace,
    problem: Problem,
    spec: rl.Spec,
    steps: int,
    export: Callable[[pathlib.Path, argparse.Namespace, Any, Any], None],
) -> None:
    """Trains, from the last checkpoint if there is one, and writes everything.

    Args:
      options: What was asked for.
      problem: The model and its data.
      spec: Which leaves are adapted, and how.
      steps: Of the whole run.
      export: ``export(folder, options, problem, params)`` writes the tuned model.
    """
    peak = options.learning_rate or training.RATES[options.method]
    rate = training.schedule(peak, steps, 0.1)
    method = problem.trainer(options.method, rate, spec, options.seed)
    if options.dry_run:
        inputs = problem.batch(0, options.batch, options.seed)
        print(rl.summary(problem.params, spec, problem.loss, *inputs))
        return
    passing = ("resume", "dry_run")
    asked = {k: str(v) for k, v in vars(options).items() if k not in passing}
    run = runs.Run(options.out, asked, resume=options.resume)
    run.console.print(
        ", ".join(f"{name}: {fact}" for name, fact in problem.facts.items())
    )
    step_fn = jax.jit(method.step, donate_argnums=0)
    state = jax.jit(method.init)(problem.params)
    captured = None
    if options.method.startswith("raclora") and training.projects(spec):
        captured = training.captured(problem.loss, spec, options.seed)
    best: dict[str, float] = {"step": 0, "metric": -np.inf, "stale": 0}
    with (
        checkpoint.Checkpointer(options.out / "checkpoints", spec, keep=2) as keeper,
        run.progress() as progress,
    ):
        # A copy: the first step gives its state's memory away.
        first_params = jax.tree.map(jnp.copy, method.params(state))
        done, held = 0, {"state": state, "best": first_params}
        if keeper.latest() is not None:
            done, held, best, _ = keeper.restore(held)
            run.console.print(f"going on from step {done}")
        state, best_params = held["state"], held["best"]
        run.begin(done)
        bar = progress.add_task(options.out.name, total=steps, completed=done, said="")
        while done < steps and best["stale"] < options.patience:
            begun, first, losses = time.perf_counter(), done, []
            until = min(steps, done - done % options.eval_every + options.eval_every)
            while done < until:
                batch = problem.batch(done, options.batch, options.seed)
                state, loss = step_fn(state, *batch)
                done += 1
                losses.append(loss)
                progress.update(bar, completed=done)
            row = {"loss": _finite(np.mean(jax.device_get(losses)), "loss", done)}
            rows = (done - first) * options.batch
            row["tokens_per_second"] = (
                rows * problem.length / (time.perf_counter() - begun)
            )
            params = method.params(state)
            row |= problem.judge(params)
            _finite(row["dev_loss"], "loss on held-out data", done)
            if captured is not None:
                link = done // spec.resample_every
                row["captured"], row["lambda"] = captured(params, link, *batch)
            run.log(done, **row)
            best["stale"] += 1
            if row["dev_metric"] > best["metric"]:
                best = {"step": done, "metric": row["dev_metric"], "stale": 0}
                best_params = jax.tree.map(jnp.copy, params)
            keeper.save(done, {"state": state, "best": best_params}, data=best)
            said = f"loss {row['loss']:.3f}, dev {row['dev_metric']:.4f}, "
            said += f"{row['tokens_per_second']:,.0f} tokens/s{_memory()}"
            progress.update(bar, said=said)
    if not (options.out / "model").exists():
        with folders.whole(options.out / "model") as folder:
            export(folder, options, problem, best_params)
    page = report(options, problem, run, method, spec, best, best_params)
    run.console.print(f"{page} and {options.out / 'model'}")


def _finite(value: float, name: str, step: int) -> float:
    if not np.isfinite(value):
        raise ValueError(
            f"the {name} is {value} at step {step}: lower --learning-rate; the last "
            "checkpoint is as it was"
        )
    return float(value)


def _memory() -> str:
    """What the device says it holds, where it says so."""
    held = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    return "" if held is None else f", {held / 2**30:.1f} GiB"


def report(
    options: argparse.Namespace,
    problem: Problem,
    run: runs.Run,
    method: training.Trainer,
    spec: rl.Spec,
    best: dict[str, float],
    params: Any,
) -> pathlib.Path:
    """The page about the run."""
    losses = {"training": run.curve("loss"), "dev": run.curve("dev_loss")}
    figures = {"Loss": runs.lines(losses, "loss")}
    reached = f"{problem.metric} {best['metric']:.4f}"
    if problem.metric == "loss":
        reached = f"loss {-best['metric']:.4f}"
    else:
        judged = {problem.metric: run.curve("dev_metric")}
        figures["Dev metric"] = runs.lines(judged, problem.metric)
    moved = training.moved(problem.params, params)
    sizes = {path: size for path, size in moved.items() if size}
    figures["Update size per layer"] = runs.bars(sizes, "|change| / |weight|")
    if run.curve("captured")[0]:
        shares = {"captured": run.curve("captured"), "lambda": run.curve("lambda")}
        figures["Captured share per link"] = runs.lines(shares, "share of the gradient")
    speed = np.median(run.curve("tokens_per_second")[1])
    facts = problem.facts | {
        "optimizer bytes": f"{method.bytes(problem.params):,}",
        "tokens a second": f"{speed:,.0f}",
    }
    lead = (
        f"{options.method} on {options.model.name}: {reached} on held-out data, at step "
        f"{best['step']:.0f}."
    )
    run.console.print(lead)
    return run.report(lead, facts, figures, str(rl.summary(problem.params, spec)))
