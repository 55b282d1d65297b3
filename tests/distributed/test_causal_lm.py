"""Two gloo processes give the results of one: completions, OnPolicy, UniversalLogitMatch.

Tests in one process: `tests/teachers/test_completions.py`, `tests/augment/test_on_policy.py` and
`tests/objectives/test_universal_logit.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.causal_lm_program import (
    ACCUMULATION,
    POLICIES,
    STEPS,
    WRITTEN,
    completions,
    on_policy,
    universal,
)
from tests.distributed.launch import two_processes
from tests.trainer.tiny import assert_moved, assert_same_bits, update_difference


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of the two processes, which run once."""
    made = tmp_path_factory.mktemp("causal-lm-in-two")
    two_processes(Path(__file__).with_name("causal_lm_program.py"), str(made))
    return made


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    """Return the results of each process."""
    found = [torch.load(folder / f"process-{rank}.pt") for rank in (0, 1)]
    assert [one["processes"] for one in found] == [2, 2]
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("case", WRITTEN)
def test_completions_equal_those_of_one_process(two, folder: Path, tmp_path: Path, case: str) -> None:
    """To the byte; each process writes its own shards once, and receives all of them."""
    expected = completions(tmp_path, case)
    assert contents(folder / case) == contents(tmp_path / case)
    first, second = (one["written"][case] for one in two)
    assert first["rows"] == second["rows"] == expected["rows"]
    assert len({len(row["input_ids"]) for row in expected["rows"]}) > 1
    count, size, settings = WRITTEN[case]
    each = settings.get("num_return_sequences", 1)
    assert [row["index"] for row in first["rows"]] == [index for index in range(count) for _ in range(each)]
    shards = list(range(-(-count // size)))
    for found, own in ((first, shards[::2]), (second, shards[1::2]), (expected, shards)):
        # A second run writes nothing; after a kill at shard 3, earlier shards are not written again.
        done = [shard for shard in own if case != "interrupted" or shard < 3]
        assert found["calls"] == [done, [shard for shard in own if shard not in done]]


def test_processes_agree_on_which_batches_are_continued(two) -> None:
    for case, (student_share, _, _) in POLICIES.items():
        ours, theirs = (one["policies"][case]["shown"] for one in two)
        decided = [(one["step"], one["micro_batch"], one["continued"]) for one in ours]
        assert decided == [(one["step"], one["micro_batch"], one["continued"]) for one in theirs]
        assert [one[:2] for one in decided] == [(step, place) for step in range(STEPS) for place in range(ACCUMULATION)]
        assert {one[2] for one in decided} == {0.0: {False}, 0.5: {False, True}, 1.0: {True}}[student_share]
        assert ({one["process"] for one in ours}, {one["process"] for one in theirs}) == ({0}, {1})


def test_processes_draw_different_texts(two) -> None:
    """For the same prompt and the same student."""
    ours, theirs = ([one["texts"] for one in found["policies"]["always, sampled"]["shown"]] for found in two)
    assert len(ours) == STEPS * ACCUMULATION and ours != theirs


@pytest.mark.parametrize("case", POLICIES)
def test_students_stay_equal_across_processes_with_on_policy_batches(two, case: str) -> None:
    first, second = (found["policies"][case] for found in two)
    assert_same_bits(second["weights"], first["weights"])
    assert_moved(first["weights"], first["start"])


@pytest.mark.parametrize("case", [case for case in POLICIES if "sampled" not in case])
def test_on_policy_batches_of_two_processes_equal_those_of_one(two, tmp_path: Path, case: str) -> None:
    """Without sampling. The denominator counts both processes' texts, which have unequal lengths."""
    expected = on_policy(tmp_path, case, examples_a_process=4)
    ours, theirs = (found["policies"][case] for found in two)
    shares = []
    for mine, other, both in zip(ours["shown"], theirs["shown"], expected["shown"], strict=True):
        assert mine["texts"] + other["texts"] == both["texts"]
        shares.append([sum(map(len, one["texts"])) for one in (mine, other)])
    assert any(mine != other for mine, other in shares)
    assert_as_one(ours, expected)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_universal_logit_match_in_two_processes_equals_one(two, tmp_path: Path, alpha: float | None) -> None:
    """The processes have different numbers of pairs."""
    expected = universal(tmp_path, alpha, examples_a_process=4)
    first, second = (found["universal"][alpha] for found in two)
    assert_same_bits(second["weights"], first["weights"])
    assert_as_one(first, expected)
    assert "loss/universal_logit" in first["logged"][0]


def assert_as_one(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert update_difference(found["weights"], expected["weights"], expected["start"]) < 1e-6
    assert len(found["logged"]) == len(expected["logged"]) > 0
    for ours, theirs in zip(found["logged"], expected["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_student_sharded_at_load_time_generates_the_same_texts(two) -> None:
    """FSDP2 by transformers, whose `generate` keeps the processes in step after one has finished."""
    lengths = [[len(text) for one in found["whole"]["shown"] for text in one["texts"]] for found in two]
    assert sum(mine != other for mine, other in zip(*lengths, strict=True)) > 1
    for found in two:
        assert found["sharded"]["shown"] == found["whole"]["shown"]
        assert_as_one(found["sharded"], found["whole"])


def test_a_teacher_split_across_processes_raises_in_completions(two, folder: Path) -> None:
    assert all("weights are sharded" in found["refused"] for found in two)
    assert not (folder / "refused").exists()
