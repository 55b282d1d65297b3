"""Teacher rows of which only some columns are known: either k listed columns and a bucket for all others, or samples.

An f-divergence of the k + 1 outcomes is at most that of all columns. The student's preferences within the bucket are
left alone: its gradient moves the bucket only as a whole. Weighted samples estimate all columns, in expectation.
Axes: n rows, v columns, k listed columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.functional.rows import BLOCKED, in_full_precision

# Sums over outcomes of a function of both probabilities. Other divergences read single columns, or raw logits.
OUTCOME_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)
# Linear in the teacher's probabilities, so that unbiased estimates of these give an unbiased value and gradient.
SAMPLE_DIVERGENCES = ("forward_kl",)


def student_outcomes(rows: Tensor, ids: Tensor) -> Tensor:
    """Merge logits of all columns into logits of the listed columns and of the bucket.

    Args:
        rows: `[n v]` logits, already divided by the temperature.
        ids: `[n k]` listed columns, each at most once a row; -1 fills rows that list fewer.

    Returns:
        `[n k+1]` logits; -inf for an id of -1, and for a bucket without columns.

    >>> rows = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    >>> [round(p, 4) for p in student_outcomes(rows, torch.tensor([[3, 1]])).exp()[0].tolist()]
    [0.4, 0.2, 0.4]
    """
    listed, rest = _ListedColumns.apply(in_full_precision(rows), ids, True)
    return torch.cat((listed, rest[..., None]), -1)


def teacher_outcomes(log_probabilities: Tensor, log_tail: Tensor) -> Tensor:
    """Join log-probabilities `[n k]` of listed columns and `[n]` of the bucket into `[n k+1]`."""
    return in_full_precision(torch.cat((log_probabilities, log_tail[..., None]), -1))


def sampled_forward_kl(rows: Tensor, ids: Tensor, log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k (log p_k − log q_k) with q over all columns: forward KL estimated from weighted samples of the teacher.

    If the expectation of the weights is p, the value and its gradient at the rows are unbiased for those of KL(p ‖ q).
    The value of one draw may be negative; at q = p it is 0 but its gradient is not. Anshumann et al. 2025 (Sparse
    Logit Sampling); subtracting log p makes the value that of a divergence.

    Args:
        rows: `[n v]` logits, already divided by the temperature.
        ids: `[n k]` sampled columns; -1 fills rows that list fewer.
        log_probabilities: `[n k]` log p of the sampled columns.
        weights: `[n k]` weights; samples of columns that the student blocks (−inf) are left out.

    Returns:
        `[n]`.

    >>> rows = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> ids = torch.tensor([[0, 2]])
    >>> value = sampled_forward_kl(rows, ids, torch.tensor([[0.8, 0.1]]).log(), torch.tensor([[0.75, 0.25]]))
    >>> round(value.item(), 4)
    0.1234
    """
    listed, total = _ListedColumns.apply(in_full_precision(rows), ids, False)
    known = listed > -torch.inf
    difference = torch.where(known, in_full_precision(log_probabilities) - listed, 0.0)
    return (torch.where(known, in_full_precision(weights), 0.0) * (difference + total[..., None])).sum(-1)


class _ListedColumns(torch.autograd.Function):
    """Listed columns `[n k]` (-inf for id -1), and the logsumexp `[n]` of all columns, or of all others.

    A function of its own because autograd would write the gradient of a row five times; here it is written once.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, others_only: bool) -> tuple[Tensor, Tensor]:
        missing = ids < 0
        listed = rows.gather(-1, ids.clamp(min=0)).masked_fill(missing, -torch.inf)
        summed = rows
        if others_only:  # the additional last column is where ids of -1 are scattered to
            width = rows.shape[-1]
            summed = rows.new_empty((*rows.shape[:-1], width + 1))
            summed[..., :width], summed[..., width] = rows, BLOCKED
            summed.scatter_(-1, ids.masked_fill(missing, width), BLOCKED)
        total = summed.logsumexp(-1)
        empty = total <= BLOCKED / 2  # no column that the row can predict is left
        ctx.others_only = others_only
        ctx.save_for_backward(summed, ids, listed, total, empty)
        return listed, total.masked_fill(empty, -torch.inf)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_listed: Tensor, grad_total: Tensor) -> tuple[Tensor, None, None]:
        summed, ids, listed, total, empty = ctx.saved_tensors
        gradient = (summed - total[..., None]).exp_().mul_(grad_total.masked_fill(empty, 0.0)[..., None])
        grad_listed = grad_listed.masked_fill(listed == -torch.inf, 0.0)
        gradient = gradient.scatter_add_(-1, ids.clamp(min=0), grad_listed)
        return gradient[..., : summed.shape[-1] - 1] if ctx.others_only else gradient, None, None


BLOCK = 128  # columns searched for each draw
_TINY = 1e-300
_BELOW_ONE = 1 - 2.0**-40  # keeps the rounding of a product from reaching the end of a row


def draw_columns(weights: Tensor, uniforms: Tensor, *, stratified: bool = True) -> Tensor:
    """Draw k columns of each row in proportion to their weights, with replacement.

    Each column is drawn k times its share on average. If stratified, draw j comes from the j-th of k equal parts of the
    row's total: a column that fills whole parts is drawn in each of them, and no estimate varies more than with
    independent draws (Cochran 1977, Sampling Techniques, chapter 5).

    Args:
        weights: `[n v]` weights, none negative.
        uniforms: `[n k]` float64 numbers in [0, 1); float32 is too coarse for long rows.
        stratified: whether to draw from k equal parts.

    Returns:
        `[n k]` int64 columns, ascending, with repetitions. A row without any weight gives its last column.

    >>> draw_columns(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([[0.9, 0.1, 0.3, 0.8]]).double()).tolist()
    [[0, 0, 2, 3]]
    """
    count, width = uniforms.shape[-1], weights.shape[-1]
    if stratified:
        at = (torch.arange(count, dtype=uniforms.dtype, device=uniforms.device) + uniforms) / count
    else:
        at = uniforms.sort(-1).values
    # First choose a block of columns by the sums of blocks, then a column within it: all columns are read only once.
    blocks = F.pad(weights, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).double()
    up_to = sums.cumsum(-1)
    at = at.clamp(max=_BELOW_ONE) * up_to[..., -1:]
    chosen = torch.searchsorted(up_to, at, right=True).clamp(max=sums.shape[-1] - 1)
    size = sums.gather(-1, chosen)
    share = ((at - up_to.gather(-1, chosen) + size) / size.clamp(min=_TINY)).clamp(0, _BELOW_ONE)
    within = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).cumsum(-1, dtype=torch.float64)
    column = torch.searchsorted(within, share[..., None] * within[..., -1:], right=True)[..., 0]
    return (chosen * BLOCK + column.clamp(max=BLOCK - 1)).clamp(max=width - 1)


def merge_repeats(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Merge repeated columns of ascending `ids [... k]`, adding up their `weights [... k]`.

    Returns:
        Both `[... k]`: the distinct columns first, then -1 with weight 0.

    >>> ids, weights = merge_repeats(torch.tensor([[4, 4, 7, 9]]), torch.tensor([[0.25, 0.25, 0.25, 0.25]]))
    >>> ids.tolist(), weights.tolist()
    ([[4, 7, 9, -1]], [[0.5, 0.25, 0.25, 0.0]])
    """
    changes = torch.ones_like(ids, dtype=torch.bool)
    changes[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = changes.cumsum(-1) - 1
    return torch.full_like(ids, -1).scatter(-1, place, ids), torch.zeros_like(weights).scatter_add(-1, place, weights)
