"""Relations between the positions of a sequence, as in MiniLM. For relations between examples see `similarity.py`."""

from __future__ import annotations

import math

from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.functional.attention import attention_kl
from hf_distill.functional.rows import in_full_precision


def relation_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, *, heads: int, segments: Tensor | None = None
) -> Tensor:
    """KL(teacher's relation ‖ student's relation) at each position, mean over the relation heads.

    The relation of position i to the others is softmax_j(x_i · x_j / √(d / heads)) within each relation head. x are the
    queries, keys or values of all attention heads, concatenated and then split into `heads` parts, so neither the
    widths nor the attention heads of the two models need to agree. Wang et al. 2020 (MiniLM, section 3.2: values, with
    the attention heads themselves) and Wang et al. 2021 (MiniLMv2, section 3: queries, keys, values). The papers
    average over positions; here each keeps its own number, 0 outside the mask, where nothing is read.

    Args:
        student: `[b t d_s]` vectors.
        teacher: `[b t d_t]` vectors.
        mask: `[b t]` bool, true at real positions.
        heads: the number of relation heads; must divide d_s and d_t.
        segments: `[b t]` number of the packed sequence that each position belongs to; positions of different sequences
            are not related. None means that each row is one sequence.

    Returns:
        `[b t]`. Memory: `[b heads t t]`, a few times.

    Raises:
        SettingError: if heads does not divide both widths (the message names the divisors), or shapes do not fit.

    >>> import torch
    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> relation_kl(x, torch.cat([x, x], -1) * 0.5**0.5, mask, heads=2).shape
    torch.Size([1, 3])
    >>> relation_kl(x, -x, mask, heads=1).tolist()  # the opposite vectors have the same relations
    [[0.0, 0.0, 0.0]]
    """
    if not student.shape[:2] == teacher.shape[:2] == mask.shape:
        raise SettingError(
            f"student vectors are {list(student.shape)}, teacher vectors {list(teacher.shape)}, mask "
            f"{list(mask.shape)}: they must be [b t d_s], [b t d_t] and [b t], with the same b and t."
        )
    d_s, d_t = student.shape[-1], teacher.shape[-1]
    if heads < 1 or d_s % heads or d_t % heads:
        fit = ", ".join(str(k) for k in range(1, math.gcd(d_s, d_t) + 1) if math.gcd(d_s, d_t) % k == 0)
        raise SettingError(
            f"heads={heads}: must divide the student's width {d_s} and the teacher's width {d_t}. Allowed: {fit}."
        )
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]  # [b 1 t t]
    if segments is not None:
        pairs = pairs & (segments[:, :, None] == segments[:, None, :])[:, None]
    return attention_kl(_scores(student, mask, heads), _scores(teacher, mask, heads), pairs)


def _scores(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    """`[b t d]` to `[b heads t t]`: scaled products of all pairs of positions within each relation head."""
    b, t, d = vectors.shape
    known = in_full_precision(vectors).masked_fill(~mask[..., None], 0.0)  # a NaN would spread through the products
    x = known.view(b, t, heads, d // heads).transpose(1, 2) / (d // heads) ** 0.25
    return x @ x.transpose(-1, -2)
