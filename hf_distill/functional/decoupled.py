"""Decoupled distillation (DKD): the target class and the other classes, weighed apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.errors import SettingError
from hf_distill.functional.properties import DivergenceProperties, catalogued
from hf_distill.functional.rows import BLOCKED, on_common_support


@catalogued(DivergenceProperties(paper="Zhao et al. 2022, DKD, section 3", wants_target=True))
def decoupled(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
) -> Tensor:
    """target_weight · KL of (target, all others) + others_weight · KL among the others; forward, p ‖ q.

    Zhao et al. 2022 (section 3.2, equation 9; α and β there). With target_weight 1 and others_weight equal to the
    teacher's 1 − p(target) it is the forward KL. Where no label is known, the teacher's most likely class
    is the target (the paper always has labels).

    Args:
        student: `[n v]` logits / T. teacher: `[n v]` logits / T.
        target: `[n]` class of each row, -100 where unknown; None: unknown everywhere.

    Raises:
        SettingError: a weight below 0.

    >>> rows = torch.tensor([[2.0, 0.0, 1.0]])
    >>> decoupled(rows, rows, torch.tensor([0])).item()
    0.0
    """
    for knob, value in (("target_weight", target_weight), ("others_weight", others_weight)):
        if not 0 <= value < math.inf:
            raise SettingError(f"{knob}={value}: must lie in [0, inf).")
    student, teacher = on_common_support(student, teacher)
    likely = teacher.argmax(-1)
    target = likely if target is None else torch.where(target < 0, likely, target)
    is_target = F.one_hot(target, student.shape[-1]).bool()
    q_binary, p_binary = _target_or_not(student, is_target), _target_or_not(teacher, is_target)
    q_others = student.masked_fill(is_target, BLOCKED).log_softmax(-1)
    p_others = teacher.masked_fill(is_target, BLOCKED).log_softmax(-1)
    among_others = F.kl_div(q_others, p_others, reduction="none", log_target=True).sum(-1)
    target_or_not = F.kl_div(q_binary, p_binary, reduction="none", log_target=True).sum(-1)
    return target_weight * target_or_not + others_weight * among_others


def _target_or_not(rows: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities `[n 2]` of the target and of everything else."""
    log_p = rows.log_softmax(-1)
    target = log_p.masked_fill(~is_target, 0.0).sum(-1)
    others = log_p.masked_fill(is_target, BLOCKED).logsumexp(-1)
    return torch.stack((target, others), -1).clamp(min=BLOCKED)
