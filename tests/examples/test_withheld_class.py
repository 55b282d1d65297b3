"""The withheld class: a student that never sees a 3 recognizes most 3s; one trained on hard labels recognizes none."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "withheld_class.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT), run_name="example")


def test_the_bias_minimizes_the_errors(script) -> None:
    """Two 3s need a bias of 1 and 2, and a 5 becomes a 3 from 4 on: any value from 2 to 4, so 3."""
    logits = np.full((3, 10), -20.0)
    logits[:, 5] = 0.0
    logits[:, 3] = [-1.0, -2.0, -4.0]
    labels = np.array([3, 3, 5])
    bias = script["best_bias"](logits, labels)
    assert bias == pytest.approx(3.0, abs=0.06)
    assert script["shares"](logits + bias * script["IS_WITHHELD"], labels) == (1.0, 1.0)
    assert script["shares"](logits, labels) == (0.0, pytest.approx(1 / 3))


def test_the_transfer_set_has_no_3_and_shifts_are_to_neighbours(script) -> None:
    image = np.zeros((1, 8, 8))
    image[0, 3, 4] = 1.0
    moved = script["shifted"](image)
    assert moved.shape == (5, 8, 8)
    assert {tuple(np.argwhere(one)[0]) for one in moved} == {(3, 4), (2, 4), (4, 4), (3, 3), (3, 5)}


@pytest.mark.slow  # a minute or two: three trainings
def test_unseen_3s_are_recognized(script) -> None:
    found = list(script["run"]().values())
    (teacher_3s, teacher), (hard_3s, _), (before_3s, before), (after_3s, after) = found
    assert teacher > 0.93 and teacher_3s > 0.8
    assert hard_3s == 0.0
    assert after_3s > 0.5 and after_3s >= before_3s
    assert after > before - 0.01 and after > 0.85
