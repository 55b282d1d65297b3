"""TeacherCache: a finished cache on the disk, opened and checked; examples are found in it by their content."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from hf_distill.errors import DataError, TeacherError
from hf_distill.models.packing import packs_several
from hf_distill.tasks import Batch, Task
from hf_distill.teachers import shards
from hf_distill.teachers.base import Collator, Teacher
from hf_distill.teachers.cache import files, layout
from hf_distill.teachers.cache.build import CachePass
from hf_distill.teachers.cache.files import POSITIONS, MemoryMappedShards, from_disk
from hf_distill.teachers.cache.hidden import CachedActivations, Objectives
from hf_distill.teachers.cache.keys import CACHED_PREFIX, content_keys, read_by_teacher
from hf_distill.teachers.cache.source import BuildOptions, Source, TrainingSetup
from hf_distill.teachers.cache.stores import Store, store_from
from hf_distill.teachers.passes import kept_examples, readable_bytes
from hf_distill.teachers.shards import Json


def is_cache(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a cache, finished or not."""
    folder = Path(path)
    if any((folder / name).is_file() for name in (files.PLAN, files.INDEX)):
        return True
    manifest = folder / files.MANIFEST
    return manifest.is_file() and shards.read_json(manifest).get("format") == files.FORMAT


class TeacherCache:
    """The predictions of a teacher for every example of a dataset, found by the content of the example.

    Args:
        path: a folder that `TeacherCache.build` filled, or a copy of one.
        verify: whether to compare every file with its checksum, or its size only.

    Attributes:
        manifest: who the teacher is, what the cache holds, and how.
        store: what is kept of predictions.
        activations: what is kept of activations.

    Raises:
        DataError: if the cache is unfinished, or a file is missing, cut off or changed.
        TeacherError: if the folder holds no cache.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.store: Store = store_from(self.manifest["store"])
        self.main: str = self.manifest["inputs"]["main"]
        self.columns: tuple[str, ...] = tuple(self.manifest["inputs"]["columns"])
        self.axis: layout.Axis = self.manifest["predictions"]["axis"]
        start_token = self.manifest["teacher"].get("config", {}).get("bos_token_id")  # several teachers have none
        self.activations = CachedActivations(self.manifest["activations"], start_token=start_token)
        entries = self.manifest["shards"]
        shards.check_files(self.path, [*entries, self.manifest["index"]], checksums=verify)
        fields = self.store.fields(self.manifest["predictions"]["columns"])
        columns = {name: (POSITIONS, field.width) for name, field in fields.items()}
        columns |= {kept.field: (kept.counts, kept.width) for kept in self.activations.kept}
        self.fields = tuple(fields)
        self._shards = MemoryMappedShards(self.path, [entry["file"] for entry in entries], columns)

    @classmethod
    def build(
        cls,
        teacher: Teacher | nn.Module | str | Path,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        student: nn.Module | None = None,
        task: Task | str | None = None,
        data_collator: Collator | None = None,
        processing_class: Any = None,
        objectives: Objectives | None = None,
        store: Store | None = None,
        temperature: float | None = None,
        batch_size: int = 32,
        progress: bool = True,
        options: BuildOptions | None = None,
    ) -> TeacherCache:
        """Run a teacher once over a dataset. If it is interrupted at any point, the same call continues from there.

        Several processes (`accelerate launch`, `torchrun`) each make a part of the shards. The bytes depend neither on
        interruptions nor on the number of processes.

        Args:
            teacher: a model, a folder or a Hub id; or any other teacher (such as an `Ensemble`), together with
                `student`.
            dataset: the examples of the training; it must have a length.
            path: the folder to fill.
            student: the model to be trained; needed for `objectives` and if its kind of head is not the teacher's.
            task: the task of the student, if it does not follow from its class.
            data_collator: the collator of the training; the default is Trainer's.
            processing_class: the tokenizer or processor of the training.
            objectives: the objectives of the training; the activations of the teacher that they read are kept.
            store: what is kept of each row of predictions. None means `TopK()` for a vocabulary of more than 4,096
                columns, `Dense("float32")` for values, and `Dense()` otherwise.
            temperature: of the training, for teachers whose predictions are for one temperature (a mean of
                probabilities).
            batch_size: consecutive examples of a forward. It matters if predictions depend on padding.
            progress: whether to show a progress bar.
            options: the less common options.

        Raises:
            DataError: if the cache does not fit onto the disk, the disk is full (finished shards stay), or the folder
                holds something else.
            SettingError: if a setting is not allowed.
            TeacherError: if no cache can be built from this teacher.

        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification as Bert
        >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> cache = TeacherCache.build(Bert(config), [{"input_ids": [1, 2]}] * 2, tempfile.mkdtemp(), progress=False)
        >>> len(cache), cache.manifest["store"]["name"]
        (2, 'dense')
        """
        options = options or BuildOptions()
        setup = TrainingSetup(student, task, data_collator, processing_class, objectives, temperature)
        source = Source(teacher, dataset, setup, options)
        building = CachePass(source, Path(path), store=store, batch_size=batch_size, progress=progress, options=options)
        built = building.run()
        if not built:
            building.announce(f"{path} is built already.")
        return cls(path, verify=not built)

    def __len__(self) -> int:
        return int(self.manifest["examples"])

    def __repr__(self) -> str:
        return f"TeacherCache({len(self):,} examples, {self.store.name}, {readable_bytes(self.bytes)})"

    @property
    def temperature(self) -> float | None:
        """The one temperature that the teacher's predictions are for, or None if they are for any."""
        found: float | None = self.manifest["predictions"]["temperature"]
        return found

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return int(sum(entry["bytes"] for entry in self.manifest["shards"]))

    def dataset(self) -> datasets.Dataset:
        """Return the cache as a dataset of keys and stored numbers, one row for each example."""
        return datasets.load_from_disk(str(self.path))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> str:
        """Upload it as a dataset with a card, for `CachedTeacher.from_hub`. Returns the address of the commit.

        Args:
            repo_id: the repository on the Hub, created if it does not exist.
            private: as in `HfApi.create_repo`.
            token: as in `HfApi`.
            revision: as in `HfApi.upload_folder`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        names = [entry["file"] for entry in self.manifest["shards"]]
        commit = api.upload_folder(
            folder_path=self.path,
            repo_id=repo_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[*names, files.INDEX, shards.STATE, shards.INFO, shards.CARD, files.MANIFEST],
            commit_message="Predictions of a teacher, cached by hf-distill",
        )
        return str(commit.commit_url)

    # Finding examples.

    def has(self, batch: Batch) -> np.ndarray:
        """Return which rows of a batch are in the cache, `[b]` bool."""
        return self._find(batch) >= 0

    def look_up(
        self, batch: Batch, task: Task | None = None, *, slot: str = "", fields: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return what is stored for the rows of a batch, laid out as the batch is padded, on the CPU.

        That is `teacher_cached_<field>` for each field, `[b t width]`, or `[b width]` if there is one row for each
        example; for predictions at frames also `teacher_cached_positions`, `[b]`.

        Args:
            batch: a batch of the training.
            task: the student's task, or None if it is not known.
            slot: stands between prefix and field, if several caches are used.
            fields: the activations to return, or None for all.

        Raises:
            DataError: if an example is not in the cache, or the batch lacks a column that keys are hashes of.
            TeacherError: if an example has another number of positions than it had.
        """
        places = self._find(batch)
        if bool((places < 0).any()):
            self._raise_missing(places, batch)
        laid = {**self._predictions(places, batch, task), **self._activations(places, batch, fields)}
        return {f"{CACHED_PREFIX}{slot}{name}": value for name, value in laid.items()}

    def _find(self, batch: Batch) -> np.ndarray:
        return self._shards.find(content_keys(batch, self.columns, main=self.main))

    def _predictions(self, places: np.ndarray, batch: Batch, task: Task | None) -> dict[str, Tensor]:
        frames, laid = self.axis == "frames", {}
        # The task knows the frames of its own batch, by the student's rule.
        real = layout.real_positions(self.axis, batch if frames else read_by_teacher(batch, self.main), task=task)
        for name in self.fields:
            values, counts = self._shards.gather(places, name)
            rows = self.store.decode(name, values)
            laid[name] = rows if self.axis == "example" else layout.lay(rows, counts, real, from_left=frames)
            if frames:
                laid[POSITIONS] = torch.from_numpy(counts)
        return laid

    def _activations(self, places: np.ndarray, batch: Batch, fields: Collection[str] | None) -> dict[str, Tensor]:
        own, laid = read_by_teacher(batch, self.main), {}
        for kept in self.activations.kept:
            if fields is None or kept.field in fields:
                values, counts = self._shards.gather(places, kept.field)
                rows = from_disk(values, self.manifest["activations"]["dtype"])
                laid[kept.field] = layout.lay_hidden(rows, counts, kept, own)
                if kept.along == "frames":
                    laid[kept.counts] = torch.from_numpy(counts)
        return laid

    def _raise_missing(self, places: np.ndarray, batch: Batch) -> None:
        if packs_several(batch):
            raise DataError(
                "the collator packs several examples into a row, and the teacher's cache keeps each example by itself. "
                "Train with a collator that pads, or build the cache from a dataset that is packed once."
            )
        missing = np.flatnonzero(places < 0)
        masked = "" if self.manifest["inputs"]["masked"] else " (the cache was built without attention_mask)"
        raise DataError(
            f"{len(missing)} of the {len(places)} examples of a batch are not in the teacher's cache (the first is "
            f"number {missing[0]} of the batch). It holds {len(self):,} examples, identified by the content of "
            f"{', '.join(self.columns)} without padding. If the dataset has changed (texts, truncation, tokenizer), "
            "build the cache from it. If the training changes examples randomly (masks, crops), change them once "
            "(hf_distill.augment.augment_dataset) and build the cache from that, or use the live teacher. If padding "
            f"is mistaken for content{masked}, let the processor return attention_mask, or pad to one fixed length."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what worker processes that are not forked need: they map the files themselves."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], verify=False)  # type: ignore[misc]  # the files were checked before


def _read_manifest(folder: Path) -> Json:
    if (folder / files.MANIFEST).is_file():
        manifest = shards.read_json(folder / files.MANIFEST)
        if (manifest.get("format"), manifest.get("format_version")) != (files.FORMAT, files.FORMAT_VERSION):
            raise DataError(
                f"{folder / files.MANIFEST} is of {manifest.get('format')!r}, version "
                f"{manifest.get('format_version')}; this version of hf-distill reads {files.FORMAT!r}, version "
                f"{files.FORMAT_VERSION}. Update hf-distill, or build the cache again."
            )
        return manifest
    if (folder / files.PLAN).is_file():
        plan = shards.read_json(folder / files.PLAN)
        raise DataError(
            f"{folder} is an unfinished cache: {kept_examples(folder):,} of {plan['examples']:,} examples are there. "
            "Call TeacherCache.build with the same arguments: it continues from there."
        )
    raise TeacherError(f"{folder} holds no teacher cache (no {files.MANIFEST}). Build one: TeacherCache.build(...).")
