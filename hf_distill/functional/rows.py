"""Preparing two sets of rows for a divergence: full precision, and the columns both may predict."""

from __future__ import annotations

import torch
from torch import Tensor

# Finite, so that differences of two blocked columns are 0 and not NaN; low enough that exp() is 0.
BLOCKED = -1e30


def in_full_precision(rows: Tensor) -> Tensor:
    """fp32, whatever the model's dtype; fp64 stays (references and tests)."""
    return rows if rows.dtype == torch.float64 else rows.float()


def on_common_support(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of rows in full precision, with every column that either blocks (−inf) blocked in both.

    A column that one of the two cannot predict is no subject of agreement: what remains of each row is
    compared after renormalisation. On a CPU the rows are copied only when something is blocked; on an
    accelerator asking first would cost a synchronisation, so they always are.

    Args:
        student: `[n v]`. teacher: `[n v]`.

    >>> s, t = on_common_support(torch.tensor([[1.0, -torch.inf]]), torch.tensor([[0.0, 5.0]]))
    >>> s.softmax(-1).tolist(), t.softmax(-1).tolist()
    ([[1.0, 0.0]], [[1.0, 0.0]])
    """
    student, teacher = in_full_precision(student), in_full_precision(teacher)
    if student.numel() == 0 or (_on_cpu_and_finite(student) and _on_cpu_and_finite(teacher)):
        return student, teacher
    blocked = (student == -torch.inf) | (teacher == -torch.inf)
    return student.masked_fill(blocked, BLOCKED), teacher.masked_fill(blocked, BLOCKED)


def is_live(rows: Tensor) -> Tensor:
    """Which columns of rows from `on_common_support` are not blocked."""
    return rows.detach() > BLOCKED / 2


def _on_cpu_and_finite(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and bool(rows.detach().amin() > -torch.inf)
