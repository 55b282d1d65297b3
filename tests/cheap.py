"""Makes tiny models and trainings cheaper: fewer models built, seeds set, and garbage collections run."""

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
    """Make seeding and the start of a training ten times cheaper. The numbers do not change.

    For each possible accelerator, `torch.manual_seed` stores a call with its formatted stack: half a
    millisecond, and the tests seed twenty thousand times. Accelerate collects garbage twice in every training: ten
    milliseconds, or a second with all of transformers in memory, which is hidden from the collector here.
    """
    for accelerator in (torch.cuda, torch.xpu, torch.mtia):
        if not accelerator.is_available():
            accelerator.manual_seed_all = lambda seed: None
    memory.gc = SimpleNamespace(collect=lambda: 0)
    gc.freeze()


def build_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that builds a model from its arguments alone: it builds each model once and returns copies.

    The tests need thousands of models, and a copy costs a fifth of a build.
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
    """A pickled model with its tensors apart; `copy.deepcopy` takes eight times as long, for the dicts of hooks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tensors: dict[int, torch.Tensor] = {}
        written = io.BytesIO()
        try:
            _Pickler(written, self.tensors).dump(model)
        except RuntimeError:  # parametrizations, such as weight norm
            self.pickled = None
        else:
            self.pickled = written.getvalue()

    def copy(self) -> Any:
        if self.pickled is None:
            return copy.deepcopy(self.model)
        return _Unpickler(io.BytesIO(self.pickled), self.tensors).load()


class _Pickler(pickle.Pickler):
    """Stores tensors separately, by number."""

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
