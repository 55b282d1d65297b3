"""Rows of which only some columns are known: k + 1 outcomes, the last of which is all others; or weighted samples.

Any f-divergence of the k + 1 outcomes is at most that of all columns, and the student's own preferences within the
tail are left alone: its gradient moves the tail only as a whole. Weighted samples say something of every column, in
expectation. Axes: n rows, v columns, k listed columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_distill.functional.rows import BLOCKED, in_full_precision

# Sums over outcomes of a function of both probabilities; others read columns one by one, or raw logits.
ON_OUTCOMES = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)
# Linear in the teacher's probabilities: of an unbiased estimate of these, an unbiased value and gradient.
ON_SAMPLES = ("forward_kl",)


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
    known, rest = _Listed.apply(in_full_precision(rows), ids, True)
    return torch.cat((known, rest[..., None]), -1)


def outcomes(log_probabilities: Tensor, log_tail: Tensor) -> Tensor:
    """`[n k]` and `[n]` → `[n k+1]`, in the order of `bucketed`."""
    return in_full_precision(torch.cat((log_probabilities, log_tail[..., None]), -1))


def sampled_forward_kl(rows: Tensor, ids: Tensor, log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k (log p_k − log q_k), q over all columns: forward KL of a teacher of whom weighted samples are known.

    With weights whose expectation is p, value and gradient in the rows are unbiased for those of KL(p ‖ q). One draw
    may be below 0, and at q = p its value is 0 but its gradient is not. The method is that of
    Anshumann et al. 2025, Sparse Logit Sampling; log p is taken off so that the value is a divergence's.

    Args:
        rows: `[n v]`, already divided by the temperature. ids: `[n k]`; -1: none.
        log_probabilities, weights: `[n k]`. Of columns that the student blocks (-inf) nothing is asked.

    Returns:
        `[n]`.

    >>> rows = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> kept = torch.tensor([[0, 2]])
    >>> value = sampled_forward_kl(rows, kept, torch.tensor([[0.8, 0.1]]).log(), torch.tensor([[0.75, 0.25]]))
    >>> round(value.item(), 4)
    0.1234
    """
    known, total = _Listed.apply(in_full_precision(rows), ids, False)
    listed = known > -torch.inf
    difference = torch.where(listed, in_full_precision(log_probabilities) - known, 0.0)
    return (torch.where(listed, in_full_precision(weights), 0.0) * (difference + total[..., None])).sum(-1)


class _Listed(torch.autograd.Function):
    """Listed columns `[n k]` (-inf where none is), and log of the sum of exp over the others, or over all, `[n]`.

    By itself because torch would write the gradient of a row five times: here it is written once.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, others: bool) -> tuple[Tensor, Tensor]:
        none = ids < 0
        known = rows.gather(-1, ids.clamp(min=0)).masked_fill(none, -torch.inf)
        summed = rows
        if others:  # with one column more, which stands for none
            width = rows.shape[-1]
            summed = rows.new_full((*rows.shape[:-1], width + 1), BLOCKED)
            summed[..., :width] = rows
            summed.scatter_(-1, ids.masked_fill(none, width), BLOCKED)
        total = summed.logsumexp(-1)
        empty = total <= BLOCKED / 2  # no column is left that the row can predict
        ctx.others = others
        ctx.save_for_backward(summed, ids, known, total, empty)
        return known, total.masked_fill(empty, -torch.inf)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_known: Tensor, of_total: Tensor) -> tuple[Tensor, None, None]:
        summed, ids, known, total, empty = ctx.saved_tensors
        gradient = (summed - total[..., None]).exp_().mul_(of_total.masked_fill(empty, 0.0)[..., None])
        of_known = of_known.masked_fill(known == -torch.inf, 0.0)
        gradient = gradient.scatter_add_(-1, ids.clamp(min=0), of_known)
        return gradient[..., : summed.shape[-1] - 1] if ctx.others else gradient, None, None
