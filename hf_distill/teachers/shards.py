"""Shard files: plain JSON and Arrow, written atomically; Arrow is read as a memory map."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa

from hf_distill.errors import DataError

Json: TypeAlias = dict[str, Any]  # plain data, as in a manifest
CARD = "README.md"
STATE, INFO = "state.json", "dataset_info.json"  # read by datasets.load_from_disk
PARTIAL = ".partial"
RECEIPTS = "shard-*.json"
_CHUNK = 1 << 26  # bytes hashed at once
_AGAIN = "Copy the folder again, or delete it and make the same call again."
_open: Any = open  # tests replace it to simulate a full disk


class DiskFull(OSError):
    """There is no space left for a file; it was not written."""


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def receipt_name(number: int) -> str:
    """Return the name of the file that marks a shard as finished and holds its checksum."""
    return f"shard-{number:05d}.json"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` only once all of it is on the disk.

    Raises:
        DiskFull: if there is no space left.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}-{os.getpid()}")
    try:
        with _open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if partial.exists():  # writing failed
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Json) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Json:
    """Return the JSON object in a file.

    Raises:
        DataError: if there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). {_AGAIN}") from error
    return content


def write_arrow(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """Write one record batch as an uncompressed Arrow stream. The same columns give the same bytes."""
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with atomic_file(path) as file, pa.ipc.new_stream(file, batch.schema) as out:
        out.write_batch(batch)


def read_arrow(path: Path) -> pa.RecordBatch:
    """Return the record batch of a file as a memory map; nothing is read until it is used.

    Raises:
        DataError: if the file is missing, cut off, or not Arrow.
    """
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path), "r")) as stream:
            return stream.read_next_batch()
    except (OSError, pa.ArrowInvalid, StopIteration) as error:
        raise DataError(f"{path} cannot be read ({error}). {_AGAIN}") from error


def plain_array(values: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(values))


def list_array(values: np.ndarray, counts: np.ndarray) -> pa.Array:
    """Return one list for each example.

    Args:
        values: the numbers of all lists, one list after the other.
        counts: `[b]`, the length of each list.
    """
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))


def numbers(column: pa.Array) -> np.ndarray:
    """Return a column of plain numbers without a copy."""
    return column.to_numpy(zero_copy_only=True)


def list_values(column: pa.Array) -> np.ndarray:
    """Return all numbers of a column of lists, one list after the other, without a copy."""
    return column.values.to_numpy(zero_copy_only=True)


def file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def file_entry(path: Path) -> Json:
    """Return a file's name, size and checksum, for a manifest."""
    return {"file": path.name, "bytes": path.stat().st_size, "blake2b": file_digest(path)}


def check_files(folder: Path, entries: Sequence[Json], *, checksums: bool = True) -> None:
    """Check files against their entries in the manifest.

    Args:
        folder: the folder that holds them.
        entries: from `file_entry`.
        checksums: whether to compare checksums, or only sizes.

    Raises:
        DataError: if a file is missing, cut off or changed.
    """
    for entry in entries:
        path = folder / entry["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing. {_AGAIN}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            sizes = f"{size:,} bytes, and the manifest says {entry['bytes']:,}"
            raise DataError(f"{path} has {sizes}: it was cut off or changed. {_AGAIN}")
        if checksums and file_digest(path) != entry["blake2b"]:
            raise DataError(f"{path} was changed: its checksum differs from the manifest's. {_AGAIN}")


def finished_receipt(folder: Path, shard: int) -> Json | None:
    """Return the receipt of a shard, or None if the shard is not finished or was damaged since."""
    try:
        receipt = read_json(folder / receipt_name(shard))
        check_files(folder, [receipt])
    except DataError:
        return None
    return receipt


def write_dataset_files(folder: Path, names: Sequence[str], *, fingerprint: str) -> None:
    """Write the files with which `datasets.load_from_disk` opens the shards as one dataset."""
    features = datasets.Features.from_arrow_schema(read_arrow(folder / names[0]).schema)
    write_json(folder / INFO, {"features": features.to_dict(), "description": "", "citation": ""})
    state: Json = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_json(folder / STATE, state)
