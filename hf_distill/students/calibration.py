"""Running a teacher on the batches that say what matters, leaving it as it was. It measures nothing itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.errors import DataError
from hf_distill.students.components import Components
from hf_distill.students.importance import on_device, scores_of
from hf_distill.students.units import Group
from hf_distill.students.wiring import Wiring, watch


class Calibration:
    """A teacher in evaluation mode, and its batches, each read once. Used with `with`: modes are put back."""

    def __init__(self, teacher: PreTrainedModel, data: Iterable[Mapping[str, Any]]) -> None:
        self.teacher = teacher
        self._batches = iter(data)
        self._named = set(inspect.signature(teacher.forward).parameters)
        self._first: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Calibration:
        for module in self.teacher.modules():
            self._stack.callback(setattr, module, "training", module.training)
        self._stack.enter_context(torch.random.fork_rng(devices=[]))
        self.teacher.eval()
        first = next(self._batches, None)
        if first is None:
            self._stack.close()
            raise DataError("narrow: data= gave no batch.")
        try:
            self._first = self._readable(first)
        except DataError:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _readable(self, batch: Any) -> dict[str, Any]:
        """What `forward` names, on the teacher's device."""
        given = on_device(batch, self.teacher.device)
        read = {name: value for name, value in given.items() if name in self._named}
        if not any(isinstance(value, Tensor) for value in read.values()):
            raise DataError(
                f"narrow: a batch of data= has the columns {', '.join(given) or '(none)'}, and "
                f"{type(self.teacher).__name__} reads tensors {', '.join(sorted(self._named)[:8])}, ..."
            )
        return read

    def first(self, model: Any) -> Any:
        """What a model says of the first batch, without gradient."""
        with torch.no_grad():
            return model(**self._first)

    def wiring(self) -> Wiring:
        """What works with what in the teacher."""
        return watch(self.teacher, lambda: self.first(self.teacher))

    def scores(self, groups: list[Group], importance: str, components: Components | None = None) -> list[Tensor]:
        """The importance of all units, over all batches. `components` see the same batches: there may be no others."""

        def forward(batch: Mapping[str, Any]) -> Any:
            if components is not None:
                components.batch = batch
            return self.teacher(**batch)

        how = importance if groups else "activation"  # no units, no gradient
        with contextlib.nullcontext() if components is None else components:
            return scores_of(self.teacher, groups, self._all(), forward, how)

    def _all(self) -> Iterator[dict[str, Any]]:
        return chain([self._first], (self._readable(batch) for batch in self._batches))
