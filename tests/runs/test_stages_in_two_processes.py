"""Stages in two gloo processes equal those in one, also if a stage does not use the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from tests.distributed.launch import two_processes
from tests.runs.stages_two_processes import CASES, both
from tests.runs.tiny_stages import student
from tests.trainer.tiny import assert_same_bits, update_difference, weights


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder that two processes filled."""
    folder = tmp_path_factory.mktemp("two")
    printed = two_processes(Path(__file__).with_name("stages_two_processes.py"), str(folder))
    # Only process 0 prints, once for each call.
    assert [out.count("student: ") for out in printed] == [len(CASES) + 1, 0]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_same_student_as_one_process(two, tmp_path, name: str) -> None:
    found, expected = torch.load(two / "found.pt"), both(tmp_path, name, examples_a_process=4)
    assert found["processes"] == 2
    assert update_difference(found[name]["weights"], expected["weights"], weights(student().double())) < 1e-6
    assert [len(stage) for stage in expected["losses"]] == [3, 3]
    for ours, theirs in zip(found[name]["losses"], expected["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # logged to so many digits
    saved = BertForSequenceClassification.from_pretrained(two / name / "out")
    assert_same_bits(weights(saved), found[name]["weights"])
