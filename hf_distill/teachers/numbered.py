"""Inputs of one of several teachers: `teacher_0_input_ids` and the like, beside those that all of them share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hf_distill.tasks import Batch
from hf_distill.tasks.base import TEACHER_PREFIX

RAW = ("text", "text_pair", "prompt", "audio", "image")  # what a processing class makes inputs of
_NUMBERED = re.compile(rf"{TEACHER_PREFIX}(\d+)_(.+)")


def of_member(batch: Batch, number: int) -> dict[str, Any]:
    """The batch as one of several teachers is given it: its own columns as `teacher_*`, and no other's.

    Where it has columns of its own, those that all share are not for it; without any it reads these, or the student's.

    >>> sorted(of_member({"input_ids": 1, "teacher_0_input_ids": 2, "teacher_1_input_ids": 3}, 1).items())
    [('input_ids', 1), ('teacher_input_ids', 3)]
    """
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in batch.items():
        found = _NUMBERED.fullmatch(name)
        if found is None:
            shared[name] = value
        elif int(found[1]) == number:
            own[f"{TEACHER_PREFIX}{found[2]}"] = value
    cached = f"{TEACHER_PREFIX}cached_"
    if own:
        shared = {k: v for k, v in shared.items() if not k.startswith(TEACHER_PREFIX) or k.startswith(cached)}
    return {**shared, **own}


def numbered(names: Iterable[str], number: int) -> list[str]:
    """The same inputs as columns of one teacher, without the prefix.

    >>> numbered(["input_ids"], 1)
    ['1_input_ids', '1_text', '1_text_pair', '1_prompt', '1_audio', '1_image']
    """
    return [f"{number}_{name}" for name in (*names, *RAW)]
