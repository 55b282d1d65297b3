"""The watch for a teacher's NaN or infinity: named before an optimizer step can use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.errors import TeacherError
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import first_tensor


class TeacherWatch:
    """Looks at each micro-batch's total, which a teacher's NaN or +inf makes non-finite, and only then at its rows.

    At once on a CPU; elsewhere on the last micro-batch of the step, so that there is one synchronisation a step.

    Args:
        rows_of: the teacher's predictions of a batch, asked for again when something is wrong.
    """

    def __init__(self, rows_of: Callable[[Batch], Tensor]) -> None:
        self._rows_of = rows_of
        self._seen: list[tuple[Batch, Tensor]] = []
        self._micro_batches = 1

    def begin_step(self, micro_batches: int) -> None:
        self._seen, self._micro_batches = [], micro_batches

    def look(self, task: Task, batch: Batch, total: Tensor) -> None:
        """Raises:
        TeacherError: names the micro-batch, the example and the row.
        """
        self._seen.append((batch, total.detach()))
        last = len(self._seen) >= self._micro_batches
        if total.device.type == "cpu":
            if not bool(torch.isfinite(total)):
                self._refuse_if_teachers(task, batch, len(self._seen) - 1)
        elif last and not bool(torch.isfinite(torch.stack([value for _, value in self._seen])).all()):
            for position, (suspect, _) in enumerate(self._seen):
                self._refuse_if_teachers(task, suspect, position)
        if last:
            self._seen = []

    def _refuse_if_teachers(self, task: Task, batch: Batch, micro_batch: int) -> None:
        """Raise if the teacher's rows are at fault; the student's own NaN is handled as in any training."""
        rows, kept = task.select(self._rows_of(batch), batch), task.kept_rows(batch)
        looked_at = rows if kept is None else rows[kept]
        wrong = (torch.isnan(looked_at) | (looked_at == torch.inf)).any(-1)
        if not bool(wrong.any()):
            return
        first = int(wrong.nonzero()[0])
        row = first if kept is None else int(kept[first])
        rows_an_example = max(1, rows.shape[0] // first_tensor(batch).shape[0])
        value = looked_at[first][~torch.isfinite(looked_at[first])][0].item()
        raise TeacherError(
            f"the teacher's logits hold {value} in example {row // rows_an_example}, row {row % rows_an_example} of "
            f"it (micro-batch {micro_batch} of {self._micro_batches}; {int(wrong.sum())} such rows in it). No step "
            "was made. Look at that input; a half-precision teacher may overflow: try teacher_dtype='float32' or "
            "'bfloat16'."
        )
