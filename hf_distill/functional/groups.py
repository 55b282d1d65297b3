"""The distribution over classes that agrees best with what several models say of classes and of groups of classes.

Which models are asked, and what their columns mean, is the teacher's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENOUGH, _AT_MOST = 1e-12, 2000


def agreed_with_groups(log_told: Tensor, log_rest: Tensor, members: Tensor) -> Tensor:
    """The log of the distribution q that minimises `- Σ_c told_c log q_c - Σ_m rest_m log Σ_{c not in m} q_c`.

    Hinton et al. 2015, section 5.4, equation 5: `KL(p_g, q) + Σ_m KL(p_m, q)` but for a constant, where each specialist
    is compared on its classes and on all others together (its dustbin). There q is found by gradient descent on logits.
    Here: the objective is the log-likelihood of counts of which some are known by group only, so expectation
    maximisation climbs it without a step size:

        q_c ← (told_c + q_c Σ_{m without c} rest_m / Σ_{c' not in m} q_c') / N,   N = all that is told

    Its fixed points meet the conditions of Karush, Kuhn and Tucker of a problem that is convex in q. Classes that
    are in the same sets keep the proportions of `told`, so it runs on one number a kind of class. With one specialist
    the first step is exact. Sums of positive numbers alone: nothing cancels. In float64 where the device has it.

    Args:
        log_told: `[n v]` log of the sum of what all asked models say of each class by itself. -inf: nobody can.
        log_rest: `[n m]` log of each dustbin; -inf where a specialist is not asked.
        members: `[m v]` bool, the special classes.

    Returns:
        `[n v]`, in the dtype of `log_told`.

    >>> told = torch.tensor([[0.6 + 0.5, 0.2 + 0.3, 0.1, 0.1]])  # a generalist, and a specialist of the first two
    >>> q = agreed_with_groups(told.log(), torch.tensor([[0.2]]).log(), torch.tensor([[True, True, False, False]]))
    >>> [round(x, 4) for x in q.exp()[0].tolist()]
    [0.55, 0.25, 0.1, 0.1]
    """
    dtype = torch.float32 if log_told.device.type == "mps" else torch.float64
    patterns, kind = torch.unique(members.T, dim=0, return_inverse=True)  # [j m], [v]
    outside = (~patterns).to(dtype)
    told_of = log_told.to(dtype)
    # A kind of class of which nobody says anything keeps a number that nothing can see, so that no sum is 0.
    told = torch.zeros(len(log_told), len(patterns), dtype=dtype, device=log_told.device)
    told = told.index_add(1, kind, told_of.exp()).clamp(min=1e-250 if dtype == torch.float64 else 1e-30)  # [n j]
    rest = log_rest.to(dtype).exp()  # [n m]
    total = told.sum(-1, keepdim=True) + rest.sum(-1, keepdim=True)
    mass = told / told.sum(-1, keepdim=True)
    for _ in range(_AT_MOST):
        before = mass
        mass = (told + mass * ((rest / (mass @ outside)) @ outside.T)) / total
        if not bool(((mass - before).abs() > _ENOUGH * mass).any()):  # no number is larger than another: NaN ends too
            break
    return (told_of + (mass.log() - told.log())[:, kind]).to(log_told.dtype)
