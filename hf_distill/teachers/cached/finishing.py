"""The end of a pass: the index of all examples, what makes the folder a dataset, and the manifest, written last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_distill.teachers.cached import files, fingerprints
from hf_distill.teachers.cached.card import card_of


def is_finished(folder: Path, shard: int) -> bool:
    """Whether a shard is whole: it has its receipt, and is what that says."""
    path, receipt = folder / files.shard_name(shard), folder / files.receipt_name(shard)
    if not (path.is_file() and receipt.is_file()):
        return False
    said = files.read_json(receipt)
    return bool(path.stat().st_size == said["bytes"] and fingerprints.of_file(path) == said["blake2b"])


def finish(folder: Path, plan: dict[str, Any]) -> None:
    """Index, dataset files, card, manifest; then the receipts and the plan go.

    Raises:
        DiskFull: no space is left; the shards stay.
    """
    receipts = [files.read_json(folder / files.receipt_name(number)) for number in range(plan["shard_count"])]
    keys = _write_index(folder, receipts)
    index = folder / files.INDEX
    content = fingerprints.of_keys(keys)
    manifest = {
        **{name: value for name, value in plan.items()},
        "dataset": {**plan["dataset"], "content": content},
        "positions": sum(one["positions"] for one in receipts),
        "shards": receipts,
        "index": {"file": index.name, "bytes": index.stat().st_size, "blake2b": fingerprints.of_file(index)},
    }
    _write_dataset_files(folder, receipts, content)
    with files.written_beside(folder / files.CARD) as file:
        file.write(card_of(manifest).encode())
    files.write_json(folder / files.MANIFEST, manifest)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Away with what only an unfinished cache needs."""
    for path in [*folder.glob(files.RECEIPTS), *folder.glob(f"*{files.PARTIAL}-*"), folder / files.PLAN]:
        if path.exists():
            path.unlink()


def _write_index(folder: Path, receipts: list[dict[str, Any]]) -> np.ndarray:
    """All keys in order, each with where its example lies. Returns the keys `[n 2]` in the dataset's order."""
    keys, shards, rows = [], [], []
    for number, one in enumerate(receipts):
        batch = files.read_arrow(folder / one["file"])
        keys.append(np.stack([files.numbers(batch.column("high")), files.numbers(batch.column("low"))], 1))
        shards.append(np.full(one["examples"], number, dtype=np.int32))
        rows.append(np.arange(one["examples"], dtype=np.int32))
    every = np.concatenate(keys)
    order = np.lexsort((every[:, 1], every[:, 0]))  # stable: of equal examples the first is found
    columns = {
        "high": every[order, 0],
        "low": every[order, 1],
        "shard": np.concatenate(shards)[order],
        "row": np.concatenate(rows)[order],
    }
    files.write_arrow(folder / files.INDEX, {name: files.plain_array(values) for name, values in columns.items()})
    return every


def _write_dataset_files(folder: Path, receipts: list[dict[str, Any]], content: str) -> None:
    """What `datasets.load_from_disk` reads beside the shards."""
    schema = files.read_arrow(folder / receipts[0]["file"]).schema
    features = datasets.Features.from_arrow_schema(schema)
    files.write_json(folder / files.INFO, {"features": features.to_dict(), "description": "", "citation": ""})
    state: dict[str, Any] = {
        "_data_files": [{"filename": one["file"]} for one in receipts],
        "_fingerprint": content[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    files.write_json(folder / files.STATE, state)
