"""The folder of completions: shards beside and renamed, a pass that goes on, and what `datasets` reads of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch

from hf_distill.errors import DataError
from hf_distill.teachers.cache import files
from hf_distill.teachers.cache import keys as fingerprints
from hf_distill.teachers.cache.build import is_finished

MANIFEST, PLAN = "completions.json", "completions-unfinished.json"
_CARD = """---
tags:
- hf-distill
- knowledge-distillation
configs:
- config_name: default
  data_files: "shard-*.arrow"
---

# What a teacher wrote

{rows:,} completions of {examples:,} prompts by a {model} ({name}), written by hf-distill for sequence-level
distillation. `index` is the prompt's place in the dataset that was asked about, `finished` says whether the text came
to its end, and `labels` are -100 on the prompt.

Generation: {settings}.
"""
_TYPES = {
    "index": pa.int64(),
    "input_ids": pa.list_(pa.int64()),
    "labels": pa.list_(pa.int64()),
    "prompt": pa.string(),
    "completion": pa.string(),
    "finished": pa.bool_(),
}


class Folder:
    """Where the completions are written.

    Args:
        plan: all that they follow from, and how they are cut into shards.
    """

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        self.path = path
        self.plan = plan

    def look(self) -> bool:
        """Whether all is written already. Nothing is changed.

        Raises:
            DataError: the folder holds something else, or what was written there is damaged.
        """
        for name, what in ((MANIFEST, "completions"), (PLAN, "unfinished completions")):
            if (self.path / name).is_file():
                there = self._read(name)
                differing = fingerprints.differences({key: there.get(key) for key in self.plan}, self.plan)
                if differing:
                    raise DataError(
                        f"{self.path} holds {what} of something else: {'; '.join(differing[:4])}. Choose another "
                        "folder, delete this one, or call it with what it was begun with."
                    )
                if name == MANIFEST:
                    self._refuse_damage(there["shards"])
                return name == MANIFEST
        if self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir()))):
            raise DataError(f"{self.path} holds something that is no completions. Give a new or an empty folder.")
        return False

    def begin(self) -> None:
        """The plan, where there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / PLAN).is_file():
            files.write_json(self.path / PLAN, self.plan)

    def is_done(self, shard: int, asked: str) -> bool:
        """Whether an earlier pass finished this shard.

        Raises:
            DataError: it did, and of other prompts than the dataset now has.
        """
        if (self.path / MANIFEST).is_file():
            said = self._read(MANIFEST)["shards"][shard]
        else:
            try:
                if not is_finished(self.path, shard):
                    return False
                said = files.read_json(self.path / files.receipt_name(shard))
            except DataError:  # a receipt that cannot be read: the shard is written again, to the same bytes
                return False
        if said["asked"] != asked:
            raise DataError(
                f"shard {shard} of {self.path} was written to other prompts than the dataset now has there. Give the "
                "dataset that it was begun with, or choose another folder."
            )
        return True

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_bytes())
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error
        return content

    def _refuse_damage(self, shards: Sequence[dict[str, Any]]) -> None:
        for name in (files.INFO, files.STATE):
            self._read(name)
        for one in shards:
            path = self.path / one["file"]
            if not path.is_file():
                raise self._damaged(one["file"], "it is not there")
            if path.stat().st_size != one["bytes"] or fingerprints.of_file(path) != one["blake2b"]:
                raise self._damaged(one["file"], "it is cut off, or not what was written there")

    def _damaged(self, name: str, reason: Any) -> DataError:
        return DataError(
            f"{self.path / name} cannot be read ({reason}). Delete {self.path} and make the completions again, or copy "
            "the folder again."
        )

    def write(self, shard: int, rows: Sequence[dict[str, Any]], asked: str) -> None:
        """Raises:
        DataError: the disk is full; the shards so far stay.
        """
        columns = {name: pa.array([row[name] for row in rows], type=_TYPES[name]) for name in rows[0]}
        path = self.path / files.shard_name(shard)
        try:
            files.write_arrow(path, columns)
            receipt = {"file": path.name, "rows": len(rows), "asked": asked, "bytes": path.stat().st_size}
            receipt["blake2b"] = fingerprints.of_file(path)
            files.write_json(self.path / files.receipt_name(shard), receipt)
        except files.DiskFull as error:
            raise DataError(
                f"the disk is full at {self.path}. {self.kept()}. Free space and make the same call again: it goes on "
                "from there."
            ) from error

    def kept(self) -> str:
        """How much of the pass is on the disk, in words."""
        receipts = [files.read_json(path) for path in sorted(self.path.glob(files.RECEIPTS))]
        each = self.plan["generation"].get("num_return_sequences") or 1
        kept = sum(one["rows"] for one in receipts) // each
        return f"The answers to {kept:,} of {self.plan['examples']:,} prompts are kept in {self.path}"

    def finish(self) -> None:
        """The files of a dataset, the card and the manifest; then what only an unfinished pass needs goes."""
        receipts = [files.read_json(self.path / files.receipt_name(i)) for i in range(self.plan["shard_count"])]
        content = hashlib.blake2b("".join(one["blake2b"] for one in receipts).encode(), digest_size=8).hexdigest()
        schema = files.read_arrow(self.path / receipts[0]["file"]).schema
        features = datasets.Features.from_arrow_schema(schema)
        files.write_json(self.path / files.INFO, {"features": features.to_dict(), "description": "", "citation": ""})
        state: dict[str, Any] = {"_data_files": [{"filename": one["file"]} for one in receipts]}
        state |= {"_fingerprint": content, "_split": "train", "_output_all_columns": False}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
        files.write_json(self.path / files.STATE, state)
        teacher, settings = self.plan["teacher"], self.plan["generation"]
        card = _CARD.format(
            rows=sum(one["rows"] for one in receipts),
            examples=self.plan["examples"],
            model=teacher["class"],
            name=teacher["name"] or "no name",
            settings=", ".join(f"{name} {value}" for name, value in sorted(settings.items())),
        )
        with files.written_beside(self.path / files.CARD) as file:
            file.write(card.encode())
        files.write_json(self.path / MANIFEST, {**self.plan, "shards": receipts})
        self.tidy()

    def tidy(self) -> None:
        for path in [*self.path.glob(files.RECEIPTS), *self.path.glob(f"*{files.PARTIAL}-*"), self.path / PLAN]:
            path.unlink(missing_ok=True)


def _is_foreign(path: Path) -> bool:
    return files.PARTIAL not in path.name and not path.name.startswith(".")


def digest_of(prompts: Sequence[Any]) -> str:
    """Of what was asked, in order."""
    found = hashlib.blake2b(digest_size=16)
    for one in prompts:
        data = one.numpy().tobytes() if isinstance(one, torch.Tensor) else repr(list(one)).encode()
        found.update(b"%d:" % len(data) + data)
    return found.hexdigest()
