"""The files of a cache: names, JSON and Arrow written beside and renamed, Arrow read as a memory map.

Bare Arrow and JSON, nothing that is unpickled. What the files mean is elsewhere.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from hf_distill.errors import DataError
from hf_distill.teachers.cache import files

MANIFEST, PLAN, INDEX, CARD = "manifest.json", "unfinished.json", "index.arrow", "README.md"
STATE, INFO = "state.json", "dataset_info.json"  # what datasets.load_from_disk reads
PARTIAL = ".partial"
RECEIPTS = "shard-*.json"
FORMAT, FORMAT_VERSION = "hf-distill teacher cache", 2  # 2: the largest column beside rounded rows


_open: Any = open  # tests put a quota here


class DiskFull(OSError):
    """No space is left for a file, which therefore was not written."""


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


def receipt_name(number: int) -> str:
    """Beside a shard until the cache is whole: that it is finished, and its checksum."""
    return f"shard-{number:05d}.json"


@contextmanager
def written_beside(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when all of it is on the disk; until then, and if not, there is none of that name.

    Raises:
        DiskFull: no space is left.
    """
    beside = path.with_name(f"{path.name}{PARTIAL}-{os.getpid()}")
    try:
        with _open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if beside.exists():  # it failed
            beside.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    with written_beside(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises:
    DataError: not there, or no JSON.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Build the cache again, or copy it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object. Build the cache again, or copy it again.")
    return content


def write_arrow(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """One record batch as an Arrow stream, uncompressed: the same columns, the same bytes."""
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with written_beside(path) as file, pa.ipc.new_stream(file, batch.schema) as out:
        out.write_batch(batch)


def read_arrow(path: Path) -> pa.RecordBatch:
    """The record batch of a file, mapped into memory: nothing is read until it is looked at.

    Raises:
        DataError: not there, cut off, or no such file.
    """
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path), "r")) as stream:
            return stream.read_next_batch()
    except (OSError, pa.ArrowInvalid, StopIteration) as error:
        raise DataError(f"{path} cannot be read ({error}). Build the cache again, or copy it again.") from error


def plain_array(values: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(values))


def list_array(values: np.ndarray, counts: np.ndarray) -> pa.Array:
    """A list an example, of `counts` numbers each; `values` are all of them, one after the other."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1)))


def numbers(column: pa.Array) -> np.ndarray:
    """A column of plain numbers, not copied."""
    return column.to_numpy(zero_copy_only=True)


def list_values(column: pa.Array) -> np.ndarray:
    """All numbers of a column of lists, one after the other, not copied."""
    return column.values.to_numpy(zero_copy_only=True)


Spans = list[tuple[int, int, int]]
POSITIONS = "positions"  # the column that says how many rows of predictions each example has


class MemoryMappedShards:
    """The shards and the index of a finished cache.

    Args:
        folder: of the cache.
        shards: names of its files, in order.
        columns: field → the column with how many positions of it each example has, and numbers a position.
    """

    def __init__(self, folder: Path, shards: Iterable[str], columns: Mapping[str, tuple[str, int]]) -> None:
        self._columns = dict(columns)
        index = files.read_arrow(folder / files.INDEX)
        self._high, self._low = files.numbers(index.column("high")), files.numbers(index.column("low"))
        self._shard, self._row = files.numbers(index.column("shard")), files.numbers(index.column("row"))
        self._starts: list[dict[str, np.ndarray]] = []
        self._values: list[dict[str, np.ndarray]] = []
        for name in shards:
            shard: pa.RecordBatch = files.read_arrow(folder / name)
            counted = {POSITIONS, *(counts for counts, _ in self._columns.values())}
            self._starts.append({counts: _starts(files.numbers(shard.column(counts))) for counts in counted})
            self._values.append({field: files.list_values(shard.column(field)) for field in self._columns})

    def find(self, keys: np.ndarray) -> np.ndarray:
        """`[b 2]` → `[b]` place in the index, -1 where there is none."""
        places = np.searchsorted(self._high, keys[:, 0])
        found = np.full(len(keys), -1, dtype=np.int64)
        for i, (place, key) in enumerate(zip(places.tolist(), keys, strict=True)):
            while place < len(self._high) and self._high[place] == key[0]:
                if self._low[place] == key[1]:
                    found[i] = place
                    break
                place += 1
        return found

    def gather(self, spans: Spans, field: str) -> np.ndarray:
        """`[p width]` copied out of the memory map: the examples' positions one after the other."""
        _, width = self._columns[field]
        pieces = [self._values[shard][field][start * width : end * width] for shard, start, end in spans]
        return np.concatenate(pieces).reshape(-1, width)

    def spans(self, where: np.ndarray, column: str = POSITIONS) -> Spans:
        """Shard, first position and end of each example, by the column that counts them."""
        spans = []
        for shard, row in zip(self._shard[where].tolist(), self._row[where].tolist(), strict=True):
            starts = self._starts[shard][column]
            spans.append((shard, int(starts[row]), int(starts[row + 1])))
        return spans


def counts_of(spans: Spans) -> np.ndarray:
    """`[b]`: how many positions each example has."""
    return np.array([end - start for _, start, end in spans], dtype=np.int64)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
