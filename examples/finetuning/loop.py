"""The loop of a run: steps, evaluations, checkpoints, the report at its end."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import raclora_jax as rl
from finetuning import runs, training
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
    export: Callable[[argparse.Namespace, Any, Any], None],
) -> None:
    """Trains, from the last checkpoint if there is one, and writes everything."""
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
    step_fn = jax.jit(method.step, donate_argnums=0)
    state = jax.jit(method.init)(problem.params)
    best: dict[str, float] = {"step": 0, "metric": -np.inf, "stale": 0}
    with (
        checkpoint.Checkpointer(options.out / "checkpoints", spec, keep=2) as keeper,
        run.progress() as progress,
    ):
        done, held = 0, {"state": state, "best": method.params(state)}
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
            row = {"loss": _mean(losses, done)}
            rows = (done - first) * options.batch
            row["tokens_per_second"] = (
                rows * problem.length / (time.perf_counter() - begun)
            )
            params = method.params(state)
            row |= problem.judge(params)
            if options.method.startswith("raclora"):
                link = done // spec.resample_every
                row["captured"], row["lambda"] = training.captured(
                    problem.loss, params, spec, link, options.seed, *batch
                )
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
        export(options, problem, best_params)
    page = report(options, problem, run, method, spec, best, best_params)
    run.console.print(f"{page} and {options.out / 'model'}")


def _mean(losses: list[jax.Array], step: int) -> float:
    mean = float(np.mean(jax.device_get(losses)))
    if not np.isfinite(mean):
        raise ValueError(
            f"the loss is {mean} at step {step}: lower --learning-rate; the last "
            "checkpoint is as it was"
        )
    return mean


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
    if options.method.startswith("raclora"):
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
