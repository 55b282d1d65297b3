"""Agreement with the teacher and the divergence from it, over an evaluation set; only when asked for."""

from __future__ import annotations

from typing import Any

import torch

from hf_distill.distiller import Distiller
from hf_distill.tasks import Batch
from hf_distill.tasks.base import batch_size


class TeacherMetrics:
    """Sums an example, gathered so that an example that a sampler repeated to fill up a batch counts once.

    `teacher_agreement`: share of the rows that count whose most likely class is the same (left out for values, which
    have no class). `divergence`: mean over the rows that count, at the temperature that training ends with, its factor
    included.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # divergence, agreeing rows, rows

    def add(self, distiller: Distiller, outputs: Any, batch: Batch, *, gather: Any) -> None:
        """Args: gather: `accelerator.gather_for_metrics`."""
        task, match = distiller.task, distiller.logits_match
        student = distiller.student_signals(outputs, batch)
        teacher = distiller.teacher_signals(batch)
        found = match.per_row(student, teacher, task, batch, progress=1.0)
        agrees = found.agrees()
        examples = batch_size(batch)
        rows_an_example = max(1, task.rows(batch) // examples)
        kept = found.kept
        if kept is None:
            kept = torch.arange(found.values.shape[0], device=found.values.device)
        each = torch.stack((found.values.float(), agrees.float(), torch.ones_like(agrees).float()), 1)
        sums = torch.zeros(examples, 3, device=each.device)
        sums.index_add_(0, kept // rows_an_example, each)
        self._sums += gather(sums).cpu().double().sum(0)  # on the CPU: not every device has fp64

    def read(self, *, on_values: bool) -> dict[str, float]:
        """The metrics; nothing where no row counted."""
        divergence, agreeing, rows = self._sums.tolist()
        if rows == 0:
            return {}
        metrics = {"divergence": divergence / rows}
        if not on_values:
            metrics["teacher_agreement"] = agreeing / rows
        return metrics
