"""LabelAgreement: how often the teacher's prediction is the label, over the first labelled rows of a training.

It is only for heads of few classes: vocabularies are compared by their tokens, and values have no class.
"""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from hf_distill.signals import Signals
from hf_distill.tasks import Batch, Task
from hf_distill.teachers.base import Teacher

logger = logging.getLogger(__name__)
ROWS = 256  # enough labelled rows: a share of them is known to about 0.03
GIVEN_UP = 64 * ROWS  # rows after which the count is abandoned
SKILL = 0.1  # of the way from chance to always right


class LabelAgreement:
    """Counts how often the teacher's prediction is the label, and warns once if that is no more than chance.

    Chance is the agreement of independent predictions with the same frequencies, so that predicting the most common
    class has no merit. Everything is counted on the device and read once.

    Args:
        teacher: the teacher; one that changes in training is left out, since it knows nothing at the start.

    Attributes:
        is_done: whether no more rows need to be counted.
        is_due: whether there are rows enough to call `warn_if_chance`.
    """

    def __init__(self, teacher: Teacher | None) -> None:
        self.is_done = teacher is None or any(member.changes_in_training for member in teacher.members())
        self.is_due = False
        self._rows, self._enough = 0, ROWS  # the number of rows is known without reading labels
        self._histograms = torch.zeros(2, 0)  # `[2 v]`: labels, and the teacher's choices
        self._right = torch.zeros(())

    @torch.no_grad()
    def add(self, task: Task, batch: Batch, student: Signals, teacher: Signals) -> None:
        """Count the labelled rows of a micro-batch whose predictions are compared."""
        if self.is_done or task.over_vocabulary or student.logits is None or teacher.logits is None:
            return
        targets, chosen = task.targets(batch), task.select(teacher.logits, batch).argmax(-1)
        if targets is None or chosen.shape != targets.shape:
            return
        if teacher.alignment.student is not None:
            targets = teacher.alignment.of_labels(targets)
        labelled = targets >= 0
        self._rows += len(targets)
        self.is_due = self._rows >= self._enough
        width, known = student.logits.shape[-1], self._histograms.shape[-1]  # spans may be longer than before
        self._histograms = F.pad(self._histograms.to(targets.device), (0, max(0, width - known)))
        for histogram, values in zip(self._histograms, (targets, chosen), strict=True):
            histogram.index_add_(0, values.clamp(0, width - 1), labelled.float())
        self._right = self._right.to(targets.device) + (labelled & (chosen == targets)).sum()

    def warn_if_chance(self, accelerator: Accelerator | None = None) -> None:
        """Log a warning, once there are enough labelled rows, if the teacher's choices have nothing to do with them."""
        if not self.is_due:
            return
        labels, choices = self._histograms
        by_chance = (labels * choices).sum() / labels.sum().clamp(min=1)
        labelled, right, by_chance = torch.stack([labels.sum(), self._right, by_chance]).tolist()
        self._enough *= 2
        self.is_due = False
        self.is_done = labelled >= ROWS or self._rows >= GIVEN_UP
        if labelled < ROWS or right > by_chance + SKILL * (labelled - by_chance):
            return
        if accelerator is None or accelerator.is_main_process:
            logger.warning(
                f"The teacher does not know these labels: in the first {labelled:.0f} labelled rows its choice is the "
                f"label in {right / labelled:.1%}, and {by_chance / labelled:.1%} would be by chance. Causes: the "
                "dataset numbers its labels otherwise than config.label2id, label_matching='by_index' with heads of "
                "different order, a teacher that was not trained on this task, or teacher_model and model exchanged."
            )
