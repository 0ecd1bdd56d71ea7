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

from needs import extra

with extra("finetuning", __name__):
    import finetune_llm
    from finetuning import asked, decoder, fresh


def arguments() -> asked.Parser:
    """The command line."""
    parser = asked.Parser(__doc__)
    add = parser.add_argument
    for name, kind, default, said in (
        ("--out", pathlib.Path, pathlib.Path("out/text"), "the folder of both runs"),
        ("--start-steps", asked.count, 600, "on the reference, from random"),
        ("--steps", asked.count, 300, "on the library"),
        ("--seed", asked.seed, 0, ""),
    ):
        said = f"{said} (default: %(default)s)".strip()
        add(name, type=kind, default=default, help=said)
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
    wanted = {
        "model": model,
        "train": options.out / f"{text}.txt",
        "out": options.out / text,
        "seed": options.seed,
        "eval-every": 100,
    } | more
    words = [f"--{name}={value}" for name, value in wanted.items()]
    return finetune_llm.fine_tune(
        finetune_llm.arguments().parse_args([*words, "--resume"])
    )


def main() -> None:
    """Both runs, and what the second one gained."""
    options = arguments().parse_args()
    random, begun = options.out / "random", options.out / "reference"
    tuned = options.out / "library"
    with asked.one_line():
        prepare(options)
        full = {"method": "full", "learning-rate": 3e-3, "steps": options.start_steps}
        train(options, "reference", random, **full)
        problem = train(options, "library", begun / "model", steps=options.steps)
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
