"""The command line that the programs share, and how they end before they are done."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np

from finetuning import training

SEARCH = "search"
_MOST = 2**31 - 1  # as far as steps are counted


class Defaults(NamedTuple):
    """What a program takes where nothing else is asked for.

    Attributes:
      method: How it trains.
      rates: The peak of the learning rate by method.
      measured: On what these rates were the best.
    """

    method: str
    rates: dict[str, float]
    measured: str


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line is one line.

    Args:
      description: The program's own.
      **more: As ``argparse`` has it.
    """

    def __init__(self, description: str | None, **more: Any):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        """Without the list of all options before it."""
        self.exit(2, f"{self.prog}: {message}\n")


class RunParser(Parser):
    """The options of a run, whatever it trains.

    Args:
      description: The program's own.
      defaults: Its defaults.
    """

    def __init__(self, description: str | None, defaults: Defaults):
        settings = "\n".join(
            f"  {method}: " + ", ".join(f"{k} {v}" for k, v in settings.items())
            for method in defaults.rates
            if (settings := training.SETTINGS[method])
        )
        kept = _by_method({method: training.KEPT[method] for method in defaults.rates})
        super().__init__(description, epilog=f"without --spec:\n{settings}")
        add = self.add_argument
        add(
            "--method",
            choices=defaults.rates,
            default=defaults.method,
            help=f"it keeps {kept} (default: %(default)s)",
        )
        ranks = _by_method(
            {k: training.rank_said(k) for k in defaults.rates if k in training.RANKS}
        )
        add("--rank", type=count, help=f"(default: {ranks})")
        add("--spec", type=pathlib.Path, help="a spec in TOML, in place of --rank")
        rates = _by_method({k: f"{v:g}" for k, v in defaults.rates.items()})
        add(
            "--learning-rate",
            type=rate,
            metavar=f"RATE|{SEARCH}",
            help=f"peak; 10 %% warm-up, a cosine to zero. {SEARCH} tries rates a factor "
            f"of 2 apart, each for a tenth of the steps (default: {rates}; measured on "
            f"{defaults.measured})",
        )
        add(
            "--fused",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="update inside the backward pass; a run may change it when it goes on "
            "(default: %(default)s)",
        )
        add("--seed", type=seed, default=0, help="(default: %(default)s)")
        add("--out", type=pathlib.Path, help="the run's folder; only --dry-run has none")
        add(
            "--resume",
            action="store_true",
            help="go on with the run in --out. With more --steps than it had, the cosine "
            "is from there on that of the new number, so that the rate rises once",
        )
        add("--dry-run", action="store_true", help="say what it would cost, and stop")

    def asked(self) -> argparse.Namespace:
        """What was asked for; a run has a folder."""
        options = self.parse_args()
        if options.out is None and not options.dry_run:
            self.error("give --out, or --dry-run")
        return options


def _by_method(values: dict[str, Any]) -> str:
    return ", ".join(f"{value} for {method}" for method, value in values.items())


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text[:10]) < least:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} on, got {text}"
        )
    if len(text) > 10 or int(text) > _MOST:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST}, got {text}")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def rate(text: str) -> float | str:
    """A number above 0, or ``"search"``."""
    if text == SEARCH:
        return text
    with contextlib.suppress(ValueError):
        if 0 < float(text) < np.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0 or {SEARCH}, got {text}")


def again() -> str:
    """The command that goes on with this run."""
    words = [arg for arg in sys.argv if arg != "--resume"]
    return shlex.join([sys.orig_argv[0], *words, "--resume"])


class Interrupt:
    """Ctrl-C as a wish that a loop looks at between its steps; a second one ends at once.

    Attributes:
      asked: Whether it was pressed.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
        os.write(2, b"\nstopping behind this step; once more to stop at once\n")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Bad input ends the program with one line and exit code 2, Ctrl-C with 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        said = str(stopped) or "stopped at once; go on from the last checkpoint with"
        print(f"{said}\n  {again()}", file=sys.stderr)
        sys.exit(130)
