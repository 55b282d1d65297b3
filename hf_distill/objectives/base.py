"""Objective: the base class of every term of the loss but the labels'."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.models.capture import ActivationCapture
from hf_distill.schedules import Schedule, constant
from hf_distill.signals import LossSum, Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ObjectiveSetup:
    """The models, as an objective sees them before the first step.

    Attributes:
        student: captures the student's activations.
        teacher: captures the teacher's activations, or None if the teacher has none to capture.
        task: the student's task.
        model: the student, without wrappers.
        seed: for the initial values of learned parameters.
    """

    student: ActivationCapture
    teacher: ActivationCapture | None
    task: Task
    model: PreTrainedModel
    seed: int = 0


class Objective(ABC):
    """A term of the loss that compares student and teacher: a sum over rows, and the number of rows.

    The count depends on the batch alone, so that the denominator of the whole optimizer step is known before the first
    forward. A subclass needs `__call__` and `count`.

    Attributes:
        name: the name of its term, in logs and cards.
        weight: the weight of its term in the loss, a schedule. (The weight of the logits' term is alpha.)
        needs: what the student must compute; known after `bind`.
        teacher_needs: what the teacher must compute; known after `bind`.
        needs_teacher: whether it needs a teacher.
        needs_same_inputs: whether it compares position with position, so that both models must read the same input.
        couples_examples: whether an example's share depends on the others of its micro-batch. Then accumulation and
            several processes compare within micro-batches, and the results are weighted by their examples.
        pools: "first", "last" or "mean" if only this vector of each example's hidden states is compared.
        learned: the parameters trained with the student that are not part of it, or None.
        paper: the citation key of its paper in `hub/papers.bib`, a BibTeX entry, or None; for the model card.
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
        """Find the blocks to capture, and check that the models can be compared.

        Raises:
            SettingError: if this student and teacher cannot be compared.
        """

    @abstractmethod
    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        """Return the sum over the valid rows of this micro-batch."""

    @abstractmethod
    def count(self, task: Task, batch: Batch) -> Tensor:
        """Return the number of valid rows of this micro-batch, a scalar, computed from the batch alone."""

    def __repr__(self) -> str:
        """Return the objective and its settings, for logs, cards, and the check that a resumed run has not changed."""
        return f"{type(self).__name__}()"


def like_student(module: Module, student: nn.Module) -> Module:
    """Return the module on the student's device, in fp32, or in fp64 if the student is in fp64."""
    parameter = next(student.parameters())
    return module.to(parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32)


def cross_entropy_of_probabilities(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of `[b v], [b v]` over the rows with a label, a scalar; 0 if no row has one (-100).

    >>> halves = torch.tensor([[0.5, 0.5], [-100.0, -100.0]])
    >>> cross_entropy_of_probabilities(torch.zeros(2, 2), halves).item()
    0.693...
    """
    labelled = (labels[:, 0] != IGNORED).to(logits.dtype)
    losses = torch.nn.functional.cross_entropy(
        logits, labels.clamp(min=0).to(logits.dtype), reduction="none", label_smoothing=smoothing
    )
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)
