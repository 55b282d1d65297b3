"""The labels' term: the head's own loss. Nothing is recomputed; only its denominator is known here."""

from __future__ import annotations

from torch import Tensor

from hf_distill.loss_sum import LossSum
from hf_distill.tasks import Batch, Task


class LabelsTerm:
    """The loss of the model itself, of the user's `compute_loss_func`, or with label smoothing: a mean over
    the micro-batch's labels, whose part in the optimizer step's mean is its share of the labels.
    """

    def __call__(self, mean: Tensor, task: Task, batch: Batch) -> LossSum:
        """Args: mean: the loss over this micro-batch, scalar."""
        return LossSum(mean, self.count(task, batch).to(mean.device), is_mean=True)

    def count(self, task: Task, batch: Batch) -> Tensor:
        return task.label_count(batch)
