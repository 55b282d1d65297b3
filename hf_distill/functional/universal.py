"""How far apart two distributions are when nobody says which outcome of the one is which of the other."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hf_distill.functional.rows import in_full_precision


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_i |q_(i) − p_(i)| of each row: the probabilities of both in falling order, the shorter filled up with zeros.

    It is the Wasserstein-1 distance of the two distributions where moving probability costs the same between any two
    tokens, and the tokens may be renamed at will: Boizard et al. 2024 (Towards Cross-Tokenizer Distillation: the
    Universal Logit Distillation Loss for LLMs), section 3. In [0, 2]; 0 for a row that is the other one in another
    order. A kink where two sorted probabilities are equal: there the gradient is 0.

    Args:
        student: logits `[n v]`. teacher: logits `[n w]`; w may be another number than v.

    Returns:
        `[n]`. Memory: a few times `[n v]`.

    >>> import torch
    >>> student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(sorted_distance(student, teacher).item(), 6)  # |0.5 - 0.75| + |0.25 - 0.25| + |0.25 - 0|
    0.5
    """
    # Logits are sorted before the softmax: a row in another order then has the same sum, to the last bit.
    q, p = (
        in_full_precision(rows).sort(dim=-1, descending=True, stable=True).values.softmax(-1)
        for rows in (student, teacher)
    )
    wider = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(rows, (0, wider - rows.shape[-1])) for rows in (q, p))
    return (q - p).abs().sum(-1)
