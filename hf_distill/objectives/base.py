"""Objective: one thing that student and teacher should agree about."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from hf_distill.inside.recorder import Inside
from hf_distill.loss_sum import LossSum
from hf_distill.schedules import Schedule
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task


class Objective(Protocol):
    """Returns a sum and a count. The count depends on the batch alone, so that the denominator of the
    whole optimizer step is known before the first forward.

    Attributes:
        name: of its term, in logs and cards. weight: of its term in the loss, a schedule; of the logits' alpha is.
        needs, teacher_needs: what must be computed of the student and of the teacher; known after `fit`.
        needs_same_inputs: it compares position with position, so both models must read the same input.
        couples_examples: an example's share depends on the others of its micro-batch. Then accumulation and several
            processes compare within micro-batches, and the results are weighted by their examples.
        learned: what is trained with the student and is no part of it; None: nothing.

    It may have `needs_teacher = False`, where it asks the student alone: then it runs without a teacher too.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> Schedule: ...

    @property
    def needs(self) -> Needs: ...

    @property
    def teacher_needs(self) -> Needs: ...

    @property
    def needs_same_inputs(self) -> bool: ...

    @property
    def couples_examples(self) -> bool: ...

    @property
    def learned(self) -> nn.Module | None: ...

    def fit(self, student: Inside, teacher: Inside | None, task: Task, *, model: Any, seed: int) -> None:
        """Learn which blocks there are, and refuse what cannot be compared.

        Args:
            model: the student. seed: of what is learned.
        """
        ...

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum: ...

    def count(self, task: Task, batch: Batch) -> Tensor: ...
