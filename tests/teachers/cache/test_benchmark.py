"""benchmarks/teacher_cost.py and store_training.py run at tiny sizes, and their byte counts match the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import store_training
from benchmarks.gradient_error import gradient_errors
from benchmarks.teacher_cost import CACHED, LIVE, NO_TEACHER, main, table_of_steps


def test_teacher_cost_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"--vocabulary": 300, "--batch": 2, "--length": 8, "--batches": 2, "--rounds": 2}
    small = [str(word) for pair in sizes.items() for word in pair]
    small += ["--student", "1", "64", "--teacher", "1", "64"]
    main([*small, "--output", str(tmp_path / "figures.json")])
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert list(found["classes"]) == [NO_TEACHER, CACHED, LIVE]
    assert list(found["tokens"]) == [NO_TEACHER, "cached, TopK(64)", "cached, Sampled(32)", LIVE]
    assert all(len(seconds) == 2 for seconds in found["tokens"].values())
    # 64 ids and values of 2 bytes, two tails of 4; 32 ids and a mean of 4; 64 ids, 32 values and 8; 300 values of 2.
    # Plus the overhead of a shard with few examples.
    for store, size in (("TopK(64)", 264), ("Sampled(32)", 68), ("Hybrid(32, 32)", 200), ("Dense()", 600)):
        assert size <= found["stores"][store]["bytes_a_token"] < size + 80
        assert found["stores"][store]["build_tokens_a_second"] > 0
    assert "| Sampled(32) | " in text and "Load of the machine" in text


def test_errors_of_the_gradient() -> None:
    """Averages of draws are nearer than single draws, by about the root of 8; strata help for a peaked teacher; draws
    have no bias."""
    errors = gradient_errors(2000, rows=16)
    assert len(errors) == 4
    for of_ways in errors.values():
        assert of_ways["top 64 and the rest as one"] < of_ways["top 64 normalised anew"]
        once, often = of_ways["32 samples: one draw"], of_ways["32 samples: mean of 8"]
        assert often == pytest.approx(once / 8**0.5, rel=0.15)


@pytest.mark.slow
def test_the_plot_is_written(tmp_path: Path) -> None:
    main(["--vocabulary", "600", "--plot", str(tmp_path / "errors.png")])
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"


def test_ratios_by_hand() -> None:
    """Return medians of ratios within rounds: 2/1, 3/2, 4/4 for the live teacher."""
    seconds = {NO_TEACHER: [1.0, 2.0, 4.0], LIVE: [2.0, 3.0, 4.0]}
    row = table_of_steps(seconds)[-1]
    assert row == "| live teacher | 3000.0 | 1.500 (1.250 to 1.750) | 1.000 |"


def test_store_training_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A few steps on small data: the student improves with each store; stores of a block have equal sizes."""
    small = ["--inputs", "64", "--vocabulary", "200", "--epochs", "1", "--seeds", "1"]
    store_training.main([*small, "--output", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    assert len(found) == 4
    for of_ways in found.values():
        assert all(of_ways[way] < of_ways["the start"] for way in of_ways if way != "the start")
    rows = [line for line in capsys.readouterr().out.splitlines() if "(" in line.split("|")[1]]
    assert {row.split("|")[2].strip() for row in rows} == {"68", "260"}
