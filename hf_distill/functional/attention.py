"""Distances of two sets of attention scores, one number a query; where the scores come from is no business of it.

Scores are raw, before the softmax and after the division by √d: `[b h t s]`, with t queries and s keys. `keys` says
which pairs may attend in both models. What lies under the other pairs (−inf, NaN, anything) is never read. Computed in
fp32 (fp64 for fp64 scores); the result is `[b t]`, 0 for a query without an allowed key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.errors import SettingError
from hf_distill.functional.rows import BLOCKED, in_full_precision


def score_distance(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
    """Mean over the heads of the mean over allowed keys of the squared difference of scores.

    Jiao et al. 2020 (TinyBERT, section 3.1, equation 7), who average over padded pairs too. Adding a number to all
    scores of a query changes this but not the attention: prefer `attention_kl` where that matters.

    Args:
        student: `[b h t s]` scores. teacher: `[b h t s]` scores, with as many heads (see `map_heads`).
        keys: `[b 1 t s]` or `[b h t s]` bool, true where both models may attend.

    Raises:
        SettingError: shapes that do not fit; the message says how to pair unequal heads.

    >>> scores = torch.tensor([[[[1.0, 2.0], [3.0, torch.nan]]]])
    >>> score_distance(scores, scores + 2, torch.tensor([[[[True, True], [True, False]]]])).tolist()
    [[4.0, 4.0]]
    """
    student, teacher = _allowed(student, teacher, keys, fill=0.0)
    squared = (student - teacher).square().sum(-1)
    return (squared / keys.sum(-1).clamp(min=1)).mean(1)


def attention_kl(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
    """Mean over the heads of KL(teacher's attention ‖ student's attention), both over allowed keys alone.

    Wang et al. 2020 (MiniLM, section 3.1). Attention is the softmax of the scores over the allowed keys, so a key
    that one of the models may not attend to is left out on both sides.

    Args:
        student: `[b h t s]` scores. teacher: `[b h t s]` scores, with as many heads (see `map_heads`).
        keys: `[b 1 t s]` or `[b h t s]` bool, true where both models may attend.

    Raises:
        SettingError: shapes that do not fit; the message says how to pair unequal heads.

    >>> scores = torch.tensor([[[[1.0, 2.0, torch.nan]]]])
    >>> attention_kl(scores, scores + 2, torch.tensor([[[[True, True, False]]]])).tolist()
    [[0.0]]
    """
    student, teacher = _allowed(student, teacher, keys, fill=BLOCKED)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean(1)


def map_heads(scores: Tensor, heads: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """The teacher's scores as the student's heads are to see them: one head picked, or several averaged, for each.

    The mean of raw scores is, after the softmax, the normalised geometric mean of the heads' attentions.

    Args:
        scores: `[b h t s]` of the teacher.
        heads: for each head of the student, the index of a teacher's head, or a list of them. Counted from 0.

    Raises:
        SettingError: no heads, or an index that is no head of the teacher.

    >>> scores = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    >>> map_heads(scores, [2, 0]).flatten().tolist(), map_heads(scores, [[0, 2], [1]]).flatten().tolist()
    ([4.0, 1.0], [2.5, 2.0])
    """
    groups = [[one] if isinstance(one, int) else list(one) for one in heads]
    there = scores.shape[1]
    if not groups or not all(groups):
        raise SettingError(f"heads={list(heads)}: name at least one teacher head for each student head.")
    if wrong := sorted({head for group in groups for head in group if not 0 <= head < there}):
        raise SettingError(
            f"heads={list(heads)}: the teacher has {there} heads, 0 to {there - 1}; there is no {wrong}."
        )
    if all(len(group) == 1 for group in groups):
        return _select(scores, [group[0] for group in groups])
    averaged = [in_full_precision(_select(scores, group)).mean(1) for group in groups]
    return torch.stack(averaged, 1)


def _select(scores: Tensor, heads: list[int]) -> Tensor:
    return scores.index_select(1, torch.tensor(heads, device=scores.device))


def _allowed(student: Tensor, teacher: Tensor, keys: Tensor, *, fill: float) -> tuple[Tensor, Tensor]:
    """Both in full precision, with `fill` in place of what may not be read: filled first, as 0 · NaN is NaN."""
    if student.ndim == teacher.ndim == 4 and student.shape[1] != teacher.shape[1]:
        raise SettingError(
            f"the student has {student.shape[1]} attention heads, the teacher {teacher.shape[1]}. Say which teacher "
            "head each student head learns from (map_heads), or compare relations, which need no equal heads."
        )
    shape = tuple(student.shape)
    if len(shape) != 4 or teacher.shape != shape or tuple(keys.shape) not in (shape, (shape[0], 1, *shape[2:])):
        raise SettingError(
            f"student scores are {list(shape)}, teacher scores {list(teacher.shape)}, keys {list(keys.shape)}: scores "
            "must have one shape [b h t s], and keys [b 1 t s] or [b h t s]."
        )
    student, teacher = in_full_precision(student), in_full_precision(teacher)
    return student.masked_fill(~keys, fill), teacher.masked_fill(~keys, fill)
