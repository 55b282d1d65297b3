"""The pass itself: batches in order, what the teacher says of them, shards written one by one.

What is agreed on before stands in `building.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_distill.errors import DataError, TeacherError
from hf_distill.teachers.cached import files, fingerprints
from hf_distill.teachers.cached.bar import Bar
from hf_distill.teachers.cached.finishing import is_finished
from hf_distill.teachers.cached.keys import content_keys
from hf_distill.teachers.cached.planning import Source
from hf_distill.teachers.cached.stores import Store, store_from


class Pass:
    """Makes shards. The same shard has the same bytes whoever makes it, and whatever was made before.

    Args:
        source: who is asked about what. folder: of the cache. plan: what was agreed on. device: of the teacher.
        num_workers: processes that make batches.
    """

    def __init__(self, source: Source, folder: Path, plan: dict[str, Any], device: Any, *, num_workers: int) -> None:
        self.source = source
        self.folder = folder
        self.plan = plan
        self.device = device
        self.num_workers = num_workers
        self.batch_size: int = plan["padding"]["batch_size"]

    def _indices(self, shard: int) -> range:
        start, count = shard * self.plan["shard_examples"], self.plan["dataset"]["examples"]
        return range(start, min(count, start + self.plan["shard_examples"]))

    def _batches(self, shards: list[int]) -> list[list[int]]:
        """The same whoever makes them: batches do not reach over the end of a shard."""
        size_ = self.batch_size
        return [list(r[at : at + size_]) for r in map(self._indices, shards) for at in range(0, len(r), size_)]

    def _loaded(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        loader: DataLoader[Any] = DataLoader(
            _Examples(self.source),  # type: ignore[arg-type]  # what a Dataset must have, it has
            batch_sampler=self._batches(shards),
            collate_fn=_as_dict_of(self.source.collator),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # that of the training is left alone
        )
        return iter(loader)

    def is_done(self, shard: int) -> bool:
        """Whether an earlier pass finished it.

        Raises:
            DataError: it did, and of other examples than the dataset now has.
        """
        if not is_finished(self.folder, shard):
            return False
        written = files.read_arrow(self.folder / files.shard_name(shard))
        there = np.stack([files.numbers(written.column("high")), files.numbers(written.column("low"))], 1)
        now = np.concatenate([self._keys(batch) for batch in self._loaded([shard])])
        if not np.array_equal(there, now):
            at = int(np.flatnonzero((there != now).any(1))[0]) + self._indices(shard)[0]
            raise DataError(
                f"example {at} of the dataset is another one than when {self.folder} was begun. Give the dataset that "
                "it was begun with, or choose another folder."
            )
        return True

    def content(self) -> str:
        """The fingerprint of all examples as the dataset now has them; the teacher is not asked."""
        every = list(range(self.plan["shard_count"]))
        return fingerprints.of_keys(np.concatenate([self._keys(batch) for batch in self._loaded(every)]))

    def _keys(self, batch: dict[str, Any]) -> np.ndarray:
        return content_keys(batch, self.plan["inputs"]["columns"], main=self.source.main)

    def make(self, shards: list[int], *, done: list[int], shown: bool) -> None:
        """Ask the teacher about the examples of these shards. Args: done: shards of an earlier pass."""
        store = store_from(self.plan["store"])
        batches = self._loaded(shards)
        total, before = len(self._batches([*done, *shards])), len(self._batches(done))
        with Bar(total=total, finished=before, shown=shown and bool(shards)) as bar:
            for shard in shards:
                parts = []
                for _ in range(0, len(self._indices(shard)), self.batch_size):
                    parts.append(self._part(next(batches), store))
                    bar.advance(parts[-1]["positions"])
                self._write_shard(shard, parts)

    def _part(self, batch: dict[str, Any], store: Store) -> dict[str, np.ndarray]:
        keys = self._keys(batch)
        raw, prepared = self.source.ask(batch, self.device)
        rows, counts = self.source.cut(raw, prepared, self.plan["predictions"]["axis"])
        if store.lists_columns:
            rows = rows[:, : self.plan["predictions"]["columns"]]
        _refuse_no_numbers(rows, counts)
        if rows.shape[1] != self.plan["predictions"]["columns"]:
            raise DataError(
                f"the teacher predicts {rows.shape[1]} columns here and {self.plan['predictions']['columns']} at the "
                "start: examples must have equally many (choices)."
            )
        fields = store.encode(rows, keys, counts)
        return {"high": keys[:, 0], "low": keys[:, 1], "positions": counts.astype(np.int32), **fields}

    def _write_shard(self, shard: int, parts: list[dict[str, np.ndarray]]) -> None:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        plain = ("high", "low", "positions")
        columns = {name: files.plain_array(whole[name]) for name in plain}
        for name in whole:
            if name not in plain:
                columns[name] = files.list_array(whole[name], whole["positions"] * whole[name].shape[1])
        path = self.folder / files.shard_name(shard)
        files.write_arrow(path, columns)
        receipt = {
            "file": path.name,
            "examples": len(whole["positions"]),
            "positions": int(whole["positions"].sum()),
            "bytes": path.stat().st_size,
            "blake2b": fingerprints.of_file(path),
        }
        files.write_json(self.folder / files.receipt_name(shard), receipt)


def _refuse_no_numbers(rows: torch.Tensor, counts: np.ndarray) -> None:
    wrong = (rows.isnan() | (rows == torch.inf)).any(-1)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        example = int(np.searchsorted(np.cumsum(counts), position, side="right"))
        raise TeacherError(
            f"the teacher's logits hold NaN or infinity in example {example} of a batch, at position {position} of "
            "it all. Look at that input; a half-precision teacher may overflow: try dtype='float32' or 'bfloat16'."
        )


class _Examples:
    """A map-style dataset of what the collator takes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.source.example(index)


class _as_dict_of:
    """A collator whose batches are plain dicts, also in a worker process."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        return dict(self.collator(features))
