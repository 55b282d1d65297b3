"""The pass of a teacher over a dataset: shard by shard, resumable to the byte, by several processes.

What is found out before stands in `planning.py`, what closes it in `finishing.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_distill._compat import processes
from hf_distill.errors import DataError, SettingError
from hf_distill.tasks import Task
from hf_distill.teachers.cached import files, fingerprints, planning, size
from hf_distill.teachers.cached.asking import asked_of
from hf_distill.teachers.cached.drawn import refuse_drawn
from hf_distill.teachers.cached.finishing import finish, tidy
from hf_distill.teachers.cached.inside import wanted
from hf_distill.teachers.cached.passing import Pass
from hf_distill.teachers.cached.source import Source
from hf_distill.teachers.cached.stores import Store
from hf_distill.teachers.cached.versions import with_versions

logger = logging.getLogger(__name__)
_MEASURED = "measured"  # in the plan: what a resumed pass takes over and does not measure again


@dataclass(frozen=True)
class Settings:
    """How the pass is made; see `TeacherCache.build`."""

    batch_size: int
    store: Store | None
    shard_examples: int | None
    num_workers: int
    say: Callable[[str], None] | None
    progress: bool


@dataclass(frozen=True)
class Kept:
    """What is kept of what the teacher says; see `TeacherCache.build`."""

    predictions: bool
    temperature: float | None
    objectives: Any
    reads: Any
    inside_dtype: str


@dataclass(frozen=True)
class Given:
    """What is known of the training; see `TeacherCache.build`."""

    student: Any
    task: Task | str | None
    collator: Callable[..., Any] | None
    processor: Any
    dtype: str | None
    accelerator: Any


class Builder:
    """One process's part of a pass."""

    def __init__(self, source: Source, folder: Path, state: Any, settings: Settings) -> None:
        self.source = source
        self.folder = folder
        self.state = state
        self.settings = settings
        self.plan: dict[str, Any] = {}
        self._now: dict[str, Any] | None = None

    @classmethod
    def prepared(
        cls, teacher: Any, dataset: Any, folder: Path, given: Given, kept: Kept, settings: Settings
    ) -> Builder:
        """Raises:
        SettingError, TeacherError: see the messages; nothing is written.
        """
        if settings.batch_size < 1 or (settings.shard_examples or 1) < 1:
            raise SettingError(
                f"batch_size={settings.batch_size}, shard_examples={settings.shard_examples}: at least 1."
            )
        state = given.accelerator or processes()
        chosen = given.collator or planning.default_collator(given.processor)
        refuse_drawn(chosen)
        asked = asked_of(
            teacher,
            student=given.student,
            task=given.task,
            dtype=given.dtype,
            temperature=kept.temperature,
            processor=given.processor,
            predictions=kept.predictions,
        )
        inside = wanted(
            asked.inside,
            objectives=kept.objectives,
            reads=kept.reads,
            student=given.student,
            task=asked.task,
            dtype=kept.inside_dtype,
        )
        if inside is None and not kept.predictions:
            raise SettingError(
                "predictions=False and nothing of the inside: say what is to be kept, objectives= or reads=."
            )
        asked.place(given.accelerator, state)
        labels = planning.label_reader(asked, dataset, chosen)
        planning.refuse_unprocessed_data(asked, dataset, given.collator)
        every = with_versions(dataset, chosen)
        source = Source(asked, every, chosen, given.processor, inside, kept.predictions, labels)
        return cls(source, folder, state, settings)

    def run(self) -> bool:
        """Whether there was anything to do.

        Raises:
            DataError: see `TeacherCache.build`.
        """
        if self._is_built():
            return False
        self._begin()
        mine = range(self.state.process_index, self.plan["shard_count"], self.state.num_processes)
        shown = self.settings.progress and self.state.is_main_process
        whole = self._pass(self.plan)
        done = [number for number in mine if whole.is_done(number)]
        try:
            whole.make([number for number in mine if number not in done], done=done, shown=shown)
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                finish(self.folder, self.plan)
            self.state.wait_for_everyone()
        except files.DiskFull as error:
            raise DataError(self._full(error)) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self._kept()}; the same call goes on from there.") from None
        return True

    def _kept(self) -> str:
        """How much of the pass is on the disk, in words."""
        receipts = [files.read_json(path) for path in sorted(self.folder.glob(files.RECEIPTS))]
        kept, asked = sum(one["examples"] for one in receipts), self.plan["dataset"]["examples"]
        return f"{kept:,} of {asked:,} examples are kept in {self.folder}"

    def _pass(self, plan: dict[str, Any]) -> Pass:
        return Pass(self.source, self.folder, plan, self.state.device, num_workers=self.settings.num_workers)

    # Before the pass.

    def _is_built(self) -> bool:
        """Raises:
        DataError: the folder holds a cache of something else, or what is no cache.
        """
        if not (self.folder / files.MANIFEST).is_file():
            self._refuse_foreign()
            return False
        manifest = files.read_json(self.folder / files.MANIFEST)
        self._refuse_other_plan(manifest, self._planned(), "a cache")
        if self._pass(manifest).content() != manifest["dataset"]["content"]:
            raise DataError(
                f"{self.folder} holds a cache of other examples, or of the same in another order. To train on part of "
                "what it holds, or in another order, open it: TeacherCache(folder). For other examples choose another "
                "folder, or delete this one."
            )
        if self.state.is_main_process:
            tidy(self.folder)  # if it was killed right before
        self._say(f"{self.folder} is built already.")
        return True

    def _begin(self) -> None:
        """Announce it, and agree on the plan: that of the folder, if the pass goes on."""
        plan = self._planned()
        if (self.folder / files.PLAN).is_file():
            self.plan = files.read_json(self.folder / files.PLAN)
            self._refuse_other_plan(self.plan, plan, "an unfinished cache")
        else:
            self.plan = self._sized(plan)
        self.state.wait_for_everyone()  # nobody has written yet what others look for
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for beside in self.folder.glob(f"*{files.PARTIAL}-*"):  # of a pass that was killed
                beside.unlink()
            if not (self.folder / files.PLAN).is_file():
                self._write(files.PLAN, self.plan)
        self.state.wait_for_everyone()
        self.plan = files.read_json(self.folder / files.PLAN)  # as a resumed pass reads it

    def _planned(self) -> dict[str, Any]:
        """What is asked for now, found out once."""
        if self._now is None:
            plan = planning.made_plan(
                self.source,
                store=self.settings.store,
                batch_size=self.settings.batch_size,
                device=self.state.device,
            )
            self._now = {**plan, "shard_asked": self.settings.shard_examples}
        return self._now

    def _sized(self, plan: dict[str, Any]) -> dict[str, Any]:
        batch_size, count = self.settings.batch_size, plan["dataset"]["examples"]
        found = planning.size_of(self.source, plan, batch_size=batch_size)
        free = size.free_bytes(self.folder)
        self._say(f"The teacher's cache takes {size.announced(found, self.folder, free=free)}.")
        size.refuse_too_large(found, self.folder, free=free)
        change = planning.change_by_padding(self.source, batch_size=batch_size, device=self.state.device)
        remark = planning.padding_remark(change, plan)
        if remark is not None:
            logger.warning(f"About the teacher's cache: {remark}")
        examples = planning.shard_size(self.settings.shard_examples, found.total / count, count, batch_size)
        measured: dict[str, Any] = {"positions_an_example": found.positions, "change_by_padding": change}
        errors = planning.rounding_errors(self.source, plan, batch_size=batch_size, device=self.state.device)
        if errors:
            measured["rounding"] = errors
            remark = planning.rounding_remark(errors, plan)
            if remark is not None:
                logger.warning(f"About the teacher's cache: {remark}")
        agreement = self.source.measured_agreement(
            self.source.batch(list(range(min(batch_size, count)))), self.state.device
        )
        if agreement is not None:
            measured["agreement_with_full_precision"] = agreement
        return {**plan, "shard_examples": examples, "shard_count": -(-count // examples), _MEASURED: measured}

    def _refuse_other_plan(self, there: dict[str, Any], now: dict[str, Any], what: str) -> None:
        differing = fingerprints.differences({name: there.get(name) for name in now}, now)
        finished = "shards" in there
        if finished:  # then neither matters which versions made it, nor in which format of before it lies
            of_before = ("versions", "format_version", "store.keeps_largest: None")
            differing = [line for line in differing if not line.startswith(of_before)]
        differing = [line for line in differing if not line.startswith("dataset.content")]
        if differing:
            raise DataError(
                f"{self.folder} holds {what} of something else: {'; '.join(differing[:4])}"
                f"{'; and more' if len(differing) > 4 else ''}. Choose another folder, delete this one, or call it "
                "with what it was begun with."
            )

    def _refuse_foreign(self) -> None:
        if (self.folder / files.PLAN).is_file() or not self.folder.exists():
            return
        if not self.folder.is_dir() or any(not path.name.startswith(".") for path in self._entries()):
            raise DataError(f"{self.folder} holds something that is no cache. Give a new or an empty folder.")

    def _entries(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if files.PARTIAL not in path.name)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        try:
            files.write_json(self.folder / name, content)
        except files.DiskFull as error:
            raise DataError(self._full(error)) from error

    def _full(self, error: files.DiskFull) -> str:
        free = size.readable(size.free_bytes(self.folder))
        kept = self._kept() if self.plan else "Nothing is kept yet"
        return (
            f"the disk is full ({error.strerror}; {free} free at {self.folder}). {kept}. Free space and make the same "
            "call again: it goes on from there."
        )

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            (self.settings.say or logger.info)(text)
