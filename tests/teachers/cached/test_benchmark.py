"""benchmarks/teacher_cost.py runs, at sizes that say nothing of time; what it counts is what the layout says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.teacher_cost import LIVE, NO_TEACHER, WAYS, gradient_errors, main, table_of_steps


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"--vocabulary": 300, "--batch": 2, "--length": 8, "--batches": 2, "--rounds": 2}
    small = [str(word) for pair in sizes.items() for word in pair]
    small += ["--student", "1", "64", "--teacher", "1", "64"]
    main([*small, "--output", str(tmp_path / "figures.json")])
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert set(found["classes"]) == set(found["tokens"]) == set(WAYS)
    assert all(len(seconds) == 2 for seconds in found["tokens"].values())
    listed, dense = found["stores"]
    # 64 ids and values of 2 bytes, two tails of 4; 300 values of 2; and what a shard of few examples has around it.
    assert 64 * 4 + 8 <= listed["bytes_a_token"] < 64 * 4 + 8 + 80 and 600 <= dense["bytes_a_token"] < 680
    assert "| top_k | " in text and "Load of the machine" in text


def test_the_rest_as_one_outcome_is_nearest() -> None:
    errors = gradient_errors(2000, rows=16)
    assert len(errors) == 4
    for of_ways in errors.values():
        rest, anew, drawn = of_ways.values()
        assert rest < anew and rest < drawn


def test_ratios_by_hand() -> None:
    """Medians of ratios within rounds: 2/1, 3/2, 4/4 for the live teacher."""
    seconds = {NO_TEACHER: [1.0, 2.0, 4.0], LIVE: [2.0, 3.0, 4.0]}
    row = table_of_steps(seconds)[-1]
    assert row == "| live teacher | 3000.0 | 1.500 (1.250 to 1.750) | 1.000 |"
