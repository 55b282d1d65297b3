"""Commands that fill a folder shard by shard: Ctrl-C says how much is kept, and how to go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

EXIT_INTERRUPTED = 130  # as the command itself
_RECEIPTS = "shard-*.json"  # beside each finished shard of an unfinished folder


@contextmanager
def resumable(console: Console, folder: Path, *, counted: str, noun: str) -> Iterator[None]:
    """Inside, Ctrl-C prints what is kept and ends the process with code 130.

    An interrupt that has a message of its own is printed with that.

    Args:
        console: where the message goes.
        folder: the folder that is being filled.
        counted: the number in a shard's receipt that is added up.
        noun: what that number counts, in the plural.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = sum(_count(receipt, counted) for receipt in folder.glob(_RECEIPTS))
        told = str(interrupt) or f"{kept:,} {noun} are kept in {folder}; the same command goes on from there."
        console.print(f"Stopped. {told}", highlight=False)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _count(receipt: Path, counted: str) -> int:
    try:
        return int(json.loads(receipt.read_bytes())[counted])
    except (OSError, ValueError, KeyError, TypeError):  # a receipt that cannot be read is no receipt
        return 0
