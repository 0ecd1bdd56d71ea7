"""A run's folder: its config, its metrics as they come, figures and a page to read."""

from __future__ import annotations

import base64
import html
import io
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from finetuning import folders, jsonl

_MAY_CHANGE = ("steps", "patience")  # with --resume

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.lead { font-size: 1.15rem; } img { width: 100%; background: white; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0;
        text-align: left; border-bottom: 1px solid #8884; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid #8884; padding: .6rem; }
"""


class Run:
    """The folder of one run.

    Args:
      folder: Made if it is not there.
      config: What the run was asked to do.
      resume: Whether the folder may hold a run, of the same config, to go on with.

    Attributes:
      before: The config that the folder held, if any.

    Raises:
      ValueError: If the folder exists and is not to be resumed, or of another config.
    """

    def __init__(self, folder: pathlib.Path, config: dict[str, Any], *, resume: bool):
        self.folder, self.config = folder, {k: str(v) for k, v in config.items()}
        self.before: dict[str, Any] = {}
        held = folder.iterdir() if folder.exists() else ()
        if any(entry.suffix != ".partial" for entry in held):
            if not resume:
                raise ValueError(f"{folder} exists; name another, or say --resume")
            if not (folder / "config.json").exists():
                raise ValueError(f"{folder} holds no run to go on with; name another")
            self.before = folders.stated(folder)
            differing = [
                f"{name} {self.before.get(name, 'not stated')} and not {wanted}"
                for name, wanted in self.config.items()
                if name not in _MAY_CHANGE and self.before.get(name) != wanted
            ]
            if differing:
                raise ValueError(
                    f"{folder} is a run with {', '.join(differing)}; ask for what it "
                    "has, or name another --out"
                )
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.console = Console()
        if not self.before:
            self._write_config()

    def begin(self, step: int) -> None:
        """Takes over what was logged up to a step; what came after is done again."""
        self._write_config()
        rows = jsonl.rows(self._file, ("step", "dev_loss"))
        self.rows = [row for row in rows if row["step"] <= step]
        jsonl.write(self._file, self.rows)

    def _write_config(self) -> None:
        partial = self.folder / "config.partial"
        partial.write_text(json.dumps(self.config, indent=1) + "\n")
        partial.replace(self.folder / "config.json")

    def log(self, step: int, **values: float) -> None:
        """One row, on disk at once."""
        self.rows.append({"step": step, **values})
        with self._file.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        held = [row for row in self.rows if name in row]
        return [row["step"] for row in held], [row[name] for row in held]

    def progress(self) -> Progress:
        """A bar with what is said of a step, and the time left."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def report(self, lead: str, facts: dict[str, str], figures: dict[str, Figure],
               summary: str) -> pathlib.Path:  # fmt: skip
        """One page with everything in it."""
        parts = [
            f"<h1>{html.escape(self.folder.name)}</h1>",
            f"<p class=lead>{html.escape(lead)}</p>",
            "<h2>In numbers</h2>",
            _table(facts),
        ]
        for title, figure in figures.items():
            figure.savefig(
                self.folder / f"{title.lower().replace(' ', '_')}.png", dpi=110
            )
            parts += [f"<h2>{html.escape(title)}</h2>", _image(figure, title)]
        parts += [
            "<h2>Settings</h2>",
            _table(self.config),
        ]
        parts += ["<h2>Leaf by leaf</h2>", f"<pre>{html.escape(summary)}</pre>"]
        page = (
            "<!doctype html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(self.folder.name)}</title><style>{_STYLE}</style>"
            f"<body>{''.join(parts)}</body></html>"
        )
        file = self.folder / "report.html"
        file.write_text(page)
        return file


def _table(facts: dict[str, str]) -> str:
    def cell(text: str) -> str:
        number = text.replace(",", "").replace(".", "").replace(" %", "").isdigit()
        return f"<td{' class=number' * number}>{html.escape(text)}</td>"

    rows = "".join(
        f"<tr><th>{html.escape(k)}</th>{cell(v)}</tr>" for k, v in facts.items()
    )
    return f"<table>{rows}</table>"


def _image(figure: Figure, title: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def lines(
    curves: dict[str, tuple[list[int], list[float]]], y: str, x: str = "step"
) -> Figure:
    """One panel of curves."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (at, values) in curves.items():
        axes.plot(
            at, values, label=name, marker="o" if len(at) < 40 else "", markersize=3
        )
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    return figure


def bars(values: dict[str, float], x: str) -> Figure:
    """One bar a name, from the top down."""
    figure = Figure(figsize=(8, 0.6 + 0.2 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(values)[::-1], list(values.values())[::-1])
    axes.set(xlabel=x)
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    return figure
