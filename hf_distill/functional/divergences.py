"""Divergences between student and teacher rows, one number a row.

Rows are unnormalised logits `[n v]`, already divided by the temperature. The result is `[n]`, not multiplied by any
power of the temperature. Everything is computed in fp32 (fp64 for fp64 rows). Columns that are −inf on either side are
left out on both. In formulas p is the teacher's distribution and q the student's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.functional.properties import DivergenceProperties, catalogued, check_within
from hf_distill.functional.rows import BLOCKED, in_full_precision, is_live, on_common_support


@catalogued(DivergenceProperties(paper="hinton2015distilling", formula="KL(p ‖ q)"))
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p ‖ q): the student must cover everything that the teacher finds likely.

    Same gradient as the cross-entropy of Hinton et al. 2015 (section 2), but 0 at equality.

    >>> rows = torch.tensor([[2.0, 0.0]])
    >>> forward_kl(rows, rows).item()
    0.0
    """
    q, p = _log_probabilities(student, teacher)
    return _kl(p, q)


@catalogued(DivergenceProperties(paper="gu2024minillm", formula="KL(q ‖ p)"))
def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q ‖ p): the student must avoid everything that the teacher finds unlikely (mode-seeking).

    Gu et al. 2024 (section 2.1) estimate it from sampled sequences; here it is exact for each row.

    >>> reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
    0.0
    """
    q, p = _log_probabilities(student, teacher)
    return _kl(q, p)


@catalogued(DivergenceProperties(paper="liang2021rdrop", formula="KL(p ‖ q) + KL(q ‖ p)"))
def jeffreys(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p), which is symmetric (Jeffreys 1946).

    Twice the divergence of Liang et al. 2021 (section 2), who take the mean of the two directions and let the gradient
    flow into both sides; here it flows into the student's side alone.

    >>> first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> jeffreys(first, second).item() == jeffreys(second, first).item()
    True
    """
    q, p = _log_probabilities(student, teacher)
    return _kl(p, q) + _kl(q, p)


@catalogued(
    DivergenceProperties(
        paper="agarwal2024onpolicy", formula="β KL(p ‖ m) + (1 - β) KL(q ‖ m), where m = β p + (1 - β) q"
    )
)
def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float = 0.5) -> Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q.

    Agarwal et al. 2024 (section 2, equation 1). At β = 0 and β = 1 the formula is identically 0, so its rescaled limits
    are used: forward and reverse KL. At β = 0.5 it is at most log 2, so it weighs less than a KL at the same alpha.

    Raises:
        SettingError: if beta is outside [0, 1].

    >>> far = jensen_shannon(torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]]))
    >>> round(far.item(), 4) == round(math.log(2), 4)
    True
    """
    check_within("beta", beta, "[0, 1]")
    q, p = _log_probabilities(student, teacher)
    if beta == 0.0:
        return _kl(p, q)
    if beta == 1.0:
        return _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


@catalogued(DivergenceProperties(paper="ko2024distillm", formula="KL(p ‖ skew p + (1 - skew) q)"))
def skewed_forward_kl(student: Tensor, teacher: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(p ‖ skew · p + (1 − skew) · q): a forward KL that stays finite where q vanishes.

    Ko et al. 2024 (section 3.1, α-SKL).

    Raises:
        SettingError: if skew is outside [0, 1).

    >>> skewed_forward_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
    0.0
    """
    check_within("skew", skew, "[0, 1)")
    q, p = _log_probabilities(student, teacher)
    return _kl(p, _mixture(p, q, skew))


@catalogued(DivergenceProperties(paper="ko2024distillm", formula="KL(q ‖ skew q + (1 - skew) p)"))
def skewed_reverse_kl(student: Tensor, teacher: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL(q ‖ skew · q + (1 − skew) · p): a reverse KL that stays finite where p vanishes.

    Ko et al. 2024 (section 3.1, α-SRKL).

    Raises:
        SettingError: if skew is outside [0, 1).

    >>> skewed_reverse_kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
    0.0
    """
    check_within("skew", skew, "[0, 1)")
    q, p = _log_probabilities(student, teacher)
    return _kl(q, _mixture(q, p, skew))


@catalogued(
    DivergenceProperties(paper="wen2023fdivergence", formula="half the L1 distance of p and q", temperature_power=1)
)
def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the L1 distance of the two distributions: 0 when equal, 1 when disjoint.

    Wen et al. 2023 (section 3). First order in the difference of the logits, so its gradient scales with T, not T².

    >>> total_variation(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])).item()
    1.0
    """
    student, teacher = on_common_support(student, teacher)
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


@catalogued(
    DivergenceProperties(
        paper="ba2014deep",
        formula="the mean squared difference of the raw outputs",
        temperature_power=0,
        softens=False,
        on_values=True,
    )
)
def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the columns of the squared difference of raw logits, or of values. No temperature.

    Ba and Caruana 2014 (section 2.2). Kim et al. 2021 (section 3) show that it is the limit of the KL for T → ∞ on
    centred logits. Blocked columns count neither in the sum nor in the number of columns.

    >>> mean_squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).item()
    2.0
    """
    student, teacher = on_common_support(student, teacher)
    squared = (student - teacher).square()  # a blocked column has the same number on both sides: 0
    columns = is_live(student).sum(-1).clamp(min=1)
    return squared.sum(-1) / columns


@catalogued(
    DivergenceProperties(
        paper="huang2022dist",
        formula="1 - Pearson correlation of p and q, along rows and columns",
        temperature_power=0,
        couples_rows=True,
    )
)
def dist(student: Tensor, teacher: Tensor, *, inter_weight: float = 1.0, intra_weight: float = 1.0) -> Tensor:
    """1 − Pearson correlation of the probabilities, within each row (inter) and down each column (intra).

    Huang et al. 2022 (section 3, equations 6–10). The intra part compares a class over the rows of the micro-batch, so
    it depends on the division into micro-batches; with `intra_weight=0` rows are independent, and accumulation and
    several processes change nothing. A correlation is invariant to scale, so no power of T belongs in front (the
    reference code multiplies by T², which makes the gradient grow with T). Two columns always correlate at ±1: only
    the intra part trains a head with two labels, or with independent labels.

    Raises:
        SettingError: if a weight is below 0.

    >>> rows = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> dist(rows, rows).abs().max().item() < 1e-6
    True
    """
    check_within("inter_weight", inter_weight, "[0, inf)")
    check_within("intra_weight", intra_weight, "[0, inf)")
    student, teacher = on_common_support(student, teacher)
    q, p, live = student.softmax(-1), teacher.softmax(-1), is_live(student)
    inter = 1 - _pearson(q, p, live)  # [n]
    compared = live.sum(0) > 1  # [v]: a single row has no correlation down a column
    if intra_weight == 0 or q.shape[0] < 2:
        return inter_weight * inter
    down = (1 - _pearson(q.T, p.T, live.T)) * compared
    intra = down.sum() / compared.sum().clamp(min=1)  # one number for the batch, added to every row
    return inter_weight * inter + intra_weight * intra


@catalogued(
    DivergenceProperties(
        paper="touvron2021deit", formula="-log q(argmax p)", temperature_power=0, softens=False, zero_at_equality=False
    )
)
def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """−log q(argmax p): the teacher's most likely class used as a label. No temperature.

    Touvron et al. 2021 (section 4, hard-label distillation). As a cross-entropy it is 0 only if the student is certain
    of the teacher's class, so it is not 0 at equality unless the teacher is one-hot. A NaN in a teacher row gives NaN.

    >>> round(hard(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.6931
    """
    student, teacher = on_common_support(student, teacher)
    chosen = student.log_softmax(-1).gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)
    return -chosen + 0 * teacher.amax(-1)  # argmax would hide a NaN or +inf


@catalogued(
    DivergenceProperties(
        paper="zhao2022decoupled",
        formula="target_weight KL(target or not) + others_weight KL(among the others), both p ‖ q",
        wants_target=True,
    )
)
def decoupled(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
) -> Tensor:
    """target_weight · KL of (target, all others) + others_weight · KL among the others; both forward, p ‖ q.

    Zhao et al. 2022 (section 3.2, equation 9; α and β there). With target_weight 1 and others_weight equal to the
    teacher's 1 − p(target) it is the forward KL. Where the label is unknown, the teacher's most likely class is the
    target (the paper always has labels).

    Args:
        student: `[n v]` logits / T.
        teacher: `[n v]` logits / T.
        target: `[n]` class of each row, -100 where unknown; None means unknown everywhere.
        target_weight: weight of the first part.
        others_weight: weight of the second part.

    Raises:
        SettingError: if a weight is below 0.

    >>> rows = torch.tensor([[2.0, 0.0, 1.0]])
    >>> decoupled(rows, rows, torch.tensor([0])).item()
    0.0
    """
    check_within("target_weight", target_weight, "[0, inf)")
    check_within("others_weight", others_weight, "[0, inf)")
    student, teacher = on_common_support(student, teacher)
    likely = teacher.argmax(-1)
    target = likely if target is None else torch.where(target < 0, likely, target)
    is_target = F.one_hot(target, student.shape[-1]).bool()
    q_others = student.masked_fill(is_target, BLOCKED).log_softmax(-1)
    p_others = teacher.masked_fill(is_target, BLOCKED).log_softmax(-1)
    target_or_not = _kl(_target_or_not(teacher, is_target), _target_or_not(student, is_target))
    return target_weight * target_or_not + others_weight * _kl(p_others, q_others)


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_i |q_(i) − p_(i)| over the sorted probabilities of each row, the shorter row padded with zeros.

    Boizard et al. 2024 (Universal Logit Distillation, section 3): the Wasserstein-1 distance of the two distributions
    if moving probability costs the same between any two tokens, minimised over all renamings of the tokens. In [0, 2];
    0 if one row is a permutation of the other. Where two sorted probabilities are equal the gradient is 0.

    Args:
        student: `[n v]` logits.
        teacher: `[n w]` logits; w and v may differ.

    Returns:
        `[n]`. Memory: a few times `[n v]`.

    >>> student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(sorted_distance(student, teacher).item(), 6)  # |0.5 - 0.75| + |0.25 - 0.25| + |0.25 - 0|
    0.5
    """
    # Sorting before the softmax gives permuted rows the same sum, to the last bit.
    q, p = (
        in_full_precision(rows).sort(dim=-1, descending=True, stable=True).values.softmax(-1)
        for rows in (student, teacher)
    )
    wider = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(rows, (0, wider - rows.shape[-1])) for rows in (q, p))
    return (q - p).abs().sum(-1)


def _log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = on_common_support(student, teacher)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _kl(target: Tensor, other: Tensor) -> Tensor:
    """KL(target ‖ other) `[n]` of log-probabilities `[n v]`."""
    return F.kl_div(other, target, reduction="none", log_target=True).sum(-1)


def _mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """log(weight · e^first + (1 − weight) · e^second)."""
    if weight == 0.0:
        return second
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))


def _pearson(x: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """Correlation along the last axis over the live columns; 0 if a side is constant."""
    count = live.sum(-1, keepdim=True).clamp(min=1)
    x, y = ((side - (side * live).sum(-1, keepdim=True) / count) * live for side in (x, y))
    return F.cosine_similarity(x, y, dim=-1, eps=1e-12)


def _target_or_not(rows: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities `[n 2]` of the target and of everything else."""
    log_p = rows.log_softmax(-1)
    target = log_p.masked_fill(~is_target, 0.0).sum(-1)
    others = log_p.masked_fill(is_target, BLOCKED).logsumexp(-1)
    return torch.stack((target, others), -1).clamp(min=BLOCKED)
