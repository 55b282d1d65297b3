"""What the commands share: the dataset that they name, help with defaults, and interruptions of a build."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_distill.errors import DataError, SettingError

if TYPE_CHECKING:
    from datasets import Dataset

EXIT_INTERRUPTED = 130
# Suffix -> the builder of `datasets`, and its options.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_KINDS = ", ".join(_READERS)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add DATASET, `--name` and `--split` to a command's parser."""
    parser.add_argument(
        "dataset", metavar="DATASET", help=f"a file ({_KINDS}), a folder of files or of save_to_disk, or a Hub id"
    )
    parser.add_argument("--name", help="configuration of the dataset")
    parser.add_argument("--split", default="train", help="split of the dataset; a file has only one")


def load_dataset(arguments: argparse.Namespace) -> Dataset:
    """Load the dataset that DATASET, `--name` and `--split` name.

    Raises:
        DataError: if there is no such file or folder, or it cannot be read as a dataset.
        SettingError: if the suffix of the file is unknown.
    """
    import datasets

    name, split = arguments.dataset, arguments.split
    path = Path(name)
    if path.is_file():
        return _read_file(path)
    is_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or path.suffix.lower() in _READERS
    if is_local and not path.exists():
        neighbours = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, neighbours, 1)
        hint = f" Did you mean {str(path.with_name(close[0]))!r}?" if close else ""
        raise DataError(f"dataset {name!r}: there is no such file or folder.{hint}")
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, arguments.name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as error:
        where = "" if path.exists() else ": there is no such file or folder, and as a Hub id it"
        raise DataError(
            f"dataset {name!r}, split {split!r}{where} cannot be loaded: {str(error).rstrip('.')}. Give a file "
            f"({_KINDS}), a folder of such files or of Dataset.save_to_disk, or a Hub id."
        ) from error


def _read_file(path: Path) -> Dataset:
    import datasets

    if path.suffix.lower() not in _READERS:
        raise SettingError(f"dataset {str(path)!r}: the suffix is unknown. Allowed: {_KINDS}.")
    reader, options = _READERS[path.suffix.lower()]
    try:
        return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        # `datasets` wraps the message of the reader in one that says nothing.
        raise DataError(f"dataset {str(path)!r} cannot be read as {reader}: {error.__cause__ or error}") from error


@contextmanager
def resumable(console: Console, folder: Path, *, counted: str, noun: str) -> Iterator[None]:
    """On Ctrl-C inside this context, print how much of the folder is finished and exit with code 130.

    Args:
        console: where the message goes, that of the interrupt if it has one.
        folder: the folder that is being filled.
        counted: the number in each shard's receipt to add up.
        noun: the noun for that number, in the plural.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = sum(_count(receipt, counted) for receipt in folder.glob("shard-*.json"))
        text = str(interrupt) or f"{kept:,} {noun} are kept in {folder}; give the same command again to continue."
        console.print(f"Stopped. {text}", highlight=False)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _count(receipt: Path, counted: str) -> int:
    try:
        return int(json.loads(receipt.read_bytes())[counted])
    except (OSError, ValueError, KeyError, TypeError):  # the shard is not finished
        return 0
