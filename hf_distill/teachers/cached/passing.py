"""The pass itself: batches in order, what the teacher says of them, shards written one by one.

What is agreed on before stands in `building.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_distill.errors import DataError, TeacherError
from hf_distill.teachers.cached import files, fingerprints
from hf_distill.teachers.cached.bar import Bar
from hf_distill.teachers.cached.finishing import is_finished
from hf_distill.teachers.cached.inside import KeptRead, kept_reads
from hf_distill.teachers.cached.inside_layout import stored
from hf_distill.teachers.cached.listed import Listed
from hf_distill.teachers.cached.mapped import POSITIONS
from hf_distill.teachers.cached.source import Said, Source, examples_named
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
        self._kept: list[KeptRead] = kept_reads(plan.get("inside"))

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
            collate_fn=self.source.collated,
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
        return self.source.keys(batch, self.plan["inputs"]["columns"])

    def make(self, shards: list[int], *, done: list[int], shown: bool) -> None:
        """Ask the teacher about the examples of these shards. Args: done: shards of an earlier pass."""
        store = store_from(self.plan["store"])
        batches = self._loaded(shards)
        total, before = len(self._batches([*done, *shards])), len(self._batches(done))
        with Bar(total=total, axis=self.source.axis, finished=before, shown=shown and bool(shards)) as bar:
            for shard in shards:
                parts = []
                for indices in self._batches([shard]):
                    with examples_named(indices):
                        parts.append(self._part(next(batches), store))
                    bar.advance(parts[-1]["positions"])
                self._write_shard(shard, parts)

    def _part(self, batch: dict[str, Any], store: Store) -> dict[str, np.ndarray]:
        keys, said = self._keys(batch), self.source.said(batch, self.device)
        fields = {**self._predictions(said, keys, store), **self._inside(said)}
        return {"high": keys[:, 0], "low": keys[:, 1], POSITIONS: said.counts.astype(np.int32), **fields}

    def _predictions(self, said: Said, keys: np.ndarray, store: Store) -> dict[str, np.ndarray]:
        if said.listed is not None and isinstance(store, Listed):
            return store.encode_listed(said.listed)
        if said.rows is None:
            return {}
        rows, columns = said.rows, self.plan["predictions"]["columns"]
        if store.lists_columns:
            rows = rows[:, :columns]
        _refuse_no_numbers(rows, said.counts)
        if rows.shape[1] != columns:
            raise DataError(
                f"the teacher predicts {rows.shape[1]} columns here and {columns} at the start: examples must have "
                "equally many (choices)."
            )
        return store.encode(rows, keys, said.counts)

    def _inside(self, said: Said) -> dict[str, np.ndarray]:
        fields: dict[str, np.ndarray] = {}
        for now, there in zip(said.inside, self._kept, strict=True):
            if now != there:
                raise DataError(
                    f"the teacher's {there} are {there.width} wide along {there.axis} at the start, and {now.width} "
                    f"along {now.axis} in a later batch. Make batches alike."
                )
            rows, counts = said.inside[now]
            fields[there.counts] = counts.astype(np.int32)
            fields[there.field] = stored(rows, there, self.plan["inside"]["dtype"])
        return fields

    def _write_shard(self, shard: int, parts: list[dict[str, np.ndarray]]) -> None:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        along = {one.field: one.counts for one in self._kept}
        plain = ("high", "low", POSITIONS, *along.values())
        columns = {name: files.plain_array(whole[name]) for name in whole if name in plain}
        for name in whole:
            if name not in plain:
                counts = whole[along.get(name, POSITIONS)]
                columns[name] = files.list_array(whole[name], counts * whole[name].shape[1])
        path = self.folder / files.shard_name(shard)
        files.write_arrow(path, columns)
        receipt = {
            "file": path.name,
            "examples": len(whole[POSITIONS]),
            "positions": int(whole[POSITIONS].sum()),
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
