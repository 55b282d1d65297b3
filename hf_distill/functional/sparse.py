"""Rows of which only some columns are known: k + 1 outcomes, the last of which is all others; or weighted samples.

Any f-divergence of the k + 1 outcomes is at most that of all columns, and the student's own preferences within the
tail are left alone: its gradient moves the tail only as a whole. Weighted samples say something of every column, in
expectation. Axes: n rows, v columns, k listed columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


BLOCK = 128  # columns; of each draw as many are looked at
_TINY = 1e-300
_BELOW_ONE = 1 - 2.0**-40  # so that no rounding of a product reaches the end of a row


def drawn(weights: Tensor, uniforms: Tensor, *, stratified: bool = True) -> Tensor:
    """`[n v]` weights, none negative, and `[n k]` numbers in [0, 1) → `[n k]` columns, ascending, with repetitions.

    Each column is drawn k · its share times on average, either way. Stratified, the j-th draw is from the j-th of k
    equal parts of the row's total: a column that fills whole parts is drawn in each for certain, and no estimate varies
    more than with independent draws (Cochran 1977, Sampling Techniques, chapter 5).

    Args:
        uniforms: float64, as float32 tells too few places of a long row apart.

    Returns:
        int64. A row without any weight gives its last column.

    >>> drawn(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([[0.9, 0.1, 0.3, 0.8]]).double()).tolist()
    [[0, 0, 2, 3]]
    """
    count, width = uniforms.shape[-1], weights.shape[-1]
    if stratified:
        at = (torch.arange(count, dtype=uniforms.dtype, device=uniforms.device) + uniforms) / count
    else:
        at = uniforms.sort(-1).values
    # First a block of columns, by the sums of blocks, then a column of it: all columns are read once, by a plain sum.
    blocks = F.pad(weights, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).double()
    up_to = sums.cumsum(-1)
    at = at.clamp(max=_BELOW_ONE) * up_to[..., -1:]
    chosen = torch.searchsorted(up_to, at, right=True).clamp(max=sums.shape[-1] - 1)
    size = sums.gather(-1, chosen)
    share = ((at - up_to.gather(-1, chosen) + size) / size.clamp(min=_TINY)).clamp(0, _BELOW_ONE)
    inside = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).cumsum(-1, dtype=torch.float64)
    column = torch.searchsorted(inside, share[..., None] * inside[..., -1:], right=True)[..., 0]
    return (chosen * BLOCK + column.clamp(max=BLOCK - 1)).clamp(max=width - 1)


def merged(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending columns `[... k]` with repetitions, and a weight each → each column once, with the sum of its weights.

    Returns:
        both `[... k]`: the different columns first, then -1 with weight 0.

    >>> ids, weights = merged(torch.tensor([[4, 4, 7, 9]]), torch.tensor([[0.25, 0.25, 0.25, 0.25]]))
    >>> ids.tolist(), weights.tolist()
    ([[4, 7, 9, -1]], [[0.5, 0.25, 0.25, 0.0]])
    """
    changes = torch.ones_like(ids, dtype=torch.bool)
    changes[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = changes.cumsum(-1) - 1
    return torch.full_like(ids, -1).scatter(-1, place, ids), torch.zeros_like(weights).scatter_add(-1, place, weights)
