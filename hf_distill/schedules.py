"""Schedules of temperature, alpha and weights: numbers as functions of training progress 0 → 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, TypeAlias

from hf_distill._types import OneOf
from hf_distill.errors import SettingError, did_you_mean, is_number

Schedule = Callable[[float], float]


def constant(start: float, end: float | None = None) -> Schedule:
    """Return a constant schedule; raise if `end` differs from `start`.

    >>> constant(2.0)(0.7)
    2.0
    """
    if end not in (None, start):
        raise SettingError(f"a schedule that is constant at {start:g} cannot end at {end:g}: choose linear or cosine.")
    return lambda progress: start


def linear(start: float, end: float) -> Schedule:
    """Return a straight line from `start` to `end`.

    >>> linear(4.0, 1.0)(0.5)
    2.5
    """
    return lambda progress: start + (end - start) * _clamp(progress)


def cosine(start: float, end: float) -> Schedule:
    """Return half a cosine wave from `start` to `end`, flat at both ends.

    >>> round(cosine(1.0, 0.0)(0.5), 6)
    0.5
    """
    return lambda progress: end + (start - end) * 0.5 * (1 + math.cos(math.pi * _clamp(progress)))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
ScheduleName: TypeAlias = Annotated[str, OneOf(SCHEDULES)]
# Names in other libraries; only proposed in messages.
_ALSO_CALLED = {
    **dict.fromkeys(("linear_decay", "linear_warmup", "lerp"), "linear"),
    **dict.fromkeys(("cos", "cosine_annealing", "cosine_decay"), "cosine"),
    **dict.fromkeys(("const", "none", "fixed"), "constant"),
}


def make_schedule(knob: str, kind: str, start: float, end: float | None) -> Schedule:
    """Return the named schedule from `start` to `end`; `knob` is the name of the setting, for messages."""
    if kind not in SCHEDULES:
        hint = did_you_mean(kind, SCHEDULES, _ALSO_CALLED)
        raise SettingError(f"{knob}_schedule={kind!r}: no such schedule. Allowed: {', '.join(SCHEDULES)}.{hint}")
    for name, value in ((knob, start), (f"{knob}_end", end)):
        if not is_number(value) and (name == knob or value is not None):
            raise SettingError(f"{name}={value!r}: must be a number.")
    if kind == "constant" and end not in (None, start):
        raise SettingError(
            f"{knob}_end={end:g}, but {knob}_schedule is constant at {start:g}. Choose linear or cosine, or leave "
            f"{knob}_end out."
        )
    if kind != "constant" and end is None:
        raise SettingError(f"{knob}_schedule={kind!r} needs {knob}_end: where should it end?")
    return SCHEDULES[kind](start, end)


PROGRESS = tuple(step / 200 for step in range(201))  # where a schedule's values are checked


def checked_schedule(knob: str, value: float | Schedule) -> Schedule:
    """Return a number or a schedule as a schedule whose values are all allowed.

    Raises:
        SettingError: if alpha leaves [0, 1], or a temperature is not above 0.
    """
    if callable(value):
        schedule = value
    elif is_number(value):
        schedule = constant(float(value))
    else:
        raise SettingError(f"{knob}={value!r}: must be a number, or a function of progress 0 → 1.")
    for found in (schedule(progress) for progress in PROGRESS):
        if knob == "alpha" and not 0 <= found <= 1:
            raise SettingError(
                f"alpha={found:g}: must lie in [0, 1]. It is the weight of the teacher's term; 1 - alpha is that of "
                "the labels."
            )
        if knob == "temperature" and not 0 < found < float("inf"):
            raise SettingError(
                f"temperature={found:g}: must be above 0 and finite. 1 leaves the teacher's probabilities as they "
                "are; higher is softer."
            )
    return schedule


def _clamp(progress: float) -> float:
    return min(1.0, max(0.0, progress))
