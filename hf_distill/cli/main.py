"""The `hf-distill` command: finds the subcommand, prints errors as one line. No work of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hf_distill.cli import cache, complete, quickstart
from hf_distill.errors import HfDistillError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """The whole command's parser; a subcommand sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="hf-distill",
        description="Distil a large fine-tuned model into a small one. "
        "Training itself is a Python API: see DistillationTrainer.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    quickstart.add_command(commands)
    cache.add_command(commands)
    complete.add_command(commands)
    return parser


def _version() -> str:
    try:
        return version("hf-distill")
    except PackageNotFoundError:
        return "unknown (a checkout that is not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for what the user can mend, 130 when stopped."""
    parsed = make_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except HfDistillError as error:
        print(f"hf-distill: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("hf-distill: stopped; nothing was left behind.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
