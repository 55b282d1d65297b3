"""A pass of a teacher over a dataset, in shards, that can be killed at any moment. Caches and completions use it."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, TypeAlias

import pyarrow as pa
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_distill.errors import DataError
from hf_distill.teachers import shards
from hf_distill.teachers.shards import Json

Advance: TypeAlias = Callable[[int, int], None]
_SHOWN = 4  # differing settings that a message lists


class PassProgress:
    """A progress bar that counts the finished examples of this process, and the speed.

    Args:
        total: examples of this process.
        finished: how many of them an earlier run finished.
        unit: the unit of the speed, in the plural.
        shown: whether to show a bar, on stderr.
        process: this process and the number of processes.
    """

    def __init__(self, *, total: int, finished: int, unit: str, shown: bool, process: tuple[int, int] = (0, 1)) -> None:
        part = "" if process[1] == 1 else f" of process {process[0] + 1} of {process[1]}"
        self._progress = Progress(
            TextColumn(f"examples{part}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._progress.add_task("", total=total, completed=finished, speed="")
        self._units = 0
        self._unit = unit

    def __enter__(self) -> PassProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, examples: int, units: int) -> None:
        """Count a finished batch.

        Args:
            examples: how many examples it has.
            units: how many units it has, such as tokens.
        """
        self._units += units
        elapsed = self._progress.tasks[0].elapsed or 0.0
        speed = f"{self._units / elapsed:,.0f} {self._unit}/s" if elapsed > 0 else ""
        self._progress.update(self._task, advance=examples, speed=speed)


class ShardedPass(ABC):
    """Fills a folder with shards. The bytes depend neither on interruptions nor on the number of processes.

    A shard is `plan["shard_examples"]` consecutive examples. A finished shard has a receipt beside it until the whole
    pass is finished; then a manifest takes the place of plan and receipts.

    Args:
        folder: the folder to fill.
        state: the state of the processes.
        progress: whether the main process shows a progress bar.

    Attributes:
        noun: a name for the contents of a finished folder, for messages.
        unfinished: a name for the contents of an unfinished folder.
        manifest_name: the file that marks the pass as finished.
        plan_name: the file that marks it as begun.
        kept: a message on how much is on the disk, with `{kept}` and `{total}`.
        other_examples: advice if a finished folder was made from other examples.
        unit: the unit of the speed.
        agreed: the plan that all processes follow.
    """

    noun: ClassVar[str]
    unfinished: ClassVar[str]
    manifest_name: ClassVar[str]
    plan_name: ClassVar[str]
    kept: ClassVar[str] = "{kept:,} of {total:,} examples are kept"
    other_examples: ClassVar[str] = "Choose another folder, or delete this one."
    unit: str = "examples"

    def __init__(self, folder: Path, state: PartialState | Accelerator, *, progress: bool = True) -> None:
        self.folder = folder
        self.state = state
        self.progress = progress
        self.agreed: Json = {}
        self._finished: set[int] = set()  # the shards of this process that an earlier run finished

    # The work of a subclass.

    @abstractmethod
    def plan(self) -> Json:
        """Return everything that the result depends on, as plain data; compared when a pass is resumed."""

    def complete_plan(self, plan: Json) -> Json:
        """Return the plan with "examples", "shard_examples" and "shard_count", when a pass begins."""
        return plan

    def check_dataset(self, finished: bool) -> None:  # noqa: B027  # the default checks nothing
        """Check the examples of this process before anything is written.

        Args:
            finished: whether an earlier run finished the whole pass.
        """

    @abstractmethod
    def has_same_examples(self, shard: int, receipt: Json) -> bool:
        """Return whether the dataset still has the examples of a finished shard."""

    @abstractmethod
    def write_shards(self, numbers: list[int], advance: Advance) -> None:
        """Make these shards and call `write_shard` for each.

        Args:
            numbers: the shards that are not finished.
            advance: is to be called after each batch, with its examples and units.
        """

    @abstractmethod
    def finalize(self, receipts: list[Json]) -> Json:
        """Write the remaining files and return the manifest."""

    # The pass.

    def run(self) -> bool:
        """Make the missing shards, and return whether any was missing.

        Raises:
            DataError: if the folder holds something else, the dataset has changed, or the disk is full.
        """
        plan: Json = json.loads(json.dumps(self.plan()))  # comparable with one that was read from a file
        found = self._find(plan)
        finished = found is not None and "shards" in found
        self.agreed = found or self.complete_plan(plan)
        self.check_dataset(finished)
        self._check_finished_shards(finished)
        self.state.wait_for_everyone()  # no process writes before every process has looked
        if finished:
            if self.state.is_main_process:
                self._tidy()  # an earlier run may have been killed just before this
        else:
            self._run_unfinished()
        self.state.wait_for_everyone()
        return not finished

    def _run_unfinished(self) -> None:
        try:
            if self.state.is_main_process:
                self._begin()
            self.state.wait_for_everyone()
            self.agreed = shards.read_json(self.folder / self.plan_name)  # as the main process wrote it
            self._run_shards()
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                names = map(shards.receipt_name, range(self.agreed["shard_count"]))
                manifest = self.finalize([shards.read_json(self.folder / name) for name in names])
                shards.write_json(self.folder / self.manifest_name, manifest)
                self._tidy()
        except shards.DiskFull as error:
            free = readable_bytes(free_bytes(self.folder))
            raise DataError(
                f"the disk is full ({error.strerror}; {free} free at {self.folder}). {self._kept()}. Free space and "
                "make the same call again: it continues from there."
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self._kept()}; the same call continues from there.") from None

    def _run_shards(self) -> None:
        mine = self._mine()
        todo = [shard for shard in mine if shard not in self._finished]
        total = sum(len(self.indices(shard)) for shard in mine)
        missing = sum(len(self.indices(shard)) for shard in todo)
        shown = self.progress and self.state.is_main_process and bool(todo)
        process = (self.state.process_index, self.state.num_processes)
        with PassProgress(total=total, finished=total - missing, unit=self.unit, shown=shown, process=process) as bar:
            self.write_shards(todo, bar.advance)

    def indices(self, shard: int) -> range:
        """Return the examples of a shard."""
        size = self.agreed["shard_examples"]
        return range(shard * size, min((shard + 1) * size, self.agreed["examples"]))

    def _mine(self) -> range:
        return range(self.state.process_index, self.agreed["shard_count"], self.state.num_processes)

    def my_indices(self) -> list[range]:
        """Return the examples of each shard of this process."""
        return [self.indices(shard) for shard in self._mine()]

    def write_shard(self, shard: int, columns: Mapping[str, pa.Array], **facts: object) -> None:
        """Write a shard and its receipt.

        Args:
            shard: its number.
            columns: name → Arrow column.
            **facts: further entries of the receipt.
        """
        path = self.folder / shards.shard_name(shard)
        shards.write_arrow(path, columns)
        receipt = {**shards.file_entry(path), "examples": len(self.indices(shard)), **facts}
        shards.write_json(self.folder / shards.receipt_name(shard), receipt)

    # The folder.

    def _find(self, plan: Json) -> Json | None:
        """Return the manifest of a finished pass, the plan of an unfinished pass, or None if the folder is new."""
        for name, noun in ((self.manifest_name, self.noun), (self.plan_name, self.unfinished)):
            if (self.folder / name).is_file():
                found = shards.read_json(self.folder / name)
                self._check_same_plan(found, plan, noun)
                return found
        if self.folder.exists() and (not self.folder.is_dir() or any(map(_is_foreign, self.folder.iterdir()))):
            raise DataError(f"{self.folder} holds other files than {self.noun}. Give a new or an empty folder.")
        return None

    def _check_same_plan(self, found: Json, plan: Json, noun: str) -> None:
        differing = differences({name: found.get(name) for name in plan}, plan)
        if "shards" in found:  # the library versions of a finished pass do not matter
            differing = [line for line in differing if not line.startswith("versions")]
        if differing:
            shown = "; ".join(differing[:_SHOWN]) + ("; and more" if len(differing) > _SHOWN else "")
            raise DataError(f"{self.folder} holds {noun} of something else: {shown}. Choose another, or delete it.")

    def _check_finished_shards(self, finished: bool) -> None:
        """Check that the finished shards are whole and the dataset has not changed; all processes raise together."""
        entries = self.agreed.get("shards", [])
        if finished:  # every process checks every file, so that all raise together
            for name in (shards.INFO, shards.STATE):
                shards.read_json(self.folder / name)
            shards.check_files(self.folder, entries)
        changed = []
        for shard in self._mine():
            receipt = entries[shard] if finished else shards.finished_receipt(self.folder, shard)
            if receipt is None:
                continue
            self._finished.add(shard)
            if not self.has_same_examples(shard, receipt):
                changed.append(shard)
                break
        if self.state.num_processes > 1:
            changed = gather_object(changed)
        if changed:
            indices = self.indices(min(changed))
            begun = "Give the dataset of the first call, or choose another folder."
            advice = self.other_examples if finished else begun
            raise DataError(
                f"examples {indices[0]} to {indices[-1]} of the dataset are not those that {self.folder} holds, or are "
                f"in another order. {advice}"
            )

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob(f"*{shards.PARTIAL}-*"):  # of a killed run
            partial.unlink()
        if not (self.folder / self.plan_name).is_file():
            shards.write_json(self.folder / self.plan_name, self.agreed)

    def _tidy(self) -> None:
        """Remove the files of an unfinished pass."""
        patterns = (shards.RECEIPTS, f"*{shards.PARTIAL}-*", self.plan_name)
        for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
            path.unlink()

    def _kept(self) -> str:
        kept = kept_examples(self.folder)
        return f"{self.kept.format(kept=kept, total=self.agreed['examples'])} in {self.folder}"


def kept_examples(folder: Path) -> int:
    """Return how many examples an unfinished pass has on the disk."""
    count = 0
    for path in folder.glob(shards.RECEIPTS):
        try:
            count += shards.read_json(path)["examples"]
        except DataError:  # the shard will be made again
            continue
    return count


def _is_foreign(path: Path) -> bool:
    return shards.PARTIAL not in path.name and not path.name.startswith(".")


def differences(before: object, now: object, prefix: str = "") -> list[str]:
    """Return the differences of two descriptions, in words.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2 there, 3 now']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for name in sorted({*before, *now})
            for line in differences(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if before == now else [f"{prefix}: {before} there, {now} now"]


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def readable_bytes(count: float) -> str:
    """Return a size with its unit.

    >>> readable_bytes(1_530_000_000), readable_bytes(12)
    ('1.5 GB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
