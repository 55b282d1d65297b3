"""The dataset that a command names: a file, a folder, or a Hub id."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path
from typing import Any

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
