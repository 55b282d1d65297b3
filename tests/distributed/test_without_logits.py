"""`fused_loss=True` is the plain path in two gloo processes too: DDP, FSDP, rows that one process has alone.

That the plain path in two processes is that of one: `tests/trainer/test_two_processes.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.launch import FOLDER, two_processes
from tests.distributed.without_logits_program import CASES, QUICK

SHARDED = "every parameter sharded"
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": SHARDED}


def run(*cases: str) -> dict[str, Any]:
    first, _ = two_processes(FOLDER / "without_logits_program.py", *cases)
    (found,) = [line.removeprefix("FOUND ") for line in first.splitlines() if line.startswith("FOUND ")]
    return json.loads(found)


def assert_same(found: dict[str, Any], case: str) -> None:
    student, teacher = found["wrapped"]
    assert student == WRAPPED[case.split(",")[0]], case
    assert (teacher == SHARDED) == ("teacher too" in case), case
    assert found["apart"] < 1e-6, case  # fp64, but for the count and a causal head's own loss, which are fp32
    assert found["without"] == pytest.approx(found["with"], rel=1e-6), case
    assert len(found["with"]) >= 3 and len(set(found["with"])) > 1, case


def test_wrapped_in_each_way() -> None:
    for case, found in run(*QUICK).items():
        assert_same(found, case)


@pytest.mark.slow
def test_wrapped_in_more_ways() -> None:
    for case, found in run(*(case for case in CASES if case not in QUICK)).items():
        assert_same(found, case)
        assert "twenty" not in case or len(found["with"]) == 20
