"""Where the decoder's program has its default learning rates from.

Three decoders, 64, 128 and 256 wide, each tuned on a text it was not trained on, by every
method with the settings that are its default, 300 steps of 8 rows of 64 tokens, seed 0:
the rate goes by factors of 2 from a guess until the best has a worse one on both sides.
The wider two are made here, in full, from random: 600 steps on a text of Python's.

    python -m benchmarks.pretrained.default_rates --data-dir DIR [--quick]
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import tempfile
from typing import Any, NamedTuple

from benchmarks.pretrained import programs
from benchmarks.pretrained.run import search
from benchmarks.shared import rows, timing

STEPS, START = 300, 600
GUESSES = {"raclora-orthogonal": 4e-3, "raclora": 4e-3, "lora": 8e-3, "full": 2e-3}


class Model(NamedTuple):
    """A decoder, the words that name it to the program, and the text it is tuned on."""

    name: str
    words: dict[str, Any]
    text: pathlib.Path


def models(data: pathlib.Path, scratch: pathlib.Path, start: int) -> list[Model]:
    """All three; the wider two are trained here."""
    from finetuning import fresh

    plays = data / "tinyshakespeare" / "input.txt.gz"
    texts = {"reference": fresh.reference(), "library": fresh.library()}
    for name, text in texts.items():
        (scratch / f"{name}.txt").write_text(text, encoding="utf-8")
    stories = data / "stories260k"
    words = {"model": stories / "stories260K.bin", "tokenizer": stories / "tok512.bin"}
    found = [Model("stories260K, 5 x 64", words, plays)]
    for width, layers, learnt, wanted in (
        (128, 4, "reference", scratch / "library.txt"),
        (256, 2, "library", plays),
    ):
        fresh.CONFIG |= {
            "hidden_size": width,
            "intermediate_size": 43 * width // 16,
            "num_hidden_layers": layers,
            "head_dim": width // 4,
        }
        letters = [*texts.values(), gzip.decompress(plays.read_bytes()).decode()]
        fresh.write(scratch / f"random{width}", letters, 0)
        words = {"model": scratch / f"random{width}", "train": scratch / f"{learnt}.txt"}
        words |= {"method": "full", "learning-rate": 3e-3, "steps": start}
        programs.command("finetune_llm.py", words, keep=scratch / f"tuned{width}")
        words = {"model": scratch / f"tuned{width}" / "model"}
        found.append(Model(f"{layers} x {width}", words, wanted))
    return found


def row_of(model: Model, method: str, guess: float, quick: bool) -> dict[str, Any]:
    """One method on one model."""
    steps = 10 if quick else STEPS
    words = model.words | {"train": model.text, "method": method, "steps": steps}

    def score(rate: float) -> float:
        more = {"learning-rate": rate, "eval-every": steps}
        run = programs.command("finetune_llm.py", words | more)
        return run.metrics[-1]["dev_loss"]

    tried = {guess: score(guess)} if quick else search(score, guess)
    best = min(tried, key=lambda rate: tried[rate])
    return {
        "model": model.name,
        "method": method,
        "rate": best,
        "loss": tried[best],
        "tried": [list(pair) for pair in tried.items()],
    }


def main() -> None:
    """Every method on every model; rows are saved as they come."""
    parser = timing.parser(__doc__)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    options: argparse.Namespace = timing.parse(parser, __file__)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        start = 10 if options.quick else START
        for model in models(options.data_dir, pathlib.Path(scratch), start):
            for method, guess in GUESSES.items():
                table.append(row_of(model, method, guess, options.quick))
                print(table[-1], flush=True)
                if options.out is not None:
                    path = options.out / "default_rates.json"
                    rows.save(
                        path, "python -m benchmarks.pretrained.default_rates", table
                    )


if __name__ == "__main__":
    main()
