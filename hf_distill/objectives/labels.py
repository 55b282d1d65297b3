"""The labels' term: the head's own loss. Nothing is recomputed; only its denominator is known here."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.loss_sum import LossSum
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED


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
