"""Preparation of two sets of rows for a divergence: full precision, and the columns that both can predict."""

from __future__ import annotations

import torch
from torch import Tensor

# Finite, so that the difference of two blocked columns is 0 and not NaN; so low that its exp() is 0.
BLOCKED = -1e30


def in_full_precision(rows: Tensor) -> Tensor:
    """Return the rows in fp32, or in fp64 if they are fp64 already."""
    return rows if rows.dtype == torch.float64 else rows.float()


def on_common_support(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets of rows `[n v]` in full precision, with a column that is −inf on either side blocked on both.

    A column that one of the models cannot predict is not compared: the rest of the row is renormalised. On a CPU the
    rows are copied only if something is blocked. On an accelerator they always are, as a test would synchronise.

    >>> s, t = on_common_support(torch.tensor([[1.0, -torch.inf]]), torch.tensor([[0.0, 5.0]]))
    >>> s.softmax(-1).tolist(), t.softmax(-1).tolist()
    ([[1.0, 0.0]], [[1.0, 0.0]])
    """
    student, teacher = in_full_precision(student), in_full_precision(teacher)
    if student.numel() == 0:
        return student, teacher
    if student.device.type == "cpu" and all(rows.detach().amin() > -torch.inf for rows in (student, teacher)):
        return student, teacher
    blocked = (student == -torch.inf) | (teacher == -torch.inf)
    return student.masked_fill(blocked, BLOCKED), teacher.masked_fill(blocked, BLOCKED)


def is_live(rows: Tensor) -> Tensor:
    """Return which columns of rows from `on_common_support` are not blocked."""
    return rows.detach() > BLOCKED / 2
