"""The watch for a teacher's NaN or infinity: named before an optimizer step can use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.errors import TeacherError
from hf_distill.inside.attention_record import AttentionRecord
from hf_distill.signals import Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import first_tensor

_ADVICE = "Look at that input; a half-precision teacher may overflow: try teacher_dtype='float32' or 'bfloat16'."


class TeacherWatch:
    """Looks at each micro-batch's total, which a teacher's NaN or +inf makes non-finite, and only then at its rows.

    At once on a CPU; elsewhere on the last micro-batch of the step, so that there is one synchronisation a step.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Batch, Tensor]] = []
        self._micro_batches = 1

    def begin_step(self, micro_batches: int) -> None:
        self._seen, self._micro_batches = [], micro_batches

    def look(self, task: Task, batch: Batch, total: Tensor, ask: Callable[[Batch], Signals]) -> None:
        """Look at the sum of all that the teacher was compared in.

        Args:
            ask: the teacher, again: only when something is wrong.

        Raises:
            TeacherError: names the micro-batch, and the example and the row, or the block.
        """
        self._seen.append((batch, total.detach()))
        last = len(self._seen) >= self._micro_batches
        if total.device.type == "cpu":
            if not bool(torch.isfinite(total)):
                self._refuse_if_teachers(task, batch, len(self._seen) - 1, ask(batch))
        elif last and not bool(torch.isfinite(torch.stack([value for _, value in self._seen])).all()):
            for position, (suspect, _) in enumerate(self._seen):
                self._refuse_if_teachers(task, suspect, position, ask(suspect))
        if last:
            self._seen = []

    def _refuse_if_teachers(self, task: Task, batch: Batch, micro_batch: int, signals: Signals) -> None:
        """Raise if the teacher is at fault; the student's own NaN is handled as in any training."""
        place = f"micro-batch {micro_batch} of {self._micro_batches}"
        if signals.logits is not None or signals.sparse is not None:
            self._refuse_rows(task, batch, signals.to_look_at(), place)
        for read, value in sorted(signals.inside.items(), key=lambda item: item[0].layer):
            x = value.queries.transpose(1, 2).flatten(2) if isinstance(value, AttentionRecord) else value  # [b t d]
            mask = batch.get("attention_mask")
            shown = x[mask.bool()] if mask is not None and mask.shape == x.shape[:2] else x
            wrong = shown[~torch.isfinite(shown)]
            if wrong.numel():
                raise TeacherError(
                    f"the teacher's {read.what} of block {read.layer} hold {wrong[0].item()} ({place}). No step was "
                    f"made. {_ADVICE}"
                )

    def _refuse_rows(self, task: Task, batch: Batch, said: Tensor, place: str) -> None:
        rows, kept = task.select(said, batch), task.kept_rows(batch)
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
            f"it ({place}; {int(wrong.sum())} such rows in it). No step was made. {_ADVICE}"
        )
