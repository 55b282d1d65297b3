"""The task of a student of an unknown class, which trains as in the base trainer, without a comparison."""

from __future__ import annotations

from hf_distill.tasks.base import Batch, Task


class UnknownTask(Task):
    """The task for classes outside transformers' tables, for trainings with alpha=0 in which nothing is compared.

    It has no rows and counts no labels, so it cannot be used to count or compare.
    """

    kind = "unknown"
    matched_by = "width"
    needs_same_inputs = False
    label_names = ()
    is_known = False

    def has_labels(self, batch: Batch) -> bool:
        """Return False, since the columns of the labels and their number are unknown."""
        return False

    def require_labels(self, columns: Batch) -> None:
        """Do nothing, since the model may need no labels."""
