"""TeacherCache: a finished cache on the disk: opened and checked, examples found by key, published as a dataset.

How one is built stands in `building.py`; who teaches from it, in `teacher.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError, TeacherError
from hf_distill.models.packing import packs_several
from hf_distill.tasks import Batch, Task
from hf_distill.teachers import passes
from hf_distill.teachers.cache import files, layout
from hf_distill.teachers.cache import layout as inside_layout
from hf_distill.teachers.cache.build import BuildOptions, CacheContents, CachePass, TrainingSetup
from hf_distill.teachers.cache.files import POSITIONS, MemoryMappedShards, counts_of
from hf_distill.teachers.cache.hidden import CachedInside
from hf_distill.teachers.cache.keys import CACHED_PREFIX, content_keys, read_by_teacher
from hf_distill.teachers.cache.size import readable
from hf_distill.teachers.cache.stores import Store, store_from


def is_cache(path: Any) -> bool:
    """Whether a folder is a cache, finished or not."""
    folder = Path(path)
    return any((folder / name).is_file() for name in (files.PLAN, files.INDEX)) or (
        (folder / files.MANIFEST).is_file() and passes.read_json(folder / files.MANIFEST).get("format") == files.FORMAT
    )


class TeacherCache:
    """What a teacher says of every example of a dataset, by the content of the example.

    Args:
        path: a folder that `TeacherCache.build` filled, or a copy of one.
        verify: compare every file with its checksum (it is read once from end to end); else its size alone.

    Attributes:
        manifest: who the teacher is, of what dataset, and how it is kept.

    Raises:
        DataError: no cache, an unfinished one, or a file that is missing, cut off or changed.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = _opened(self.path)
        self.store: Store = store_from(self.manifest["store"])
        self.main: str = self.manifest["inputs"]["main"]
        self.columns: tuple[str, ...] = tuple(self.manifest["inputs"]["columns"])
        self.axis: layout.Axis = self.manifest["predictions"]["axis"]
        start_token = self.manifest["teacher"].get("config", {}).get("bos_token_id")  # several teachers have no one
        self.inside = CachedInside(self.manifest.get("inside"), start_token=start_token)
        self._verify(checksums=verify)
        fields = self.store.fields(self.manifest["predictions"]["columns"])
        self._fields = list(fields)
        columns = {name: (POSITIONS, field.width) for name, field in fields.items()}
        columns |= {one.field: (one.counts, one.width) for one in self.inside.kept}
        self._mapped = MemoryMappedShards(self.path, [one["file"] for one in self.manifest["shards"]], columns)

    @classmethod
    def build(
        cls,
        teacher: Any,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        student: Any = None,
        task: Task | str | None = None,
        data_collator: Callable[..., Any] | None = None,
        processing_class: Any = None,
        batch_size: int = 32,
        store: Store | None = None,
        predictions: bool = True,
        temperature: float | None = None,
        objectives: Any = None,
        reads: Iterable[Any] | None = None,
        inside_dtype: str = "float16",
        dtype: str | None = None,
        shard_examples: int | None = None,
        num_workers: int = 0,
        accelerator: Any = None,
        say: Callable[[str], None] | None = None,
        progress: bool = True,
    ) -> TeacherCache:
        """One pass of the teacher over a dataset. Interrupted at any point, the same call goes on where it was.

        Several processes (`accelerate launch`, `torchrun`) each make a part of the shards. The bytes do not depend on
        how often it was interrupted, nor on how many processes there are.

        Args:
            teacher: a model, a folder or Hub id; or any other teacher (an `Ensemble`, say), with `student`.
            dataset: with a length, of the examples that a Trainer is given.
            student: the model that is to learn, where its head is of a class that is not the teacher's.
            task: instead.
            data_collator, processing_class: as in the training; the default collator is Trainer's.
            batch_size: consecutive examples; part of what the cache is, where predictions depend on padding.
            store: None: `TopK()` for a vocabulary of more than 4,096 columns, `Dense("float32")` for values, else
                `Dense()`.
            predictions: False: none are kept, for training on objectives alone (`alpha=None`).
            temperature: of the training, for teachers whose predictions hold for one (a mean of probabilities).
            objectives: of the training: what they read of the teacher's inside is kept.
            reads: what to keep by name, ("hidden", block) or a `ActivationKey`.
            inside_dtype: "float16", "bfloat16" or "float32".
            dtype: of the teacher, as `teacher_dtype`.
            shard_examples: in a file, which are lost at most when the pass is interrupted; None: 256 or a thousandth of
                all, and no more than 64 MB.
            accelerator: None: processes and device as Accelerate finds them.
            say: is given the announcements; None: the log does.
            progress: a bar, with the speed and the time left.

        Raises:
            DataError: it does not fit, the disk is full (what is finished stays), or the folder holds something else.
            SettingError, TeacherError: see the messages.

        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification as Bert
        >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> cache = TeacherCache.build(Bert(config), [{"input_ids": [1, 2]}] * 2, tempfile.mkdtemp(), progress=False)
        >>> len(cache), cache.manifest["store"]["name"]
        (2, 'dense')
        """
        given = TrainingSetup(student, task, data_collator, processing_class, dtype, accelerator)
        kept = CacheContents(predictions, temperature, objectives, reads, inside_dtype)
        settings = BuildOptions(batch_size, store, shard_examples, num_workers, say, progress)
        fresh = CachePass.prepared(teacher, dataset, Path(path), given, kept, settings).run()
        return cls(path, verify=not fresh)

    def __len__(self) -> int:
        return int(self.manifest["dataset"]["examples"])

    def __repr__(self) -> str:
        return f"TeacherCache({len(self):,} examples, {self.store.name}, {readable(self.bytes)})"

    @property
    def bound_to(self) -> float | None:
        """The one temperature that the predictions are for; None: any that the store can soften them to."""
        found: float | None = self.manifest["predictions"].get("temperature")
        return found

    @property
    def bytes(self) -> int:
        return int(sum(shard["bytes"] for shard in self.manifest["shards"]))

    def dataset(self) -> datasets.Dataset:
        """The cache as an ordinary dataset: keys, and the numbers that are kept of each example."""
        return datasets.load_from_disk(str(self.path))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> str:
        """Upload it as a dataset with a card; returns the commit's address. `CachedTeacher.from_hub` reads it.

        Args: as `huggingface_hub.HfApi.upload_folder`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        shards = [one["file"] for one in self.manifest["shards"]]
        commit = api.upload_folder(
            folder_path=self.path,
            repo_id=repo_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[*shards, files.INDEX, passes.STATE, passes.INFO, passes.CARD, files.MANIFEST],
            commit_message="What a teacher said, cached by hf-distill",
        )
        return str(commit.commit_url)

    # Finding examples.

    def look_up(
        self, batch: Batch, task: Task | None = None, *, slot: str = "", fields: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """What the teacher said of the rows of a batch, laid out as the batch is padded, on the CPU.

        Args:
            slot: between prefix and field, where several caches answer.
            fields: of the inside; None: all.

        Returns:
            for each field, `teacher_cached_<field>`: `[b t width]`, or `[b width]` where a row is an example; where the
            number of frames is for the task to know, also `teacher_cached_positions` `[b]`.

        Raises:
            DataError: an example that is not in the cache, or columns are missing that it is keyed by.
            TeacherError: an example with another number of positions than it had.
        """
        where = self._mapped.find(content_keys(batch, self.columns, main=self.main))
        if bool((where < 0).any()):
            self._raise_missing(where, batch)
        spans, laid = self._mapped.spans(where), {}
        counts = counts_of(spans)
        frames = self.axis == "frames"  # of which the task knows, by the student's rule
        real = layout.real_positions(self.axis, batch if frames else read_by_teacher(batch, self.main), task=task)
        for name in self._fields:
            rows = self.store.tensor(name, self._mapped.gather(spans, name))
            laid[name] = layout.lay(rows, counts, real, self.axis)
        if frames:
            laid[POSITIONS] = torch.from_numpy(counts)
        laid |= self._inside_of(where, batch, fields)
        return {f"{CACHED_PREFIX}{slot}{name}": value for name, value in laid.items()}

    def _inside_of(self, where: np.ndarray, batch: Batch, fields: Collection[str] | None) -> dict[str, Tensor]:
        own, laid = read_by_teacher(batch, self.main), {}
        for one in self.inside.kept:
            if fields is None or one.field in fields:
                spans = self._mapped.spans(where, one.counts)
                counts = counts_of(spans)
                rows = inside_layout.as_tensor(self._mapped.gather(spans, one.field), self.manifest["inside"]["dtype"])
                laid[one.field] = inside_layout.lay_hidden(rows, counts, one, own)
                if one.along == "frames":
                    laid[one.counts] = torch.from_numpy(counts)
        return laid

    def has(self, batch: Batch) -> np.ndarray:
        """`[b]` bool: which rows of a batch are in the cache."""
        return self._mapped.find(content_keys(batch, self.columns, main=self.main)) >= 0

    def _raise_missing(self, where: np.ndarray, batch: Batch) -> None:
        if packs_several(batch):
            raise DataError(
                "the collator packs several examples into a row, and the teacher's cache knows each example by itself. "
                "Train with a collator that pads (DataCollatorForSeq2Seq(tokenizer)), or with the live teacher; or "
                "pack the dataset once before, and build the cache of the packed rows."
            )
        missing = np.flatnonzero(where < 0)
        masked = "" if self.manifest["inputs"]["masked"] else " (the cache was built without attention_mask)"
        raise DataError(
            f"{len(missing)} of the {len(where)} examples of a batch are not in the teacher's cache (the first is "
            f"number {missing[0]} of the batch). It holds {len(self):,} examples, each known by the content of "
            f"{', '.join(self.columns)} without padding. Either the example was not in the dataset that the cache was "
            "built of, or it is another one since (other text, other truncation, another tokenizer): build the cache "
            "of this dataset. Or it is changed while training (masks, crops or augmentation drawn anew each time): "
            "change it once before (hf_distill.augment.augment_dataset) and build the cache of that, or use the live "
            f"teacher. Or padding is taken for content, where no attention_mask tells them apart{masked}: have the "
            "processor return it, or pad to one fixed length."
        )

    # Files.

    def _verify(self, *, checksums: bool) -> None:
        described = [*self.manifest["shards"], self.manifest["index"]]
        for one in described:
            path = self.path / one["file"]
            if not path.is_file():
                raise DataError(f"{path} is missing: the cache is not whole. Copy it again, or build it again.")
            size = path.stat().st_size
            if size != one["bytes"]:
                raise DataError(
                    f"{path} has {size:,} bytes, the manifest says {one['bytes']:,}: it was cut off or changed. Copy "
                    "it again, or delete the folder and build the cache again."
                )
            if checksums and passes.checksum(path) != one["blake2b"]:
                raise DataError(
                    f"{path} is not what was written: its checksum differs from the manifest's. Copy it again, or "
                    "delete the folder and build the cache again."
                )

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: they map the files themselves."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], verify=False)  # type: ignore[misc]  # opened anew


def _opened(folder: Path) -> dict[str, Any]:
    if (folder / files.MANIFEST).is_file():
        manifest = passes.read_json(folder / files.MANIFEST)
        if manifest.get("format") != files.FORMAT or manifest.get("format_version", 0) > files.FORMAT_VERSION:
            raise DataError(
                f"{folder / files.MANIFEST} is of {manifest.get('format')!r}, version "
                f"{manifest.get('format_version')}; this version of hf-distill reads {files.FORMAT!r}, version "
                f"{files.FORMAT_VERSION}. Update hf-distill, or build the cache again."
            )
        return manifest
    if (folder / files.PLAN).is_file():
        plan = passes.read_json(folder / files.PLAN)
        done = sum(passes.read_json(path)["examples"] for path in folder.glob(passes.RECEIPTS))
        raise DataError(
            f"{folder} is an unfinished cache: {done:,} of {plan['dataset']['examples']:,} examples are there. Call "
            "TeacherCache.build with the same arguments: it goes on where it was."
        )
    raise TeacherError(f"{folder} holds no teacher cache (no {files.MANIFEST}). Build one: TeacherCache.build(...).")
