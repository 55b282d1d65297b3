"""Stages on two gloo processes are those of one, with a stage that leaves the head without use."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from tests.stages.tiny_stages import student
from tests.stages.two_processes import CASES, both
from tests.trainer.tiny import assert_same_bits, update_difference, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder that two processes filled."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(folder)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):  # torchrun's launcher would import torch once more
        env = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(program, env=env, stdout=pipe, stderr=pipe, text=True))
    printed = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:] + errors[-6000:]
        printed.append(out)
    # Process 0 alone prints, once a call.
    assert [out.count("student: ") for out in printed] == [len(CASES) + 1, 0]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(two, tmp_path, name: str) -> None:
    found, expected = torch.load(two / "found.pt"), both(tmp_path, name, examples_a_process=4)
    assert found["processes"] == 2
    assert update_difference(found[name]["weights"], expected["weights"], weights(student().double())) < 1e-6
    assert [len(stage) for stage in expected["losses"]] == [3, 3]
    for ours, theirs in zip(found[name]["losses"], expected["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)  # logged to so many digits
    saved = BertForSequenceClassification.from_pretrained(two / name / "out")
    assert_same_bits(weights(saved), found[name]["weights"])
