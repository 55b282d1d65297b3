"""L4 over processes: with any of several kinds of teacher, two gloo processes make the three steps that one makes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.making_teachers import Place
from tests.laws.teacher_rows import TEACHER_ROWS
from tests.laws.teacher_runs import OVER_PROCESSES, three_steps
from tests.trainer.tiny import assert_same_bits, update_difference

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Any]:
    """The students of each of two processes."""
    folder = tmp_path_factory.mktemp("two") / "teachers"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, str(Path(__file__).with_name("teacher_runs.py")), str(folder)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        env = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(program, env=env, stdout=pipe, stderr=pipe, text=True))
    for process in started:
        out, errors = process.communicate(timeout=500)
        assert process.returncode == 0, out[-3000:] + errors[-6000:]
    return [torch.load(f"{folder}-process-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", OVER_PROCESSES)
def test_two_processes_train_what_one_does(two, tmp_path: Path, kind: str) -> None:
    assert [process["processes"] for process in two] == [2, 2]
    first, second = (process["found"][kind] for process in two)
    assert_same_bits(first, second)
    with ExitStack() as stack:
        start, expected = three_steps(kind, Place(TEACHER_ROWS[kind].heads[-1], tmp_path, stack), micro_batch=8)
    assert update_difference(first, expected, start) < 1e-6
