"""The dataset that a command names: a file, a folder, or a Hub id."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_distill.errors import DataError, SettingError

# What `datasets` reads each kind of file with.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_KINDS = ", ".join(_READERS)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add DATASET, `--name` and `--split` to a command's parser."""
    parser.add_argument(
        "dataset", metavar="DATASET", help=f"a file ({_KINDS}), a folder of files or of save_to_disk, or a Hub id"
    )
    parser.add_argument("--name", help="configuration of the dataset")
    parser.add_argument("--split", default="train", help="which split of the dataset; a file is one split")


def dataset_of(arguments: argparse.Namespace) -> Any:
    """Load the dataset that DATASET, `--name` and `--split` name.

    Raises:
        DataError: there is no such file or folder, or it cannot be read as a dataset.
        SettingError: a file of a kind that is not read.
    """
    import datasets

    path, split = Path(arguments.dataset), arguments.split
    if path.is_file():
        return _of_file(path)
    if not path.exists() and _looks_local(arguments.dataset):
        raise DataError(f"dataset {arguments.dataset!r}: there is no such file or folder.{_neighbour(path)}")
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(arguments.dataset)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(arguments.dataset)[split]
        return datasets.load_dataset(arguments.dataset, arguments.name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as error:
        where = "" if path.exists() else ": there is no such file or folder, and as a Hub id it"
        raise DataError(
            f"dataset {arguments.dataset!r}, split {split!r}{where} cannot be loaded: {str(error).rstrip('.')}. Give a "
            f"file ({_KINDS}), a folder of such files, a folder that Dataset.save_to_disk wrote, or a Hub id (with "
            "--name and --split)."
        ) from error


def _of_file(path: Path) -> Any:
    import datasets

    if path.suffix.lower() not in _READERS:
        raise SettingError(f"dataset {str(path)!r}: a file of this kind is not read. Allowed: {_KINDS}.")
    reader, options = _READERS[path.suffix.lower()]
    try:
        return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"dataset {str(path)!r} cannot be read as {reader}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The words of the reader below `datasets`' own "an error occurred"."""
    return str(error.__cause__ or error)


def _looks_local(name: str) -> bool:
    """Whether it cannot be meant as a Hub id, which is `name` or `organisation/name`."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).suffix.lower() in _READERS


def _neighbour(path: Path) -> str:
    """A file beside it that may have been meant."""
    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [one.name for one in path.parent.iterdir()], 1)
    return f" Did you mean {str(path.with_name(close[0]))!r}?" if close else ""


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
