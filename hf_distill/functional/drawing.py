"""Columns drawn from rows in proportion to their weights, and repeated draws put together. No generator is held here.

Axes: n rows, v columns, k draws.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
