"""Schedules: values from start to end and beyond, and errors, also of values that the distiller rejects."""

from __future__ import annotations

import math

import pytest

from hf_distill import Distiller, SettingError
from hf_distill.schedules import SCHEDULES, constant, cosine, linear, make_schedule
from tests.heads import HEADS

PROGRESS = [step / 20 for step in range(21)]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(4.0, 1.0), (0.0, 1.0), (2.0, 2.0)])
def test_schedules_are_monotonic_from_start_to_end(kind: str, start: float, end: float) -> None:
    values = [SCHEDULES[kind](start, end)(p) for p in PROGRESS]
    assert values[0] == pytest.approx(start) and values[-1] == pytest.approx(end)
    assert values[10] == pytest.approx((start + end) / 2)
    assert values == sorted(values, reverse=start > end)


def test_values_of_each_schedule() -> None:
    assert linear(4.0, 0.0)(0.25) == 3.0
    assert cosine(1.0, 0.0)(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert constant(3.0)(0.25) == 3.0


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_constant_beyond_their_ends(kind: str) -> None:
    end = 4.0 if kind == "constant" else 1.0
    schedule = SCHEDULES[kind](4.0, end)
    assert schedule(-0.5) == pytest.approx(4.0) and schedule(1.5) == pytest.approx(end)


def test_a_constant_schedule_with_an_end_raises() -> None:
    with pytest.raises(
        SettingError, match=r"alpha_end=1, but alpha_schedule is constant at 0.5. Choose linear or cosine"
    ):
        make_schedule("alpha", "constant", 0.5, 1.0)
    assert make_schedule("alpha", "constant", 0.5, 0.5)(1.0) == 0.5


def test_invalid_schedules_raise() -> None:
    with pytest.raises(SettingError, match=r"temperature_schedule='linear' needs temperature_end"):
        make_schedule("temperature", "linear", 2.0, None)
    with pytest.raises(SettingError, match=r"alpha_schedule='step': no such schedule. Allowed: constant, linear"):
        make_schedule("alpha", "step", 2.0, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1.5: must lie in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha=-0.1: must lie in \[0, 1\]"),
        ({"alpha": math.nan}, r"alpha=nan: must lie in \[0, 1\]"),
        ({"alpha": linear(0.5, 1.2)}, r"alpha=1.* must lie in \[0, 1\]"),
        ({"alpha": "half"}, r"alpha='half': must be a number, or a function of progress"),
        ({"alpha": True}, r"alpha=True: must be a number"),
        ({"temperature": 0}, r"temperature=0: must be above 0 and finite"),
        ({"temperature": -2.0}, r"temperature=-2: must be above 0"),
        ({"temperature": math.inf}, r"temperature=inf: must be above 0 and finite"),
        ({"temperature": math.nan}, r"temperature=nan: must be above 0 and finite"),
        ({"temperature": linear(2.0, 0.0)}, r"temperature=0: must be above 0"),
    ],
)
def test_invalid_scheduled_values_raise(settings: dict, message: str) -> None:
    head = HEADS["bert_single_label"]
    teacher = head.make(2)
    with pytest.raises(SettingError, match=message):
        Distiller(head.make(1), teacher, **settings)
    assert all(p.requires_grad for p in teacher.parameters())
