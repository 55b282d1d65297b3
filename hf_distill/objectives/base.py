"""Objective: one thing that student and teacher should agree about."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_distill.models.capture import ActivationCapture
from hf_distill.schedules import Schedule
from hf_distill.signals import LossSum, Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED


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

    def fit(
        self, student: ActivationCapture, teacher: ActivationCapture | None, task: Task, *, model: Any, seed: int
    ) -> None:
        """Learn which blocks there are, and refuse what cannot be compared.

        Args:
            model: the student. seed: of what is learned.
        """
        ...

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum: ...

    def count(self, task: Task, batch: Batch) -> Tensor: ...


class LabelsTerm:
    """The loss of the model itself, of the user's `compute_loss_func`, or with label smoothing: a mean over
    the micro-batch's labels, whose part in the optimizer step's mean is its share of the labels.
    """

    def __call__(self, mean: Tensor, task: Task, batch: Batch) -> LossSum:
        """Args: mean: the loss over this micro-batch, scalar."""
        return LossSum(mean, self.count(task, batch).to(mean.device), is_mean=True)

    def count(self, task: Task, batch: Batch) -> Tensor:
        return task.label_count(batch)


def cross_entropy_of_probabilities(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Scalar: the mean cross-entropy `[b v], [b v]` over the rows that have a label; 0 where none has (-100).

    >>> halves = torch.tensor([[0.5, 0.5], [-100.0, -100.0]])
    >>> cross_entropy_of_probabilities(torch.zeros(2, 2), halves).item()
    0.693...
    """
    labelled = (labels[:, 0] != IGNORED).to(logits.dtype)
    losses = torch.nn.functional.cross_entropy(
        logits, labels.clamp(min=0).to(logits.dtype), reduction="none", label_smoothing=smoothing
    )
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)
