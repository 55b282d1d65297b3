"""A chain on two gloo processes is that of one: each link trained once, resumed, and written by one process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import two_processes
from tests.runs.chain_two_processes import CASES, FOLDERS, chained
from tests.trainer.tiny import assert_same_bits, update_difference


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Any]:
    """What each of two processes found and did."""
    folder = tmp_path_factory.mktemp("two") / "chains"
    printed = two_processes(Path(__file__).with_name("chain_two_processes.py"), str(folder))
    assert [out.count("Kept in ") for out in printed] == [len(CASES), 0]  # process 0 alone prints
    return [torch.load(f"{folder}-process-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    return chained(tmp_path_factory.mktemp("one"), "whole", examples_a_process=4)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_students_of_one(two, one, case: str) -> None:
    first, second = (process["found"][case] for process in two)
    for name in FOLDERS:
        assert_same_bits(first["students"][name], second["students"][name])
        nothing = {key: torch.zeros_like(value) for key, value in one["students"][name].items()}
        assert update_difference(first["students"][name], one["students"][name], nothing) < 1e-6
    for found in (first, second):
        for metrics, expected in zip(found["metrics"], one["metrics"], strict=True):
            assert metrics == pytest.approx(expected, rel=1e-6)
        assert found["kept"] == one["kept"]


def test_each_link_is_trained_once_and_resumed_where_it_was(two, one) -> None:
    once = ["1-assistant from 0", "2-half from 0", "3-student from 0"]
    resumed = ["1-assistant from 0", "2-half from 0", "2-half from 2", "3-student from 0"]
    assert one["trained"] == once
    for process in two:
        assert process["found"]["whole"]["trained"] == once
        assert process["found"]["interrupted"]["trained"] == resumed
        assert process["found"]["interrupted"]["how"] == ["finished before", "resumed", "trained"]


def test_the_main_process_alone_writes(two) -> None:
    """The other one makes the folders in which `Trainer` keeps its random state, and nothing else."""
    of_main, of_other = (set(process["written"]) for process in two)
    assert of_other <= {f"os.mkdir checkpoint-{step}" for step in (1, 2, 3)}
    assert {"os.rename begun.json", "os.rename finished.json"} <= of_main
