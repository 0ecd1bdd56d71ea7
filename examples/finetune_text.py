"""Fine-tune a decoder where there is neither a checkpoint nor a data set: no download.

    python examples/finetune_text.py --out out/text

The texts come with Python. A small Llama is made at random and trained in full on the
language reference: that is the checkpoint, in OUT/reference/model. It is then fine-tuned
by RAC-LoRA on the code of the standard library, in OUT/library, by the same program that
does it with yours (``finetune_llm.py``). Both runs have a report.html.

    pip install 'raclora_jax[finetuning]'
"""

from __future__ import annotations

import argparse
import pathlib

import finetune_llm
from finetuning import decoder, fresh, loop


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=pathlib.Path("out/text"))
    add(
        "--start-steps",
        type=loop.count,
        default=600,
        help="on the reference, from random",
    )
    add("--steps", type=loop.count, default=300, help="on the library")
    add("--rank", type=loop.count, default=32)
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on with the runs in --out")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Writes texts and the decoder that has learnt nothing, once."""
    if options.out.exists() and not options.resume:
        raise ValueError(f"{options.out} exists; name another --out, or say --resume")
    options.out.mkdir(parents=True, exist_ok=True)
    texts = {"reference": fresh.reference(), "library": fresh.library()}
    for name, text in texts.items():
        (options.out / f"{name}.txt").write_text(text, encoding="utf-8")
    if not (options.out / "random").exists():
        fresh.write(options.out / "random", list(texts.values()), options.seed)


def train(
    options: argparse.Namespace, text: str, model: pathlib.Path, **more: object
) -> finetune_llm.Problem:
    """A run of ``finetune_llm``, or the rest of one that was begun.

    Args:
      options: Of this program.
      text: ``"reference"`` or ``"library"``: its text, and the name of its folder.
      model: Where it starts.
      **more: Other arguments of that program.
    """
    asked = {
        "model": model,
        "train": options.out / f"{text}.txt",
        "out": options.out / text,
        "seed": options.seed,
        "eval-every": 100,
    } | more
    words = [f"--{name}={value}" for name, value in asked.items()]
    return finetune_llm.fine_tune(
        finetune_llm.arguments().parse_args([*words, "--resume"])
    )


def main() -> None:
    """Both runs, and what the second one gained."""
    options = arguments().parse_args()
    random, begun = options.out / "random", options.out / "reference"
    tuned = options.out / "library"
    with loop.one_line():
        prepare(options)
        full = {"method": "full", "learning-rate": 3e-3, "steps": options.start_steps}
        ours = {"rank": options.rank, "learning-rate": 1e-2, "steps": options.steps}
        train(options, "reference", random, **full)
        problem = train(options, "library", begun / "model", **ours)
        again = decoder.load(tuned / "model", bf16=False, remat=False)
        before, after = (
            problem.judge(params)["dev_loss"] for params in (problem.params, again.params)
        )
    print(
        f"Loss on held-out code: {before:.3f} before, {after:.3f} after; "
        f"see {tuned / 'report.html'}"
    )


if __name__ == "__main__":
    main()
