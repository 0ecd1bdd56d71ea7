"""Damages what the library reads, and counts how each damage is met.

    python -m benchmarks.pods.fuzz --folders 2000 --checkpoints 500 --logs 300
        --messages 500

Every case is refused by name, or read right. What is neither is a fault: an exception
that is not ours, a hang, or a wrong thing read in silence.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import pathlib
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator

from benchmarks.pods.fuzzing.case import Case
from benchmarks.shared import rows

# Where the cases of each kind come from: a module of ``fuzzing``, and its function.
KINDS = {
    "folders": ("folders", "cases"),
    "checkpoints": ("checkpoints", "checkpoint_cases"),
    "logs": ("checkpoints", "log_cases"),
    "messages": ("messages", "cases"),
}
FAULTS = ("raw", "hangs", "wrong")
_SECONDS = 5  # of one case before it hangs


class Hang(BaseException):
    """A case took too long; no reader can swallow it as an error."""


def outcome(case: Case) -> tuple[str, str]:
    """What became of a case, and a line on it.

    Returns:
      One of ``refused``, ``right``, ``raw``, ``hangs`` and ``wrong``.
    """
    previous = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = case.read()
    except Hang:
        return "hangs", ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return "refused" if _is_ours(error) else "raw", said
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    try:
        return "right" if case.right(read) else "wrong", ""
    except Exception as error:  # nothing by the book can be made of it, but it was read
        return "wrong", f"{type(error).__name__}: {error}"


def _stop(*_) -> None:
    raise Hang


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it, with something said."""
    file = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    kinds = isinstance(error, ValueError | TypeError | OSError)
    return kinds and bool(str(error)) and "raclora_jax" in file.parts


def tally(kind: str, cases: Iterator[Case], seen: list[str]) -> dict:
    """Counts of a kind; lines on its faults are added to ``seen``."""
    counts = collections.Counter()
    for case in cases:
        how, said = outcome(case)
        counts[how] += 1
        if how in FAULTS:
            seen.append(f"{kind}: {case.name}: {how} {said[:200]}")
    names = ("refused", "right", *FAULTS)
    return {"kind": kind, "cases": counts.total()} | {n: counts[n] for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=pathlib.Path, default=rows.folder(__file__) / "fuzz.json"
    )
    args = parser.parse_args()
    asked = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    found, seen = [], []
    for kind, count in asked.items():
        name, function = KINDS[kind]
        module = importlib.import_module(f"benchmarks.pods.fuzzing.{name}")
        cases = getattr(module, function)
        folder = pathlib.Path(tempfile.mkdtemp())
        try:
            found.append(tally(kind, cases(args.seed, count, folder), seen))
        finally:
            shutil.rmtree(folder)
        print(" ".join(f"{name} {value}" for name, value in found[-1].items()))
    print("\n".join(seen))
    rows.save(args.out, "python -m benchmarks.pods.fuzz", found, seed=args.seed, **asked)
    sys.exit(bool(seen))


if __name__ == "__main__":
    main()
