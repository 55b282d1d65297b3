"""Rows of which only some columns are known: they become k + 1 outcomes, the last of which is all other columns.

Any f-divergence of the k + 1 outcomes is at most that of all columns, and the student's own preferences within the
tail are left alone: its gradient moves the tail only as a whole. Axes: n rows, v columns, k listed columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.functional.rows import BLOCKED, in_full_precision

# Sums over outcomes of a function of both probabilities; others read columns one by one, or raw logits.
ON_OUTCOMES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)


def bucketed(rows: Tensor, ids: Tensor) -> Tensor:
    """Logits of all columns → logits of the listed ones and of the bucket: the same probabilities, merged.

    Args:
        rows: `[n v]`, already divided by the temperature. ids: `[n k]`, each column at most once a row; -1: none.

    Returns:
        `[n k+1]`: -inf where none is listed, and for the bucket where no column is left for it.

    >>> rows = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    >>> [round(p, 4) for p in bucketed(rows, torch.tensor([[3, 1]])).exp()[0].tolist()]
    [0.4, 0.2, 0.4]
    """
    rows = in_full_precision(rows)
    none = ids < 0
    known = rows.gather(-1, ids.clamp(min=0)).masked_fill(none, -torch.inf)
    # An id of -1 marks a column that does not exist, so that no real one is taken out of the tail for it.
    width = rows.shape[-1]
    in_tail = torch.ones(*rows.shape[:-1], width + 1, dtype=torch.bool, device=rows.device)
    in_tail = in_tail.scatter(-1, ids.masked_fill(none, width), False)[..., :width] & (rows > -torch.inf)
    tail = rows.masked_fill(~in_tail, BLOCKED).logsumexp(-1)  # finite, or an empty tail would make gradients NaN
    tail = torch.where(in_tail.any(-1), tail, -torch.inf)
    return torch.cat((known, tail[..., None]), -1)


def outcomes(log_probabilities: Tensor, log_tail: Tensor) -> Tensor:
    """`[n k]` and `[n]` → `[n k+1]`, in the order of `bucketed`."""
    return in_full_precision(torch.cat((log_probabilities, log_tail[..., None]), -1))
