"""The `hf-distill` command: finds the subcommand, prints errors as one line. No work of its own.

Help, `--version` and mistyped commands must not wait for torch: this file and what it imports at the top are light,
and a subcommand imports what it works with when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_distill import __version__
from hf_distill.cli import cache, complete
from hf_distill.errors import HfDistillError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
DEFAULT_OUTPUT = "hf-distill-quickstart"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the word that may have been meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        meant = _suggestion(unknown, sorted(_options(self))) if unknown.startswith("-") else ""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {' '.join(message.split())}.{meant} See {self.prog} --help.\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        meant = _suggestion(str(value), choices)
        raise argparse.ArgumentError(action, f"{value!r} is not a choice.{meant} Allowed: {', '.join(choices)}")


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f" Did you mean {close[0]}?" if close else ""


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All options of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _options(below)


def make_parser() -> argparse.ArgumentParser:
    """The whole command's parser; a subcommand sets `run`, which takes the parsed arguments."""
    parser = _Parser(
        prog="hf-distill",
        description="Distil a large fine-tuned model into a small one. "
        "Training itself is a Python API: see DistillationTrainer.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_quickstart(commands)
    cache.add_command(commands)
    complete.add_command(commands)
    return parser


def _add_quickstart(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "quickstart",
        help="distil a small model on this machine's own text: offline, in minutes",
        description="Reads the documentation strings of the Python standard library, trains a "
        "teacher to tell which package a paragraph is about, then the same small student without "
        "and with that teacher. Prints a table; leaves the students, a report, a plot and a model "
        "card. Downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path(DEFAULT_OUTPUT), help="where the results go")
    parser.add_argument("--seed", type=_seed, default=0, help="the first seed; the others follow it")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), help="models that are trained at a time; 2 where there are two cores"
    )
    parser.add_argument("--fast", action="store_true", help="a shorter run with fewer seeds and weaker models")
    parser.set_defaults(run=_run_quickstart)


def _seed(text: str) -> int:
    """A seed that numpy takes too, with room for the seeds after it."""
    value = int(text)
    if not 0 <= value < 2**32 - 10:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2**32 - 11")
    return value


def _run_quickstart(arguments: argparse.Namespace) -> None:
    from hf_distill.cli.quickstart import run_command

    run_command(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for what the user can mend, 130 when stopped."""
    parsed = make_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (HfDistillError, OSError) as error:
        print(f"hf-distill: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("hf-distill: stopped; nothing was left behind.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
