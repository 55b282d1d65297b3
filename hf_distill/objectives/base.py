"""Objective: the base class of everything that student and teacher should agree about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_distill.models.capture import ActivationCapture
from hf_distill.schedules import Schedule, constant
from hf_distill.signals import LossSum, Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED


@dataclass(frozen=True)
class ObjectiveSetup:
    """What an objective is told of the models before the first step.

    Attributes:
        student: reads the student's activations.
        teacher: reads the teacher's activations, or None if the teacher shows none.
        task: the student's task.
        model: the student, without wrappers.
        seed: of what the objective learns.
    """

    student: ActivationCapture
    teacher: ActivationCapture | None
    task: Task
    model: Any
    seed: int = 0


class Objective(ABC):
    """One thing that student and teacher should agree about: a sum over rows, and how many rows there are.

    The count depends on the batch alone, so that the denominator of the whole optimizer step is known before the first
    forward. An objective of your own needs `__call__` and `count`.

    Attributes:
        name: of its term, in logs and cards.
        weight: of its term in the loss, a schedule. (The weight of the logits' term is alpha.)
        needs: what must be computed of the student; known after `bind`.
        teacher_needs: what must be computed of the teacher; known after `bind`.
        needs_teacher: whether it compares with a teacher; if not, it runs without one.
        needs_same_inputs: whether it compares position with position, so that both models must read the same input.
        couples_examples: whether an example's share depends on the others of its micro-batch. Then accumulation and
            several processes compare within micro-batches, and the results are weighted by their examples.
        pools: "first", "last" or "mean" if only this vector of each example's hidden states is compared.
        learned: what is trained with the student and is no part of it, or None.
        paper: where the objective comes from, for the model card.
    """

    name: str = "objective"
    weight: Schedule = constant(1.0)
    needs: Needs = Needs()
    teacher_needs: Needs = Needs()
    needs_teacher: bool = True
    needs_same_inputs: bool = False
    couples_examples: bool = False
    pools: str | None = None
    learned: nn.Module | None = None
    paper: ClassVar[str | None] = None

    def bind(self, setup: ObjectiveSetup) -> None:
        """Find the blocks that it reads, and check that the models can be compared.

        Raises:
            SettingError: if this student or teacher cannot be compared so.
        """

    @abstractmethod
    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        """Return the sum over the rows of this micro-batch that count."""

    @abstractmethod
    def count(self, task: Task, batch: Batch) -> Tensor:
        """Return how many rows of this micro-batch count, a scalar, from the batch alone."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


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
