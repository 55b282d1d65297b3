"""The `hf-distill` command: calls a subcommand and prints errors in a line.

Help, `--version` and mistyped commands must not wait for torch. So this file imports only light modules at the top, and
a subcommand imports the rest when it runs.
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
from hf_distill.cli.dataset import EXIT_INTERRUPTED, HelpFormatter
from hf_distill.errors import HfDistillError

EXIT_USAGE = 2
DEFAULT_OUTPUT = "hf-distill-quickstart"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest known word."""

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
    """Yield all options of a parser and its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _options(below)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command. A subcommand sets `run`, a function of the parsed arguments."""
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


def _add_quickstart(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "quickstart",
        help="distil a small model on this machine's own text: offline, in minutes",
        description="Reads the documentation strings of the Python standard library, trains a teacher that predicts "
        "the package of a paragraph, then the same small student without and with that teacher. Prints a table; leaves "
        "the students, a report, a plot and a model card. Downloads nothing.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path(DEFAULT_OUTPUT), help="where the results go")
    parser.add_argument("--seed", type=_seed, default=0, help="the first seed; the others follow it")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), help="models that are trained at a time; default: 2 on several cores"
    )
    parser.add_argument("--fast", action="store_true", help="a shorter run with fewer seeds and weaker models")
    parser.set_defaults(run=_run_quickstart)


def _seed(text: str) -> int:
    """Return a seed that is also valid for NumPy, as are the seeds after it."""
    value = int(text)
    if not 0 <= value < 2**32 - 10:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2**32 - 11")
    return value


def _run_quickstart(arguments: argparse.Namespace) -> None:
    from hf_distill.cli.quickstart import run_command

    run_command(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for an error of the user, or 130 for an interruption."""
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
