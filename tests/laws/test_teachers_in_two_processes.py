"""L4 over processes: with several kinds of teacher, two gloo processes make the same three steps as one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import two_processes
from tests.laws.making_teachers import Place
from tests.laws.teacher_rows import TEACHER_ROWS
from tests.laws.teacher_runs import OVER_PROCESSES, three_steps
from tests.trainer.tiny import assert_same_bits, update_difference

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Any]:
    """Return the students of each of two processes."""
    folder = tmp_path_factory.mktemp("two") / "teachers"
    two_processes(Path(__file__).with_name("teacher_runs.py"), str(folder))
    return [torch.load(f"{folder}-process-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", OVER_PROCESSES)
def test_two_processes_train_the_same_student_as_one(two, tmp_path: Path, kind: str) -> None:
    assert [process["processes"] for process in two] == [2, 2]
    first, second = (process["found"][kind] for process in two)
    assert_same_bits(first, second)
    with ExitStack() as stack:
        start, expected = three_steps(kind, Place(TEACHER_ROWS[kind].heads[-1], tmp_path, stack), micro_batch=8)
    assert update_difference(first, expected, start) < 1e-6
