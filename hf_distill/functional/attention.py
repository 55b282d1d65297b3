"""Distances between two sets of attention scores, one number a query.

Scores `[b h t s]` are raw: divided by √d, before the softmax, for t queries and s keys. `keys` marks the pairs of
query and key that may attend in both models. Scores of other pairs (−inf, NaN, anything) are never read. Everything is
computed in fp32 (fp64 for fp64 scores). The result is `[b t]`, 0 for a query without an allowed key.
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

    Jiao et al. 2020 (TinyBERT, section 3.1, equation 7), who average over padded pairs too. Adding a constant to all
    scores of a query changes this distance but not the attention; use `attention_kl` where that matters.

    Args:
        student: `[b h t s]` scores.
        teacher: `[b h t s]` scores, with the same number of heads (see `map_heads`).
        keys: `[b 1 t s]` or `[b h t s]` bool, true where both models may attend.

    Raises:
        SettingError: if the shapes do not fit; the message says how to pair unequal heads.

    >>> scores = torch.tensor([[[[1.0, 2.0], [3.0, torch.nan]]]])
    >>> score_distance(scores, scores + 2, torch.tensor([[[[True, True], [True, False]]]])).tolist()
    [[4.0, 4.0]]
    """
    student, teacher = _allowed(student, teacher, keys, fill=0.0)
    squared = (student - teacher).square().sum(-1)
    return (squared / keys.sum(-1).clamp(min=1)).mean(1)


def attention_kl(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
    """Mean over the heads of KL(teacher's attention ‖ student's attention), each the softmax over the allowed keys.

    Wang et al. 2020 (MiniLM, section 3.1). Arguments and errors are those of `score_distance`.

    >>> scores = torch.tensor([[[[1.0, 2.0, torch.nan]]]])
    >>> attention_kl(scores, scores + 2, torch.tensor([[[[True, True, False]]]])).tolist()
    [[0.0]]
    """
    student, teacher = _allowed(student, teacher, keys, fill=BLOCKED)
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean(1)


def map_heads(scores: Tensor, heads: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """Select a teacher head for each student head, or average several.

    The mean of raw scores is, after the softmax, the normalised geometric mean of the heads' attentions.

    Args:
        scores: `[b h t s]` scores of the teacher.
        heads: for each student head the index of a teacher head, or a list of indices, counted from 0.

    Raises:
        SettingError: if heads are missing, or an index is out of range.

    >>> scores = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    >>> map_heads(scores, [2, 0]).flatten().tolist(), map_heads(scores, [[0, 2], [1]]).flatten().tolist()
    ([4.0, 1.0], [2.5, 2.0])
    """
    groups = [[group] if isinstance(group, int) else list(group) for group in heads]
    count = scores.shape[1]
    if not groups or not all(groups):
        raise SettingError(f"heads={list(heads)}: name at least one teacher head for each student head.")
    if wrong := sorted({head for group in groups for head in group if not 0 <= head < count}):
        raise SettingError(f"heads={list(heads)}: the teacher's {count} heads are 0 to {count - 1}, not {wrong}.")
    if all(len(group) == 1 for group in groups):
        return _select(scores, [group[0] for group in groups])
    averaged = [in_full_precision(_select(scores, group)).mean(1) for group in groups]
    return torch.stack(averaged, 1)


def _select(scores: Tensor, heads: list[int]) -> Tensor:
    return scores.index_select(1, torch.tensor(heads, device=scores.device))


def _allowed(student: Tensor, teacher: Tensor, keys: Tensor, *, fill: float) -> tuple[Tensor, Tensor]:
    """Both sides in full precision with the scores of forbidden pairs replaced, as 0 · NaN would be NaN."""
    if student.ndim == teacher.ndim == 4 and student.shape[1] != teacher.shape[1]:
        raise SettingError(
            f"the student has {student.shape[1]} attention heads, the teacher {teacher.shape[1]}. Say which teacher "
            "head each student head learns from (map_heads), or compare relations, which do not need equal heads."
        )
    shape = tuple(student.shape)
    if len(shape) != 4 or teacher.shape != shape or tuple(keys.shape) not in (shape, (shape[0], 1, *shape[2:])):
        raise SettingError(
            f"student scores are {list(shape)}, teacher scores {list(teacher.shape)}, keys {list(keys.shape)}: scores "
            "must have one shape [b h t s], and keys [b 1 t s] or [b h t s]."
        )
    student, teacher = in_full_precision(student), in_full_precision(teacher)
    return student.masked_fill(~keys, fill), teacher.masked_fill(~keys, fill)
