"""The loop of a run: steps, evaluations, checkpoints, the report at its end."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import raclora_jax as rl
from finetuning import asked, folders, runs, search, training
from finetuning.search import Problem
from raclora_jax import checkpoint

_SHOWN = 10  # steps from one look at the loss to the next


class Job(NamedTuple):
    """What is to be done."""

    options: argparse.Namespace
    problem: Problem
    spec: rl.Spec
    steps: int
    rate: search.Rate

    @property
    def schedule(self) -> optax.Schedule:
        """Of the learning rate."""
        return training.schedule(self.rate.peak, self.steps)

    def method(self) -> training.Trainer:
        """How it trains."""
        options = self.options
        return self.problem.trainer(
            options.method, self.schedule, self.spec, options.seed, options.fused
        )


def rows_of(step: int, size: int, seed: int, count: int) -> np.ndarray:
    """Which of some rows a step takes: whole passes, each in an order of its own."""
    epoch, place = divmod(step, max(1, count // size))
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[place * size : (place + 1) * size]


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

    Raises:
      ValueError: For bad input, or if training diverges.
      KeyboardInterrupt: On Ctrl-C, behind a step; the state is saved.
    """
    rate = search.stated(options, problem.defaults)
    job = Job(options, problem, spec, steps, rate)
    method = job.method()
    if options.dry_run:
        inputs = problem.batch(0, options.batch, options.seed)
        print(rl.summary(problem.params, spec, problem.loss, *inputs))
        return
    searching = options.learning_rate == asked.SEARCH
    config = _config(options, problem, spec, steps)
    if not searching:
        config["learning_rate"] = f"{rate.peak:g}"
    run = runs.Run(options.out, config, resume=options.resume)
    run.console.print(
        ", ".join(f"{name}: {fact}" for name, fact in problem.facts.items())
    )
    with asked.Interrupt() as interrupt:
        if searching:
            rate = search.searched(options, problem, spec, steps, interrupt)
            job = job._replace(rate=rate)
            method = job.method()
            run.config["learning_rate"] = f"{rate.peak:g}"
        run.console.print(f"learning rate {rate.peak:g}: {rate.why}")
        best, params = _steps(job, run, method, interrupt)
    with folders.whole(options.out / "model") as folder:
        export(folder, options, problem, params)
    page = report(job, run, method.bytes(problem.params), best, params)
    run.console.print(f"{page} and {options.out / 'model'}")


def _config(
    options: argparse.Namespace, problem: Problem, spec: rl.Spec, steps: int
) -> dict[str, Any]:
    """What was asked for, and what it came to; the rate is known later."""
    passing = ("out", "resume", "dry_run", "learning_rate", "rank", "fused")
    given = {k: v for k, v in vars(options).items() if k not in passing}
    whole = given | {
        "steps": steps,
        "length": problem.length,
        "metric": problem.metric,
        "rate_search": options.learning_rate == asked.SEARCH,
        **training.effective(options.method, spec),
    }
    return {name: value for name, value in whole.items() if value is not None}


def _steps(
    job: Job, run: runs.Run, method: training.Trainer, interrupt: asked.Interrupt
) -> tuple[dict[str, float], Any]:
    """From the last checkpoint to the end: which evaluation was best, and its weights."""
    options, problem, spec, steps, _ = job
    schedule = job.schedule
    step_fn = jax.jit(method.step, donate_argnums=0)
    state = jax.jit(method.init)(problem.params)
    ours, captured = options.method.startswith("raclora"), None
    if ours and training.projects(spec):
        captured = training.captured(problem.loss, spec, options.seed)
    with (
        checkpoint.Checkpointer(options.out / "checkpoints", spec, keep=2) as keeper,
        run.progress() as progress,
    ):
        # A copy: the first step gives its state's memory away.
        first_params = jax.tree.map(jnp.copy, method.params(state))
        done, held = 0, {"state": state, "best": first_params}
        best: dict[str, float] = {}
        recent: list[Any] = []  # losses since the last evaluation
        if keeper.latest() is not None:
            done, held, data, _ = keeper.restore(held)
            best, recent = data["best"], data["recent"]
        state, best_params = held["state"], held["best"]
        if done > steps:
            raise ValueError(
                f"{options.out} has done {done} steps: --steps {steps} are fewer"
            )
        run.begin(done)
        if done:
            _say_how_it_goes_on(run, done, steps, float(schedule(done)))
        if not run.rows:
            run.log(0, **_judged(problem, problem.params, 0))
        if not best:
            best = {"step": 0, "score": _score(run.rows[0]), "stale": 0}
        bar = progress.add_task(options.out.name, total=steps, completed=done, said="")
        seen = _said(run.rows[-1], problem)

        def save() -> None:
            losses = np.asarray(jax.device_get(recent), np.float64).tolist()
            held = {"state": state, "best": best_params}
            keeper.save(done, held, data={"best": best, "recent": losses})

        while done < steps and best["stale"] < options.patience:
            begun, first = time.perf_counter(), done
            until = min(steps, done - done % options.eval_every + options.eval_every)
            while done < until:
                batch = problem.batch(done, options.batch, options.seed)
                state, loss = step_fn(state, *batch)
                done += 1
                recent.append(loss)
                if done % _SHOWN == 0:
                    shown = _finite(_mean(recent[-_SHOWN:]), "loss", done)
                    said = f"loss {shown:.3f}, rate {float(schedule(done)):.2g}, "
                    if ours:
                        link, place = divmod(done, spec.resample_every)
                        said += f"link {link} step {place}, "
                    progress.update(bar, completed=done, said=said + seen)
                if interrupt.asked and done < until:
                    save()
                    raise KeyboardInterrupt(
                        f"stopped and saved at step {done}; go on with"
                    )
            row = {"loss": _finite(_mean(recent), "loss", done)}
            row["learning_rate"] = float(schedule(done - 1))
            rows = (done - first) * options.batch
            row["tokens_per_second"] = (
                rows * problem.length / (time.perf_counter() - begun)
            )
            params = method.params(state)
            row |= _judged(problem, params, done)
            if captured is not None:
                link = done // spec.resample_every
                row["captured"], row["lambda"] = captured(params, link, *batch)
            run.log(done, **row)
            best["stale"] += 1
            if _score(row) > best["score"]:
                best = {"step": done, "score": _score(row), "stale": 0}
                best_params = jax.tree.map(jnp.copy, params)
            recent = []
            save()
            seen = _said(row, problem)
            progress.update(bar, completed=done, said=seen)
            if interrupt.asked and done < steps:
                raise KeyboardInterrupt(f"stopped and saved at step {done}; go on with")
    if done < steps:
        run.console.print(
            f"stopped at step {done}: {options.patience} evaluations without gain; with "
            "--resume and more --patience it goes on"
        )
    return best, best_params


def _say_how_it_goes_on(run: runs.Run, done: int, steps: int, rate: float) -> None:
    """Where a run goes on, and by which rate if it is to be longer."""
    said, before = f"going on from step {done}", run.before.get("steps")
    if before != str(steps):
        said += (
            f", to {steps} in place of {before}: the cosine is now that of {steps} "
            f"steps, with a rate of {rate:.2g} here"
        )
    run.console.print(said)


def _judged(problem: Problem, params: Any, step: int) -> dict[str, float]:
    found = problem.judge(params)
    _finite(found["dev_loss"], "loss on held-out data", step)
    return found


def _score(row: dict[str, float]) -> float:
    """More is better."""
    return row.get("dev_metric", -row["dev_loss"])


def _said(row: dict[str, float], problem: Problem) -> str:
    """An evaluation, for the bar."""
    said = f"dev {problem.metric} {row.get('dev_metric', row['dev_loss']):.4f}"
    if "tokens_per_second" in row:
        said += f", {row['tokens_per_second']:,.0f} tokens/s"
    return said + _memory()


def _mean(losses: list[Any]) -> float:
    return float(np.mean(np.asarray(jax.device_get(losses), np.float64)))


def _finite(value: float, name: str, step: int) -> float:
    if not np.isfinite(value):
        way_out = (
            f"lower --learning-rate, or let it be {asked.SEARCH}ed; the last checkpoint "
            "is as it was"
            if step
            else "the model's own weights do that, before any training"
        )
        raise ValueError(f"the {name} is {value} at step {step}: {way_out}")
    return float(value)


def _memory() -> str:
    """What the device says it holds, where it says so."""
    held = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    return "" if held is None else f", {held / 2**30:.1f} GiB"


def report(
    job: Job, run: runs.Run, size: int, best: dict[str, float], params: Any
) -> pathlib.Path:
    """The page about the run.

    Args:
      job: What was to be done.
      run: What was logged.
      size: Bytes of the optimizer's state.
      best: The best evaluation.
      params: The weights there.
    """
    options, problem, spec, _, rate = job
    first = run.rows[0]
    last = next(row for row in run.rows if row["step"] == best["step"])
    both = {
        name: f"{first[key]:.4f} before, {last[key]:.4f} after"
        for name, key in (("loss", "dev_loss"), (problem.metric, "dev_metric"))
        if key in first
    }
    losses = {"training": run.curve("loss"), "dev": run.curve("dev_loss")}
    figures = {"Loss": runs.lines(losses, "loss")}
    if "dev_metric" in first:
        judged = {problem.metric: run.curve("dev_metric")}
        figures["Dev metric"] = runs.lines(judged, problem.metric)
    moved = training.moved(problem.params, params)
    sizes = {path: size for path, size in moved.items() if size}
    if sizes:
        figures["Update size per layer"] = runs.bars(sizes, "|change| / |weight|")
    if run.curve("captured")[0]:
        shares = {"captured": run.curve("captured"), "lambda": run.curve("lambda")}
        figures["Captured share per link"] = runs.lines(shares, "share of the gradient")
    speed = np.median(run.curve("tokens_per_second")[1])
    facts = {
        **{f"held-out {name}": said for name, said in both.items()},
        "learning rate": f"{rate.peak:g}, {rate.why}",
        **problem.facts,
        "optimizer bytes": f"{size:,}",
        "tokens a second": f"{speed:,.0f}",
    }
    lead = (
        f"{options.method} on {options.model.name}, held-out {problem.metric}: "
        f"{both[problem.metric]}, at step {best['step']:.0f} of {run.rows[-1]['step']}."
    )
    if not best["step"]:
        lead += " No evaluation was better than the one before training."
    run.console.print(lead)
    return run.report(lead, facts, figures, str(rl.summary(problem.params, spec)))
