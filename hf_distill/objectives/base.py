"""Objective: one thing that student and teacher should agree about."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hf_distill.loss_sum import LossSum
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task


class Objective(Protocol):
    """Returns a sum and a count. The count depends on the batch alone, so that the denominator of the
    whole optimizer step is known before the first forward."""

    needs: Needs

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum: ...

    def count(self, task: Task, batch: Batch) -> Tensor: ...
