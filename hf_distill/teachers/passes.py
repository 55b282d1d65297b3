"""A pass of a teacher over a dataset, in shards, that can be killed at any moment. Caches and completions use it."""

from __future__ import annotations

import contextlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_distill.errors import DataError, HfDistillError
from hf_distill.teachers import shards
from hf_distill.teachers.shards import Json

T = TypeVar("T")
Advance = Callable[[int, int], None]
_SHOWN = 4  # differences that a message lists


class PassProgress(Progress):
    """A progress bar that counts the finished examples of this process, and the speed.

    Args:
        total: examples of this process.
        finished: how many of them an earlier run finished.
        unit: the plural that the speed counts, such as "tokens".
        processes: how many processes share the pass.
        shown: whether to show a bar, on stderr.
    """

    def __init__(self, *, total: int, finished: int, unit: str, processes: int, shown: bool) -> None:
        super().__init__(
            TextColumn("examples" if processes == 1 else f"examples of process 1 of {processes}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self.add_task("", total=total, completed=finished, speed="")
        self._unit = unit
        self._units = 0

    def add_batch(self, examples: int, units: int) -> None:
        """Count a finished batch."""
        self._units += units
        elapsed = self.tasks[0].elapsed or 0.0
        speed = f"{self._units / elapsed:,.0f} {self._unit}/s" if elapsed > 0 else ""
        self.update(self._task, advance=examples, speed=speed)


class ShardedPass(ABC):
    """Fills a folder with shards. The bytes depend neither on interruptions nor on the number of processes.

    A shard is `plan["shard_examples"]` consecutive examples. A finished shard has a receipt beside it until the whole
    pass is finished; then a manifest takes the place of plan and receipts. Processes wait for each other after each
    shard: if one fails, all raise.

    Args:
        folder: the folder to fill.
        state: the state of the processes.
        progress: whether the main process shows a progress bar.

    Attributes:
        noun: what a finished folder holds, for messages.
        unfinished: what an unfinished folder holds.
        manifest_name: the file that marks the pass as finished.
        plan_name: the file that marks it as begun.
        kept: says how much is on the disk, with `{kept}` and `{total}`.
        other_examples: what to do if a finished folder was made from other examples.
        unit: the plural that the speed counts.
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
        self._others_wait = True  # for this process, at their next `gather`

    # The work of a subclass.

    @abstractmethod
    def plan(self) -> Json:
        """Return everything that determines the result, as plain data; compared when a pass is resumed."""

    def complete_plan(self, plan: Json) -> Json:
        """Return the plan with "examples", "shard_examples" and "shard_count", when a pass begins."""
        return plan

    def check_dataset(self, finished: bool) -> None:  # noqa: B027  # the default checks nothing
        """Check the examples of this process before anything is written.

        Args:
            finished: whether an earlier run finished the whole pass.
        """

    @abstractmethod
    def changed_examples(self, shard: int, receipt: Json) -> Sequence[int]:
        """Return the examples that may differ from those that a finished shard was made from; empty if none does."""

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
            HfDistillError: if another process failed.
        """
        with contextlib.ExitStack() as stack:
            stack.push(self._share_failure)
            plan: Json = json.loads(json.dumps(self.plan()))  # as it is read from a file
            found = self._find(plan)
            finished = found is not None and "shards" in found
            self.agreed = found or self.complete_plan(plan)
            self.check_dataset(finished)
            self._check_finished_shards(finished)
            self.gather([])  # until every process has looked, none writes
            if not finished:
                self._run_unfinished()
            elif self.state.is_main_process:
                self._tidy()  # an earlier run may have been killed right before
            self.gather([])
            return not finished

    def _run_unfinished(self) -> None:
        try:
            if self.state.is_main_process:
                self._begin()
            self.gather([])
            self.agreed = shards.read_json(self.folder / self.plan_name)  # the main process's, as a resumed pass does
            self._run_shards()
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
        total, missing = (sum(len(self.indices(shard)) for shard in some) for some in (mine, todo))
        with PassProgress(
            total=total,
            finished=total - missing,
            unit=self.unit,
            processes=self.state.num_processes,
            shown=self.progress and self.state.is_main_process and bool(todo),
        ) as bar:
            self.write_shards(todo, bar.add_batch)
        while not all(self.gather([True])):  # others write more shards
            pass

    def gather(self, found: list[T]) -> list[T]:
        """Return the items of all processes. Every process must call it equally often.

        Args:
            found: the items of this process.

        Raises:
            HfDistillError: if another process failed.
            KeyboardInterrupt: if another process was interrupted.
        """
        if self.state.num_processes == 1:
            return found
        self._others_wait = False  # if this fails, there is nobody to tell
        gathered: list[tuple[BaseException | None, list[T]]] = gather_object([(None, found)])
        for failure, _ in gathered:
            if failure is not None:
                raise failure
        self._others_wait = True
        return [item for _, items in gathered for item in items]

    def _share_failure(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Let the other processes, which wait for this one, raise its error."""
        if error is None or not self._others_wait or self.state.num_processes == 1:
            return
        where = f"process {self.state.process_index} of {self.state.num_processes} failed"
        match error:
            case KeyboardInterrupt():
                shared: BaseException = KeyboardInterrupt()
            case HfDistillError():
                shared = type(error)(f"{where}: {error}")
            case _:
                shared = HfDistillError(f"{where}: {type(error).__name__}: {error}")
        gather_object([(shared, [])])

    def indices(self, shard: int) -> range:
        """Return the examples of a shard."""
        size = self.agreed["shard_examples"]
        return range(shard * size, min((shard + 1) * size, self.agreed["examples"]))

    def _mine(self) -> range:
        return range(self.state.process_index, self.agreed["shard_count"], self.state.num_processes)

    def my_indices(self) -> list[range]:
        """Return the examples of each shard of this process."""
        return [self.indices(shard) for shard in self._mine()]

    def write_shard(self, shard: int, columns: Mapping[str, pa.Array], **facts: Any) -> None:
        """Write a shard and its receipt, and wait for the other processes.

        Args:
            shard: its number.
            columns: name → Arrow column.
            **facts: further entries of the receipt.
        """
        path = self.folder / shards.shard_name(shard)
        shards.write_arrow(path, columns)
        receipt = {**shards.file_entry(path), "examples": len(self.indices(shard)), **facts}
        shards.write_json(self.folder / shards.receipt_name(shard), receipt)
        self.gather([False])

    # The folder.

    def _find(self, plan: Json) -> Json | None:
        """Return the manifest of a finished pass, the plan of an unfinished pass, or None if the folder is new."""
        for name, what in ((self.manifest_name, self.noun), (self.plan_name, self.unfinished)):
            if not (self.folder / name).is_file():
                continue
            found = shards.read_json(self.folder / name)
            differing = differences({name: found.get(name) for name in plan}, plan)
            if "shards" in found:  # then the versions of the libraries that made it do not matter
                differing = [line for line in differing if not line.startswith("versions")]
            if differing:
                more = "; and more" if len(differing) > _SHOWN else ""
                raise DataError(
                    f"{self.folder} holds {what} of something else: {'; '.join(differing[:_SHOWN])}{more}. Choose "
                    "another folder, delete this one, or repeat the call that it was begun with."
                )
            return found
        if self.folder.exists() and (not self.folder.is_dir() or any(map(_is_foreign, self.folder.iterdir()))):
            raise DataError(f"{self.folder} holds other files than {self.noun}. Give a new or an empty folder.")
        return None

    def _check_finished_shards(self, finished: bool) -> None:
        """Check that the finished shards are whole and the dataset has not changed; all processes raise together."""
        entries = self.agreed.get("shards", [])
        if finished:  # every process checks every file, so that all raise together
            for name in (shards.INFO, shards.STATE):
                shards.read_json(self.folder / name)
            shards.check_files(self.folder, entries)
        changed: list[int] = []
        for shard in self._mine():
            receipt = entries[shard] if finished else shards.finished_receipt(self.folder, shard)
            if receipt is None:
                continue
            self._finished.add(shard)
            changed = list(self.changed_examples(shard, receipt))
            if changed:
                break
        changed = sorted(self.gather(changed))
        if changed:
            begun = "Give the dataset that it was begun with, or choose another folder."
            raise DataError(
                f"{self.folder} was made from other examples, or from these in another order: the dataset differs at "
                f"index {_as_ranges(changed)}. {self.other_examples if finished else begun}"
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


def _as_ranges(indices: Iterable[int]) -> str:
    """Return ascending numbers in words, such as "3, 5 to 8"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in ranges[:_SHOWN]]
    return ", ".join(words) + (" and more" if len(ranges) > _SHOWN else "")


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
