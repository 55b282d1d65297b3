"""Relations between the positions of a sequence, as MiniLM compares them; between examples: `similarity.py`."""

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

    The relation of position i to the others is softmax_j(x_i · x_j / √(d / heads)), within each relation head. x are
    the queries, or the keys, or the values of all attention heads side by side; they are cut anew into `heads` pieces,
    so neither the widths nor the numbers of attention heads of the two models need agree.
    Wang et al. 2020 (MiniLM, section 3.2: values, with the attention heads themselves) and Wang et al. 2021 (MiniLMv2,
    section 3: queries, keys, values). The papers average over positions; here each keeps its own number, 0 outside the
    mask, where nothing is read.

    Args:
        student: `[b t d_s]`. teacher: `[b t d_t]`.
        mask: `[b t]` bool, true where there is something to attend to.
        heads: the number of relation heads; must divide d_s and d_t.
        segments: `[b t]`, which of several packed sequences a position is of, related to its own only. None: one.

    Returns:
        `[b t]`. Memory: `[b heads t t]`, a few times.

    Raises:
        SettingError: heads that do not divide both widths (those that do are named); shapes that do not fit.

    >>> import torch
    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> relation_kl(x, torch.cat([x, x], -1) * 0.5**0.5, mask, heads=2).shape
    torch.Size([1, 3])
    >>> relation_kl(x, -x, mask, heads=1).tolist()  # turned around, but in the same relations
    [[0.0, 0.0, 0.0]]
    """
    _refuse_what_does_not_fit(student, teacher, mask, heads)
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


def _refuse_what_does_not_fit(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> None:
    if not student.shape[:2] == teacher.shape[:2] == mask.shape:
        raise SettingError(
            f"student vectors are {list(student.shape)}, teacher vectors {list(teacher.shape)}, mask "
            f"{list(mask.shape)}: they must be [b t d_s], [b t d_t] and [b t], of one b and t."
        )
    widths = student.shape[-1], teacher.shape[-1]
    if heads < 1 or any(width % heads for width in widths):
        both = math.gcd(*widths)
        fit = ", ".join(str(k) for k in range(1, both + 1) if both % k == 0)
        raise SettingError(
            f"heads={heads}: relation heads must divide the student's width {widths[0]} and the teacher's {widths[1]}. "
            f"These do: {fit}."
        )
