"""The files of a cache: their names, columns as Arrow arrays, and shards and index mapped into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_distill.teachers.passes import read_arrow

MANIFEST, PLAN, INDEX = "manifest.json", "unfinished.json", "index.arrow"
FORMAT, FORMAT_VERSION = "hf-distill teacher cache", 2  # 2: the largest column beside rounded rows


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
        index = read_arrow(folder / INDEX)
        self._high, self._low = numbers(index.column("high")), numbers(index.column("low"))
        self._shard, self._row = numbers(index.column("shard")), numbers(index.column("row"))
        self._starts: list[dict[str, np.ndarray]] = []
        self._values: list[dict[str, np.ndarray]] = []
        for name in shards:
            shard: pa.RecordBatch = read_arrow(folder / name)
            counted = {POSITIONS, *(counts for counts, _ in self._columns.values())}
            self._starts.append({counts: _starts(numbers(shard.column(counts))) for counts in counted})
            self._values.append({field: list_values(shard.column(field)) for field in self._columns})

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
