"""The distribution over classes that best fits predictions of single classes and of groups of classes."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE, _MAX_STEPS = 1e-12, 2000


def fit_class_distribution(log_single: Tensor, log_rest: Tensor, members: Tensor) -> Tensor:
    """The log of the distribution q that minimises `- Σ_c single_c log q_c - Σ_m rest_m log Σ_{c not in m} q_c`.

    Hinton et al. 2015, section 5.4, equation 5: `KL(p_g, q) + Σ_m KL(p_m, q)` up to a constant, where each specialist m
    is compared on its own classes and on all others together (its dustbin). They find q by gradient descent on logits.
    Here the objective is treated as the log-likelihood of counts, some of which are known by group only, and maximised
    by expectation maximisation, which needs no step size:

        q_c ← (single_c + q_c Σ_{m without c} rest_m / Σ_{c' not in m} q_c') / N,   N = the sum of all counts

    The problem is convex in q, and fixed points satisfy its Karush-Kuhn-Tucker conditions. Classes that belong to the
    same sets keep their proportions in `single`, so the iteration runs on one number for each kind of class. With one
    specialist the first step is exact. Only positive numbers are added, so nothing cancels. Computed in float64 if the
    device supports it.

    Args:
        log_single: `[n v]` log of each class's own probability, summed over the models; -inf if none predicts it.
        log_rest: `[n m]` log of the probability in each dustbin; -inf where a specialist is not used.
        members: `[m v]` bool, the classes of each specialist.

    Returns:
        `[n v]`, in the dtype of `log_single`.

    >>> single = torch.tensor([[0.6 + 0.5, 0.2 + 0.3, 0.1, 0.1]])  # a generalist, and a specialist for two classes
    >>> members = torch.tensor([[True, True, False, False]])
    >>> q = fit_class_distribution(single.log(), torch.tensor([[0.2]]).log(), members)
    >>> [round(x, 4) for x in q.exp()[0].tolist()]
    [0.55, 0.25, 0.1, 0.1]
    """
    dtype = torch.float32 if log_single.device.type == "mps" else torch.float64
    patterns, kind = torch.unique(members.T, dim=0, return_inverse=True)  # [j m], [v]
    outside = (~patterns).to(dtype)
    log_counts = log_single.to(dtype)
    # A kind of class that no model predicts keeps a negligible count, so that no sum is 0.
    counts = torch.zeros(len(log_single), len(patterns), dtype=dtype, device=log_single.device)
    counts = counts.index_add(1, kind, log_counts.exp()).clamp(min=1e-250 if dtype == torch.float64 else 1e-30)  # [n j]
    rest = log_rest.to(dtype).exp()  # [n m]
    total = counts.sum(-1, keepdim=True) + rest.sum(-1, keepdim=True)
    mass = counts / counts.sum(-1, keepdim=True)
    for _ in range(_MAX_STEPS):
        before = mass
        mass = (counts + mass * ((rest / (mass @ outside)) @ outside.T)) / total
        if not bool(((mass - before).abs() > _TOLERANCE * mass).any()):  # this comparison also ends with NaN
            break
    return (log_counts + (mass.log() - counts.log())[:, kind]).to(log_single.dtype)
