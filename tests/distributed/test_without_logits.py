"""`fused_loss=True` equals the plain path in two gloo processes: DDP, FSDP, rows in only one process.

The plain path in two processes against one: `tests/trainer/test_two_processes.py`.
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
    assert found["apart"] < 1e-6, case  # fp64, except the count and a causal head's own loss in fp32
    assert found["without"] == pytest.approx(found["with"], rel=1e-6), case
    assert len(found["with"]) >= 3 and len(set(found["with"])) > 1, case


def test_fused_loss_under_each_wrapper() -> None:
    for case, found in run(*QUICK).items():
        assert_same(found, case)


@pytest.mark.slow
def test_fused_loss_under_further_wrappers() -> None:
    for case, found in run(*(case for case in CASES if case not in QUICK)).items():
        assert_same(found, case)
        assert "twenty" not in case or len(found["with"]) == 20
