"""The pass that builds a cache: its plan, its shards, and the files of a finished cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch.utils.data import DataLoader

from hf_distill._compat import processes
from hf_distill._types import Batch
from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.tasks import Task
from hf_distill.teachers import fingerprints, shards
from hf_distill.teachers.cache import files, keys, measure
from hf_distill.teachers.cache.files import POSITIONS
from hf_distill.teachers.cache.hidden import describe_activations, encode_activation, stored_activations
from hf_distill.teachers.cache.source import (
    BuildOptions,
    Source,
    TeacherOutputs,
    WholeOnEachProcess,
    augmentation_of,
    naming_examples,
)
from hf_distill.teachers.cache.stores import Dense, NoPredictions, Store, TopK, TopKFromServer, store_from
from hf_distill.teachers.model import tokenizer_in
from hf_distill.teachers.passes import Advance, ShardedPass, free_bytes, readable_bytes
from hf_distill.teachers.shards import Json

logger = logging.getLogger(__name__)

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, autoescape=False
)
_UNITS = {"example": "examples", "input": "tokens", "decoder": "tokens", "frames": "frames"}
_LARGE_HEAD = 4096  # with more columns not all are kept by default


class CachePass(ShardedPass):
    """The pass that fills the folder of a cache. Its arguments are those of `TeacherCache.build`."""

    noun, unfinished = "a cache", "an unfinished cache"
    manifest_name, plan_name = files.MANIFEST, files.PLAN
    other_examples = (
        "To train on a part of what it holds, or in another order, open it: TeacherCache(folder). For other examples "
        "choose another folder, or delete this one."
    )

    def __init__(
        self,
        source: Source,
        folder: Path,
        *,
        store: Store | None,
        batch_size: int,
        progress: bool,
        options: BuildOptions,
    ) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size={batch_size}: must be at least 1.")
        super().__init__(folder, options.accelerator or processes(), progress=progress)
        source.teacher.to(options.accelerator or WholeOnEachProcess(self.state))
        self.source = source
        self.store = store
        self.batch_size = batch_size
        self.options = options
        self.unit = _UNITS[source.axis]
        self._first: tuple[Batch, TeacherOutputs] | None = None

    # The plan.

    def plan(self) -> Json:
        """Return what the manifest says about the cache, except for sizes and shards."""
        source = self.source
        first = range(min(self.batch_size, len(source)))
        with naming_examples(first):
            batch = source.batch(first)
        columns = source.key_columns(batch)
        found = source.keys(batch, columns)
        if not np.array_equal(found, source.keys(source.batch(first), columns)):
            raise SettingError(
                "the collator is not deterministic (random masks, crops or augmentation). Change the examples once "
                "with dataset.map or hf_distill.augment.augment_dataset, and use a collator that only pads."
            )
        with naming_examples(first):
            outputs = source.query(batch, self.state.device)
        self._first = (batch, outputs)
        store = self._choose_store(batch, outputs)
        width = outputs.width
        if outputs.sparse is not None:
            compared = source.teacher.alignment.student
            width = compared if isinstance(compared, int) else int(source.student.config.vocab_size)
        return {
            "format": files.FORMAT,
            "format_version": files.FORMAT_VERSION,
            "teacher": source.describe(),
            "processor": fingerprints.describe_processor(source.processing_class),
            "task": {"kind": str(source.task), **source.task.settings()},
            "store": store.describe(),
            "inputs": {
                "main": source.main,
                "columns": list(columns),
                "masked": keys.MASK in keys.read_by_teacher(batch, source.main),
                "decoder": source.decoder_rule(),
            },
            "predictions": {
                "axis": source.axis,
                "columns": self._kept_columns(store, width),
                "temperature": source.temperature,
            },
            "activations": None if source.wanted is None else describe_activations(source.wanted, outputs.activations),
            "augmentation": augmentation_of(source.collator),
            "preprocessing": fingerprints.describe_collator(source.collator),
            "padding": {"batch_size": self.batch_size, "side": _padding_side(batch, source.main)},
            "examples": len(source),
            "first_example": keys.keys_fingerprint(found[:1]),
            "requested_shard_examples": self.options.shard_examples,
            "versions": fingerprints.library_versions(),
        }

    def complete_plan(self, plan: Json) -> Json:
        """Announce the size, and return the plan with what is measured."""
        assert self._first is not None  # plan() was called
        (batch, outputs), device = self._first, self.state.device
        size = measure.measure_size(self.source, plan, batch_size=self.batch_size)
        free = free_bytes(self.folder)
        described = size.describe(self.folder, free=free)
        self.announce(f"The teacher's cache takes {described}.")
        if size.total > free:
            raise DataError(
                f"the cache does not fit: {described}. Choose another disk, a smaller store "
                '(store=Dense("float16"), or TopK for a large vocabulary), or fewer examples.'
            )
        change = measure.change_by_padding(self.source, batch, outputs, device)
        errors = measure.rounding_errors(outputs, plan)
        for warning in (measure.padding_warning(change, plan), measure.rounding_warning(errors, plan)):
            if warning is not None:
                logger.warning(f"About the teacher's cache: {warning}")
        measured = {
            "positions_per_example": size.positions,
            "change_by_padding": change,
            "rounding": errors,
            "agreement_with_full_precision": self.source.agreement(batch, device),
        }
        count = len(self.source)
        examples = measure.shard_size(self.options.shard_examples, size.total / count, count, self.batch_size)
        return {**plan, "shard_examples": examples, "shard_count": -(-count // examples), "measured": measured}

    def _choose_store(self, batch: Batch, outputs: TeacherOutputs) -> Store:
        """Return the default store, or the user's if it fits the teacher's predictions of the first batch."""
        task, store, temperature = self.source.task, self.store, self.source.temperature
        if outputs.sparse is not None:
            if store is not None:
                raise SettingError(f"store={store!r}: this teacher gives likely columns only. Leave store= out.")
            return TopKFromServer(k=int(outputs.sparse.ids.shape[-1]), temperature=outputs.sparse.temperature)
        if outputs.rows is None:
            if store is not None:
                raise SettingError(f"store={store!r} has no effect, because predictions=False. Leave one out.")
            return NoPredictions()
        chosen = store or default_store(task, outputs.width, temperature)
        if chosen.is_sparse and task.matched_by != "vocabulary":
            raise SettingError(
                f"{type(chosen).__name__} keeps tokens of a vocabulary, and {task} has none. Use store=Dense()."
            )
        if temperature is not None:
            chosen.check_temperature(temperature, outputs.width)
        if isinstance(chosen, Dense) and chosen.keeps_largest is None:
            halves = chosen.dtype != "float32" and task.rows_are_distributions(self.source.prepared(batch))
            chosen = replace(chosen, keeps_largest=halves)
        return chosen

    def _kept_columns(self, store: Store, width: int) -> int:
        """Return how many columns are kept: a sparse store leaves out those that only pad a vocabulary."""
        tokenizer = tokenizer_in(self.source.processing_class)
        if not store.is_sparse or tokenizer is None:
            return width
        return min(width, int(max(tokenizer.get_vocab().values())) + 1)

    def announce(self, text: str) -> None:
        """Log a sentence, or give it to the user's function; in the main process only."""
        if self.state.is_main_process:
            (self.options.announce or logger.info)(text)

    # Shards.

    def check_dataset(self, finished: bool) -> None:
        self._first = None  # its memory is free again

    def changed_examples(self, shard: int, receipt: Json) -> Sequence[int]:
        written = _read_keys(self.folder / receipt["file"])
        now = np.concatenate([self._keys(batch) for batch in self._batches([shard])])
        return [self.indices(shard)[row] for row in np.flatnonzero((written != now).any(1))]

    def write_shards(self, numbers: list[int], advance: Advance) -> None:
        store, batches = store_from(self.agreed["store"]), self._batches(numbers)
        for shard in numbers:
            parts = []
            for indices in self._batch_indices(shard):
                with naming_examples(indices):
                    parts.append(self._make_part(next(batches), store))
                advance(len(indices), int(parts[-1][POSITIONS].sum()))
            self._write_parts(shard, parts)

    def _batch_indices(self, shard: int) -> list[Sequence[int]]:
        """Return the batches of a shard, which are the same whichever process makes them."""
        examples = self.indices(shard)
        return [examples[at : at + self.batch_size] for at in range(0, len(examples), self.batch_size)]

    def _batches(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        loader: DataLoader[Any] = DataLoader(
            self.source,  # type: ignore[arg-type]  # it has what a map-style dataset needs
            batch_sampler=[list(indices) for shard in numbers for indices in self._batch_indices(shard)],
            collate_fn=self.source.collate,
            num_workers=self.options.num_workers,
            generator=torch.Generator(),  # so that the training's generator stays untouched
        )
        return iter(loader)

    def _keys(self, batch: Batch) -> np.ndarray:
        return self.source.keys(batch, self.agreed["inputs"]["columns"])

    def _make_part(self, batch: Batch, store: Store) -> dict[str, np.ndarray]:
        found, outputs = self._keys(batch), self.source.query(batch, self.state.device)
        fields = {**self._encode_predictions(outputs, found, store), **self._encode_activations(outputs)}
        return {"high": found[:, 0], "low": found[:, 1], POSITIONS: outputs.counts.astype(np.int32), **fields}

    def _encode_predictions(self, outputs: TeacherOutputs, found: np.ndarray, store: Store) -> dict[str, np.ndarray]:
        if outputs.sparse is not None and isinstance(store, TopKFromServer):
            return store.encode_sparse(outputs.sparse)
        if outputs.rows is None:
            return {}
        rows, columns = outputs.rows, self.agreed["predictions"]["columns"]
        if store.is_sparse:
            rows = rows[:, :columns]
        _check_finite(rows, outputs.counts)
        if rows.shape[1] != columns:
            raise DataError(f"the teacher predicts {rows.shape[1]} columns here and {columns} in the first batch.")
        return store.encode(rows, found, outputs.counts)

    def _encode_activations(self, outputs: TeacherOutputs) -> dict[str, np.ndarray]:
        fields: dict[str, np.ndarray] = {}
        for now, first in zip(outputs.activations, stored_activations(self.agreed["activations"]), strict=True):
            if now != first:
                raise DataError(
                    f"the teacher's {first} are {first.width} wide along {first.axis} in the first batch, and "
                    f"{now.width} along {now.axis} here."
                )
            rows, counts = outputs.activations[now]
            fields[first.counts] = counts.astype(np.int32)
            fields[first.field] = encode_activation(rows, first, self.agreed["activations"]["dtype"])
        return fields

    def _write_parts(self, shard: int, parts: list[dict[str, np.ndarray]]) -> None:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        counts_of = {kept.field: kept.counts for kept in stored_activations(self.agreed["activations"])}
        plain = ("high", "low", POSITIONS, *counts_of.values())
        columns = {name: shards.plain_array(whole[name]) for name in whole if name in plain}
        for name in whole:
            if name not in plain:
                counts = whole[counts_of.get(name, POSITIONS)]
                columns[name] = shards.list_array(whole[name], counts * whole[name].shape[1])
        self.write_shard(shard, columns, positions=int(whole[POSITIONS].sum()))

    # The finished cache.

    def finalize(self, receipts: list[Json]) -> Json:
        """Write index, dataset files and card; return the manifest."""
        found = self._write_index(receipts)
        content = keys.keys_fingerprint(found)
        manifest = {
            **self.agreed,
            "content": content,
            "positions": sum(receipt["positions"] for receipt in receipts),
            "shards": receipts,
            "index": shards.file_entry(self.folder / files.INDEX),
        }
        names = [receipt["file"] for receipt in receipts]
        shards.write_dataset_files(self.folder, names, fingerprint=content[:16])
        card = _TEMPLATES.get_template("card.md.jinja").render(
            manifest,
            kept=stored_activations(manifest["activations"]),
            size=readable_bytes(sum(shard["bytes"] for shard in manifest["shards"])),
        )
        shards.write_text(self.folder / shards.CARD, f"{card}\n")
        return manifest

    def _write_index(self, receipts: list[dict[str, Any]]) -> np.ndarray:
        """Write all keys in order, each with the place of its example; return them in the dataset's order, `[n 2]`."""
        found = np.concatenate([_read_keys(self.folder / receipt["file"]) for receipt in receipts])
        counts = [receipt["examples"] for receipt in receipts]
        order = np.lexsort((found[:, 1], found[:, 0]))  # stable: the first of equal examples is found
        columns = {
            "high": found[order, 0],
            "low": found[order, 1],
            "shard": np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order],
            "row": np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[order],
        }
        arrays = {name: shards.plain_array(values) for name, values in columns.items()}
        shards.write_arrow(self.folder / files.INDEX, arrays)
        return found


def default_store(task: Task, columns: int, temperature: float | None = None) -> Store:
    """Return the store of a head: all columns of a small head, the most likely columns of a large vocabulary."""
    if task.on_values:
        return Dense("float32")  # half precision would round away the differences of large values
    if task.matched_by != "vocabulary" or columns <= _LARGE_HEAD:
        return Dense()
    return TopK() if temperature is None else TopK(temperatures=(temperature,))


def _padding_side(batch: Batch, main: str) -> str | None:
    """Return the padded side of a batch, or None if nothing is padded."""
    mask = keys.read_by_teacher(batch, main).get(keys.MASK)
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return "right" if bool(mask[:, 0].all()) else "left"


def _check_finite(rows: torch.Tensor, counts: np.ndarray) -> None:
    """Raise TeacherError if logits hold NaN or infinity (minus infinity is allowed: an impossible column)."""
    wrong = (rows.isnan() | (rows == torch.inf)).any(-1)
    if bool(wrong.any()):
        example = int(np.searchsorted(np.cumsum(counts), int(wrong.nonzero()[0]), side="right"))
        raise TeacherError(
            f"the teacher's logits hold NaN or infinity, first in number {example + 1} of these. Check it; a "
            "half-precision teacher may overflow: try teacher_dtype='float32' or 'bfloat16'."
        )


def _read_keys(path: Path) -> np.ndarray:
    """Return the keys in a shard, `[n 2]`."""
    shard = shards.read_arrow(path)
    return np.stack([shards.numbers(shard.column("high")), shards.numbers(shard.column("low"))], 1)
