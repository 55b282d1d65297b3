"""Interrupted passes resume to the same bytes; several processes build the same bytes; a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hf_distill import DataError
from hf_distill.teachers import CachedTeacher, TeacherCache, shards
from hf_distill.teachers.cache.measure import shard_size
from tests.distributed.launch import alone, two_processes
from tests.heads import HEADS
from tests.teachers.cache.built import build, contents, made

NAME = "bert_tokens"


def check_kills(folder: Path, random_kills: int, *words: str) -> dict[str, Any]:
    printed = alone(Path(__file__).with_name("killed.py"), str(folder), str(random_kills), *words)
    found = json.loads(printed.splitlines()[-1])
    assert found["wrong"] == []
    # A plan; four shards with receipts; index, two dataset files, card, manifest; receipts and plan are removed.
    assert found["changes"] >= 1 + 8 + 5 + 5
    assert found["killed"] >= found["changes"]  # random kills may come after the end
    return found


def test_killed_passes_and_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    """Killed before or after every rename and removal, and twice at a random time."""
    found = check_kills(tmp_path, 2)
    shards = [f"shard-{n:05d}.arrow" for n in range(4)]
    assert found["files"] == ["README.md", "dataset_info.json", "index.arrow", "manifest.json", *shards, "state.json"]


@pytest.mark.slow
def test_passes_killed_at_random_times_give_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, 10)


@pytest.mark.slow
def test_killed_passes_give_the_same_draws(tmp_path: Path) -> None:
    check_kills(tmp_path, 2, "drawn")


class Quota:
    """A fake disk with a limited number of free bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Path, mode: str) -> Any:
        file, quota = open(path, mode), self  # noqa: SIM115  # closed by whom it is given to

        class Limited:
            def write(self, data: Any) -> int:
                quota.room -= memoryview(data).nbytes
                if quota.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return file.write(data)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Limited()


def test_a_full_disk_keeps_finished_shards_and_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS[NAME]
    teacher, examples = head.make(2), head.examples(20)
    build(tmp_path / "whole", head, teacher, examples)
    asked: list[Any] = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    folder = tmp_path / "full"
    for room, finished in ((5500, "12 of 20"), (1700, "18 of 20")):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "_open", Quota(room).open)
            with pytest.raises(DataError, match=rf"the disk is full .*{finished} examples are kept in .*Free"):
                build(folder, head, teacher, examples)
        assert not [name for name in contents(folder) if ".partial" in name]
        with pytest.raises(DataError, match=rf"unfinished cache: {finished} examples .*it continues from there"):
            TeacherCache(folder)
    asked.clear()
    build(folder, head, teacher, examples)
    assert len(asked) == 1 + 1  # the plan's trial on the first batch, and the two examples of the last shard
    assert contents(folder) == contents(tmp_path / "whole")


class Stopped:
    """A teacher hook that raises KeyboardInterrupt at its n-th call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_finished_predictions_and_reports_them(tmp_path: Path) -> None:
    """By default a shard has 256 examples, however small they are."""
    head = HEADS["bert_single_label"]
    teacher, examples = head.make(2), head.examples(600)
    settings = {"batch_size": 32, "shard_examples": None, "store": None}
    build(tmp_path / "whole", head, teacher, examples, **settings)
    assert len(list((tmp_path / "whole").glob("shard-*.arrow"))) == 3
    folder = tmp_path / "part"
    looks = 1 + 1  # the plan's trial on the first batch, and on its most padded example alone
    handle = teacher.register_forward_hook(Stopped(at=looks + 600 // 32))
    with pytest.raises(KeyboardInterrupt) as stopped:
        build(folder, head, teacher, examples, **settings)
    assert str(stopped.value) == f"512 of 600 examples are kept in {folder}; the same call continues from there."
    handle.remove()
    with pytest.raises(DataError, match="unfinished cache: 512 of 600 examples are there"):
        TeacherCache(folder)
    asked: list[Any] = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    build(folder, head, teacher, examples, **settings)
    assert len(asked) == 1 + 3  # the plan's trial, and the last 88 examples
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("asked", "bytes_an_example", "count", "batch_size", "expected"),
    [
        (None, 200, 10_003, 32, 256),
        (None, 200, 10_003, 48, 240),
        (None, 200, 10_003, 1024, 1024),
        (None, 200, 40, 32, 32),
        (None, 200, 3_000_000, 32, 2976),
        (None, 1_000_000, 3_000_000, 32, 64),
        (1000, 200, 10_003, 32, 992),
    ],
)
def test_examples_in_a_shard(
    asked: int | None, bytes_an_example: float, count: int, batch_size: int, expected: int
) -> None:
    """256 or a thousandth of all, at most 64 MB, in whole batches."""
    assert shard_size(asked, bytes_an_example, count, batch_size) == expected


def test_a_built_cache_is_not_built_again(tmp_path: Path) -> None:
    head, teacher, examples, _ = made(tmp_path, NAME)
    before, asked = contents(tmp_path), []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    messages: list[str] = []
    build(tmp_path, head, teacher, examples, announce=messages.append)
    assert contents(tmp_path) == before and len(asked) == 1 and messages == [f"{tmp_path} is built already."]


def test_a_built_cache_names_the_example_that_changed(tmp_path: Path) -> None:
    head, teacher, examples, _ = made(tmp_path, NAME)
    before = contents(tmp_path)
    changed = [*examples[:9], {**examples[9], "input_ids": examples[9]["input_ids"][::-1]}, *examples[10:]]
    for other, where in ((changed, "9"), ([examples[0], *examples[:0:-1]], "1 to 5")):
        message = rf"other examples, or from these in another order: the dataset differs at index {where}\. To train"
        with pytest.raises(DataError, match=message):
            build(tmp_path, head, teacher, other)
    assert contents(tmp_path) == before


def test_a_damaged_shard_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS[NAME]
    teacher, examples = head.make(2), head.examples(20)
    whole = build(tmp_path / "whole", head, teacher, examples)
    folder = unfinished(tmp_path / "part", monkeypatch, teacher, examples)
    path = folder / "shard-00000.arrow"
    path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8)
    build(folder, head, teacher, examples)
    assert contents(folder) == contents(whole.path)


def unfinished(folder: Path, monkeypatch: pytest.MonkeyPatch, teacher: Any, examples: list) -> Path:
    """Return a pass that ended after two of four shards."""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_open", Quota(5500).open)
        with pytest.raises(DataError, match="the disk is full"):
            build(folder, HEADS[NAME], teacher, examples)
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("teacher", "holds an unfinished cache of something else: teacher.weights: "),
        ("batch_size", "something else: padding.batch_size: 3 there, 2 now"),
        ("count", "something else: examples: 20 there, 19 now"),
        ("content", r"made from other examples, .*: the dataset differs at index 7\. Give the dataset"),
        ("store", "something else: store.dtype: float32 there, float16 now"),
    ],
)
def test_a_pass_resumes_only_with_the_same_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    head = HEADS[NAME]
    teacher, examples = head.make(2), head.examples(20)
    folder = unfinished(tmp_path / "part", monkeypatch, teacher, examples)
    before = contents(folder)
    other = [*examples[:7], {**examples[7], "input_ids": examples[7]["input_ids"][::-1]}, *examples[8:]]
    changed: dict[str, Any] = {
        "teacher": {"teacher": head.make(3)},
        "batch_size": {"batch_size": 2},
        "count": {"examples": examples[:19]},
        "content": {"examples": other},
        "store": {"store": None},
    }[what]
    with pytest.raises(DataError, match=message):
        build(folder, head, changed.pop("teacher", teacher), changed.pop("examples", examples), **changed)
    assert contents(folder) == before
    assert isinstance(CachedTeacher(build(folder, head, teacher, examples)), CachedTeacher)


@pytest.mark.parametrize(
    ("rank", "when", "own", "other"),
    [
        (0, "disk", r"DataError: the disk is full .*", r"DataError: process 0 of 2 failed: the disk is full .*"),
        (1, "shard", "RuntimeError: out of memory", "HfDistillError: process 1 of 2 failed: RuntimeError: out of m.*"),
        (0, "end", "RuntimeError: out of memory", "HfDistillError: process 0 of 2 failed: RuntimeError: out of m.*"),
        (0, "begin", "RuntimeError: out of memory", "HfDistillError: process 0 of 2 failed: RuntimeError: out of m.*"),
        (1, "plan", "RuntimeError: out of memory", "HfDistillError: process 1 of 2 failed: RuntimeError: out of m.*"),
    ],
)
def test_a_failing_process_stops_the_others(tmp_path: Path, rank: int, when: str, own: str, other: str) -> None:
    """No process waits for ever, and the same call continues to the same bytes."""
    program = Path(__file__).with_name("failing.py")
    printed = two_processes(program, str(tmp_path / "both"), str(rank), when)
    found = [json.loads(lines.splitlines()[-1]) for lines in printed]
    assert [one["examples"] for one in found] == [20, 20]
    assert re.fullmatch(own, found[rank]["message"]) and re.fullmatch(other, found[1 - rank]["message"])
    build(tmp_path / "whole", HEADS[NAME], HEADS[NAME].make(2), HEADS[NAME].examples(20))
    assert contents(tmp_path / "both") == contents(tmp_path / "whole")
