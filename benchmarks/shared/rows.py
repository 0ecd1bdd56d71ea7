"""Result files: every number this project states comes from one of these."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_BENCH = pathlib.Path(__file__).parents[1]
ROOT = _BENCH.parent
_PACKAGES = ("raclora-jax", "jax", "jaxlib", "optax", "flax", "numpy")


def folder(program: str) -> pathlib.Path:
    """Where a program keeps its rows, ``results`` beside it; takes its ``__file__``."""
    return pathlib.Path(program).parent / "results"


def record(name: str) -> dict[str, Any]:
    """What a result file holds, by folder and name, such as ``"speed/step_time"``."""
    study, _, file = name.partition("/")
    return json.loads((_BENCH / study / "results" / f"{file}.json").read_text())


def read(name: str) -> list[dict]:
    """The rows of a result file, by folder and name."""
    return record(name)["rows"]


def save(
    path: str | os.PathLike[str], program: str, rows: list[dict], **settings
) -> None:
    """Writes rows with what is needed to repeat them, beside the target, then renames.

    Args:
      path: The JSON file.
      program: The command that made the rows.
      rows: One dict per measured case.
      **settings: What all rows share, such as seeds and grids.
    """
    path = pathlib.Path(path)
    record = {"program": program, **provenance(), "settings": settings, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def provenance() -> dict[str, Any]:
    """Commit, date, versions and device of this run."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
        if jax.default_backend() == "cpu"
        else jax.devices()[0].device_kind,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, marked when the tree holds changes beside results."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/raclora_jax"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
