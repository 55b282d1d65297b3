"""What tiny models and trainings cost to no end: made again and again, seeds for accelerators, garbage collection."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
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

    The tests ask for thousands, and a copy costs a fifth of that.
    """
    kept: dict[str, _Kept] = {}

    @functools.wraps(make)
    def copied(*arguments: Any, **named: Any) -> Any:
        key = f"{arguments!r} {sorted(named.items())!r}"
        if key not in kept:
            kept[key] = _Kept(make(*arguments, **named))
        return kept[key].copy()

    return copied


class _Kept:
    """A model, pickled but for its tensors: `copy.deepcopy` takes eight times as long, for the dicts of hooks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tensors: dict[int, torch.Tensor] = {}
        written = io.BytesIO()
        try:
            _Pickler(written, self.tensors).dump(model)
        except RuntimeError:  # with parametrizations: weight norm
            self.pickled = None
        else:
            self.pickled = written.getvalue()

    def copy(self) -> Any:
        if self.pickled is None:
            return copy.deepcopy(self.model)
        return _Unpickler(io.BytesIO(self.pickled), self.tensors).load()


class _Pickler(pickle.Pickler):
    """Puts tensors aside, by number."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        self._tensors[id(obj)] = obj
        return id(obj)


class _Unpickler(pickle.Unpickler):
    """Copies each tensor once."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._copies: dict[int, Any] = {}

    def persistent_load(self, pid: int) -> torch.Tensor:
        return copy.deepcopy(self._tensors[pid], self._copies)
