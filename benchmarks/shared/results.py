"""The rows of a contest of methods: saved as they come, the missing ones filled in."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.shared import rows as result_rows

# Two runs go side by side.
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def use_one_core() -> None:
    """Gives each process of this program one core; before JAX starts.

    The linear algebra of NumPy and SciPy, which a singular value decomposition goes to,
    reads its own variable when it is loaded: in the processes begun after this.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE}"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


class Results:
    """The rows so far, saved whenever one is added.

    Args:
      path: The file; its rows are taken over. ``None`` keeps nothing.
      program: The module of ``benchmarks`` that makes the rows.
      **settings: What all rows share.
    """

    def __init__(self, path: pathlib.Path | None, program: str, **settings: Any):
        self.path, self.rows = path, []
        self._program, self._settings = f"python -m benchmarks.{program}", settings
        made = result_rows.provenance()
        # Rows of one file may come from several runs.
        self._made = {"commit": made["commit"], "device": made["device"]} | {
            "jax": made["versions"]["jax"]
        }
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """In the place of the row of the same study and method, if there is one."""
        row = row | self._made
        same = [self._name(row) == self._name(old) for old in self.rows]
        if any(same):
            self.rows[same.index(True)] = row
        else:
            self.rows.append(row)
        if self.path is not None:
            flags = os.environ.get("XLA_FLAGS", "").strip()
            settings = self._settings | {"xla_flags": flags}
            result_rows.save(self.path, self._program, self.rows, **settings)

    def drop(self, study: str) -> None:
        """Forgets a study."""
        self.rows = [row for row in self.rows if row["study"] != study]

    def replace(self, study: str, rows: Iterable[dict[str, Any]]) -> None:
        """A study by new rows: times of two races do not stand side by side."""
        rows = list(rows)
        self.drop(study)
        for row in rows:
            self.add(row | {"study": study})

    def get(self, study: str, method: str) -> dict[str, Any] | None:
        """The row of a study and a method."""
        wanted = (study, method)
        return next((row for row in self.rows if self._name(row) == wanted), None)

    def fill(
        self,
        work: Callable[..., dict[str, Any]],
        jobs: Iterable[dict[str, Any]],
        workers: int,
        each: int = 4,
    ) -> None:
        """Adds ``work(**job)`` for every job, several side by side, and prints it."""
        for _, row in side_by_side(_Keywords(work), list(jobs), workers, each):
            self.add(row)
            print(
                f"{row['study']:16} {row['method']:44} {row['steps']:5} steps "
                f"rate {row['rate']:<8g} {row['loss_mean']:.3f} "
                f"± {row['loss_std'] or 0:.3f}  {row['seconds']} s",
                flush=True,
            )

    @staticmethod
    def _name(row: dict[str, Any]) -> tuple[str, str]:
        return row["study"], row["method"]


class _Keywords(NamedTuple):
    """A function of a dict of its arguments, which another process can be sent."""

    work: Callable[..., Any]

    def __call__(self, job: dict[str, Any]) -> Any:
        return self.work(**job)


def side_by_side(
    work: Callable[[Any], Any], jobs: list[Any], workers: int, each: int = 4
) -> Iterator[tuple[Any, Any]]:
    """``(job, work(job))`` of every job as they come, in processes of their own.

    Compiled programs stay in memory, so processes take ``each`` jobs and are replaced:
    all at once, since a pool that replaces its own one by one may stand still.
    """
    spawn = multiprocessing.get_context("spawn")
    for start in range(0, len(jobs), each * workers):
        with concurrent.futures.ProcessPoolExecutor(
            workers, spawn, initializer=_end_with_parent
        ) as pool:
            now = jobs[start : start + each * workers]
            running = {pool.submit(work, job): job for job in now}
            for done in concurrent.futures.as_completed(running):
                yield running[done], done.result()


def _end_with_parent() -> None:
    """Ends this process when the one that began it is gone, in the middle of a job."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
