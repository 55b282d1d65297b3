"""The task of a student that no task is known for: its training is the base trainer's own, and nothing is compared."""

from __future__ import annotations

from hf_distill.tasks.base import Batch, Task


class UnknownTask(Task):
    """For a class that is in none of transformers' tables, where alpha is 0 throughout and nothing is compared.

    It has no rows and counts no labels: whoever would count or compare must not get it.
    """

    kind = "unknown"
    matched_by = "width"
    needs_same_inputs = False
    label_names = ()
    is_known = False

    def has_labels(self, batch: Batch) -> bool:
        """False: which columns are labels, and over how many of them the loss is a mean, is not known."""
        return False

    def require_labels(self, columns: object) -> None:
        """Nothing: the model may need none."""
