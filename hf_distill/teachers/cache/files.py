"""The files of a cache: their names, dtypes on the disk, and examples found in memory-mapped shards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.teachers import shards
from hf_distill.teachers.load import DTYPE_ALIASES

MANIFEST, PLAN, INDEX = "manifest.json", "unfinished.json", "index.arrow"
FORMAT, FORMAT_VERSION = "hf-distill teacher cache", 3
POSITIONS = "positions"  # the column with the number of rows of predictions of each example

Dtype = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}  # Arrow has no bfloat16


def check_dtype(setting: str, dtype: str, allowed: Collection[str] = tuple(DTYPES)) -> None:
    """Raise SettingError if the dtype of a setting is not allowed."""
    if dtype not in allowed:
        hint = did_you_mean(dtype, allowed, DTYPE_ALIASES)
        raise SettingError(f"{setting}={dtype!r}: allowed are {', '.join(allowed)}.{hint}")


def to_disk(values: Tensor, dtype: str, *, overflow: str = "") -> np.ndarray:
    """Round a tensor to one of `DTYPES`, as it is written to the disk.

    Args:
        values: of any shape.
        dtype: its name.
        overflow: the message if float16 cannot hold a finite number, with `{}` for the largest; by default it becomes
            infinite.

    Raises:
        SettingError: if there is a message and the number is too large.
    """
    rounded = values.detach().to(getattr(torch, dtype))
    if overflow and dtype == "float16" and bool((rounded.isinf() & values.isfinite()).any()):
        reached = values[values.isfinite()].abs().max().item()
        raise SettingError(overflow.format(f"{reached:.3g}, float16 ends at 65504"))
    rounded = rounded.cpu()
    return rounded.view(torch.uint16).numpy() if dtype == "bfloat16" else rounded.numpy()


def from_disk(values: np.ndarray, dtype: str) -> Tensor:
    """Return what `to_disk` wrote as a tensor of that dtype."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


class MemoryMappedShards:
    """The shards and the index of a finished cache.

    Args:
        folder: the folder of the cache.
        names: the files of its shards, in order.
        columns: field → the column that counts its positions in each example, and how many numbers a position has.
    """

    def __init__(self, folder: Path, names: Iterable[str], columns: Mapping[str, tuple[str, int]]) -> None:
        self._columns = dict(columns)
        index = shards.read_arrow(folder / INDEX)
        self._high, self._low = shards.numbers(index.column("high")), shards.numbers(index.column("low"))
        self._shard, self._row = shards.numbers(index.column("shard")), shards.numbers(index.column("row"))
        self._starts: list[dict[str, np.ndarray]] = []
        self._values: list[dict[str, np.ndarray]] = []
        counted = {POSITIONS, *(counts for counts, _ in self._columns.values())}
        for name in names:
            shard = shards.read_arrow(folder / name)
            ends = {counts: np.cumsum(shards.numbers(shard.column(counts)), dtype=np.int64) for counts in counted}
            self._starts.append({counts: np.insert(end, 0, 0) for counts, end in ends.items()})
            self._values.append({field: shards.list_values(shard.column(field)) for field in self._columns})

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the place of each key `[b 2]` in the index, `[b]`, or -1 if the cache does not hold the example."""
        places = np.searchsorted(self._high, keys[:, 0])
        found = np.full(len(keys), -1, dtype=np.int64)
        for i, (place, key) in enumerate(zip(places.tolist(), keys, strict=True)):
            while place < len(self._high) and self._high[place] == key[0]:
                if self._low[place] == key[1]:
                    found[i] = place
                    break
                place += 1
        return found

    def gather(self, places: np.ndarray, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a field of the examples at `[b]` places, `[p width]`, and how many positions each has, `[b]`."""
        column, width = self._columns[field]
        pieces, counts = [], []
        for shard, row in zip(self._shard[places].tolist(), self._row[places].tolist(), strict=True):
            start, end = self._starts[shard][column][row : row + 2].tolist()
            pieces.append(self._values[shard][field][start * width : end * width])
            counts.append(end - start)
        return np.concatenate(pieces).reshape(-1, width), np.array(counts, dtype=np.int64)
