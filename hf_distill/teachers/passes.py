"""A pass over a dataset that writes shard after shard: killed at any moment, the same call goes on to the same bytes.

The teacher cache and completions are made so. Files are bare Arrow and JSON, written beside and renamed: nothing is
unpickled, and a file that has its name is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa

from hf_distill.errors import DataError

CARD = "README.md"
STATE, INFO = "state.json", "dataset_info.json"  # what datasets.load_from_disk reads
PARTIAL = ".partial"
RECEIPTS = "shard-*.json"
_DIFFERENCES = 4  # that a message lists

_open: Any = open  # tests put a quota here


class DiskFull(OSError):
    """No space is left for a file, which therefore was not written."""


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.arrow"


def receipt_name(number: int) -> str:
    """Return the name of the file beside a shard that says that it is whole, until all shards are."""
    return f"shard-{number:05d}.json"


@contextmanager
def written_beside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when all of it is on the disk; until then there is none of that name.

    Raises:
        DiskFull: if no space is left.
    """
    beside = path.with_name(f"{path.name}{PARTIAL}-{os.getpid()}")
    try:
        with _open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if beside.exists():  # it failed
            beside.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    with written_beside(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: if it is not there, or is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, "it holds no JSON object")
    return content


def write_arrow(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """Write one record batch as an Arrow stream, uncompressed: the same columns, the same bytes."""
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with written_beside(path) as file, pa.ipc.new_stream(file, batch.schema) as out:
        out.write_batch(batch)


def read_arrow(path: Path) -> pa.RecordBatch:
    """Return the record batch of a file, mapped into memory: nothing is read until it is looked at.

    Raises:
        DataError: if it is not there, is cut off, or is no such file.
    """
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path), "r")) as stream:
            return stream.read_next_batch()
    except (OSError, pa.ArrowInvalid, StopIteration) as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: Any) -> DataError:
    """Return the error for a file that cannot be read."""
    return DataError(
        f"{path} cannot be read ({reason}). Delete {path.parent} and make it again, or copy the folder again."
    )


def checksum(path: Path) -> str:
    """Return the blake2b digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return where two descriptions differ, in words.

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


class ShardFolder:
    """The folder that a pass fills: shards, a receipt for each until all are whole, a plan before and a manifest after.

    Args:
        path: of the folder.
        finished: what it holds in the end, for messages: "a cache".
        unfinished: what it holds until then: "an unfinished cache".
        manifest: the name of the file that says that everything is whole.
        plan: the name of the file that says what was begun.
    """

    def __init__(self, path: Path, *, finished: str, unfinished: str, manifest: str, plan: str) -> None:
        self.path = path
        self._finished, self._unfinished = finished, unfinished
        self._manifest, self._plan = path / manifest, path / plan

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None if the folder is not finished."""
        return read_json(self._manifest) if self._manifest.is_file() else None

    def plan(self) -> dict[str, Any] | None:
        """Return the plan of an unfinished pass, or None if there is none."""
        return read_json(self._plan) if self._plan.is_file() else None

    def check_foreign(self) -> None:
        """Check that a folder without manifest and plan is free.

        Raises:
            DataError: if it holds anything else.
        """
        if self._manifest.is_file() or self._plan.is_file() or not self.path.exists():
            return
        if not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir())):
            what = self._finished.removeprefix("a ")
            raise DataError(f"{self.path} holds something that is no {what}. Give a new or an empty folder.")

    def check_same(
        self, there: Mapping[str, Any], now: Mapping[str, Any], *, finished: bool, ignored: tuple[str, ...] = ()
    ) -> None:
        """Check that the folder was begun with what is asked for now.

        Args:
            there: plan or manifest of the folder.
            now: what is asked for.
            finished: whether `there` is the manifest.
            ignored: beginnings of differences that do not matter.

        Raises:
            DataError: if it was begun with something else.
        """
        found = differences({name: there.get(name) for name in now}, now)
        found = [line for line in found if not line.startswith(ignored)] if ignored else list(found)
        if found:
            raise DataError(
                f"{self.path} holds {self._finished if finished else self._unfinished} of something else: "
                f"{'; '.join(found[:_DIFFERENCES])}{'; and more' if len(found) > _DIFFERENCES else ''}. Choose another "
                "folder, delete this one, or call it with what it was begun with."
            )

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Make the folder, remove what a killed pass left half-written, and write the plan if there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        for beside in self.path.glob(f"*{PARTIAL}-*"):
            beside.unlink()
        if not self._plan.is_file():
            write_json(self._plan, plan)

    def write_shard(self, number: int, columns: Mapping[str, pa.Array], **facts: Any) -> None:
        """Write a shard, and its receipt with these facts.

        Raises:
            DiskFull: if no space is left; the shards so far stay.
        """
        path = self.path / shard_name(number)
        write_arrow(path, columns)
        size = {"bytes": path.stat().st_size, "blake2b": checksum(path)}
        write_json(self.path / receipt_name(number), {"file": path.name, **facts, **size})

    def receipt(self, number: int) -> dict[str, Any] | None:
        """Return the receipt of a shard that is whole, else None."""
        path = self.path / receipt_name(number)
        if not path.is_file():
            return None
        try:
            found = read_json(path)
        except DataError:  # the shard is written again, to the same bytes
            return None
        return found if self.is_whole(found) else None

    def is_whole(self, receipt: Mapping[str, Any]) -> bool:
        """Return whether a shard is what its receipt says."""
        return self._fault(receipt) is None

    def check_whole(self, receipt: Mapping[str, Any]) -> None:
        """Check that a shard is what its receipt says.

        Raises:
            DataError: if it is missing, cut off or changed.
        """
        fault = self._fault(receipt)
        if fault is not None:
            raise damaged(self.path / receipt["file"], fault)

    def _fault(self, receipt: Mapping[str, Any]) -> str | None:
        path = self.path / receipt["file"]
        if not path.is_file():
            return "it is not there"
        whole = path.stat().st_size == receipt["bytes"] and checksum(path) == receipt["blake2b"]
        return None if whole else "it is cut off, or not what was written there"

    def written(self, fact: str) -> int:
        """Return the sum of a fact over the shards that are on the disk."""
        return sum(read_json(path)[fact] for path in sorted(self.path.glob(RECEIPTS)))

    def finish(
        self, manifest: Mapping[str, Any], receipts: Sequence[Mapping[str, Any]], *, fingerprint: str, card: str
    ) -> None:
        """Write what `datasets.load_from_disk` reads, the card and the manifest; then receipts and plan go.

        Raises:
            DiskFull: if no space is left; the shards stay.
        """
        schema = read_arrow(self.path / receipts[0]["file"]).schema
        features = datasets.Features.from_arrow_schema(schema)
        write_json(self.path / INFO, {"features": features.to_dict(), "description": "", "citation": ""})
        state: dict[str, Any] = {"_data_files": [{"filename": one["file"]} for one in receipts]}
        state |= {"_fingerprint": fingerprint, "_split": "train", "_output_all_columns": False}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
        write_json(self.path / STATE, state)
        with written_beside(self.path / CARD) as file:
            file.write(card.encode())
        write_json(self._manifest, manifest)
        self.tidy()

    def tidy(self) -> None:
        """Remove what only an unfinished pass needs."""
        for path in [*self.path.glob(RECEIPTS), *self.path.glob(f"*{PARTIAL}-*"), self._plan]:
            path.unlink(missing_ok=True)


def _is_foreign(path: Path) -> bool:
    return PARTIAL not in path.name and not path.name.startswith(".")


class ResumablePass(ABC):
    """One process's part of a pass. Every process takes every n-th shard.

    A subclass says what is planned, what a shard was made from, how shards are made, and what stands at the end.

    Args:
        folder: to fill.
        state: the processes, as Accelerate finds them.
    """

    def __init__(self, folder: ShardFolder, state: Any) -> None:
        self.folder = folder
        self.state = state
        self.plan: dict[str, Any] = {}

    def run(self) -> bool:
        """Make what is missing, and return whether anything was.

        Raises:
            DataError: if the folder holds something else, the dataset is another one than when the folder was begun,
                or the disk is full (what is finished stays).
        """
        folder, state = self.folder, self.state
        folder.check_foreign()
        manifest = folder.manifest()
        if manifest is not None:
            self.check_finished(manifest)
            if state.is_main_process:
                folder.tidy()  # if it was killed right before
            return False
        begun = folder.plan()
        plan = self.begun_plan(begun) if begun is not None else self.new_plan()
        state.wait_for_everyone()  # nobody has written yet what others look for
        try:
            if state.is_main_process:
                folder.begin(plan)
            state.wait_for_everyone()
            self.plan = folder.plan() or {}  # as a resumed pass reads it
            mine = range(state.process_index, self.plan["shard_count"], state.num_processes)
            done = [number for number in mine if self.is_done(number)]
            self.make([number for number in mine if number not in done], done=done)
            state.wait_for_everyone()
            if state.is_main_process:
                self.finalize([read_json(folder.path / receipt_name(n)) for n in range(self.plan["shard_count"])])
            state.wait_for_everyone()
        except DiskFull as error:
            kept = self.kept() if self.plan else "Nothing is kept yet"
            raise DataError(
                f"the disk is full ({error.strerror}) at {folder.path}. {kept}. Free space and make the same call "
                "again: it goes on from there."
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.kept()}; the same call goes on from there.") from None
        return True

    @abstractmethod
    def check_finished(self, manifest: dict[str, Any]) -> None:
        """Check that a finished folder is what is asked for."""

    @abstractmethod
    def begun_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Check that the plan of an unfinished folder is what is asked for, and return it."""

    @abstractmethod
    def new_plan(self) -> dict[str, Any]:
        """Return everything that the result follows from, and `shard_count`. Nothing is written yet."""

    @abstractmethod
    def is_done(self, shard: int) -> bool:
        """Return whether an earlier pass finished this shard; raise DataError if it did from other examples."""

    @abstractmethod
    def make(self, shards: list[int], *, done: list[int]) -> None:
        """Write these shards. Those in `done` are there already."""

    @abstractmethod
    def finalize(self, receipts: list[dict[str, Any]]) -> None:
        """Write what stands beside the shards, and the manifest, in the main process."""

    @abstractmethod
    def kept(self) -> str:
        """Return how much of the pass is on the disk, in words."""
