"""What tiny models and trainings cost to no end: made again and again, seeds for accelerators, garbage collection."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import memory


def make_trainings_cheap() -> None:
    """Seeding and the start of a training cost a tenth of what they do else. The numbers are the same.

    `torch.manual_seed` keeps a call, with its formatted stack, for each kind of accelerator that may still come: half a
    millisecond, and the tests seed twenty thousand times. Accelerate collects garbage twice in every training: ten
    milliseconds, and a second with all of transformers to look at, which is put out of the collector's sight here.
    """
    for accelerator in (torch.cuda, torch.xpu, torch.mtia):
        if not accelerator.is_available():
            accelerator.manual_seed_all = lambda seed: None
    memory.gc = SimpleNamespace(collect=lambda: 0)
    gc.freeze()


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that makes a model of its arguments alone: one of each is made, and copies are given out.

    The tests ask for thousands, and a copy costs half of that.
    """
    kept: dict[str, Any] = {}

    @functools.wraps(make)
    def copied(*arguments: Any, **named: Any) -> Any:
        key = f"{arguments!r} {sorted(named.items())!r}"
        if key not in kept:
            kept[key] = make(*arguments, **named)
        return copy.deepcopy(kept[key])

    return copied
