"""What one block's self-attention compared, and the scores that follow. The attention itself is computed elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.functional.rows import in_full_precision


@dataclass(frozen=True)
class AttentionRecord:
    """Queries and keys as the attention function was given them (after rotary positions), and what it adds.

    Attributes:
        queries: `[b h t d]`. keys: `[b g s d]`, g groups of heads (g = h without grouped keys).
        scaling: of the product. bias: `[b|1 h t s]` added to it (T5), or None. softcap: of the scores, or None.
        mask: what the attention function was given: additive, bool, or None. causal: no key behind its query.
        window: how many keys back a query sees, where the mask does not say so; None: all.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    bias: Tensor | None
    softcap: float | None
    mask: Tensor | None
    causal: bool
    window: int | None = None

    def scores(self, keep: Tensor | None = None) -> Tensor:
        """`[b h t s]`: before mask and softmax, in full precision.

        Args:
            keep: `[b t]` bool, the positions that count; what lies elsewhere is not read. None: all.
        """
        queries, keys = in_full_precision(self.queries), in_full_precision(self.keys)
        if keep is not None:  # filled first: 0 · NaN is NaN, in the gradient too
            elsewhere = ~keep[:, None, :, None]
            queries, keys = queries.masked_fill(elsewhere, 0.0), keys.masked_fill(elsewhere, 0.0)
        if keys.shape[1] != queries.shape[1]:
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries @ keys.transpose(-1, -2) * self.scaling
        if self.bias is not None:
            scores = scores + self.bias
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.mask is not None and self.mask.dim() == 4 and self.mask.dtype != torch.bool:
            added = self.mask[..., : keys.shape[-2]]  # BEiT hands its bias over in the mask
            scores = scores + added.masked_fill(added <= _hidden(added), 0.0)
        return scores

    def allowed(self) -> Tensor:
        """`[1|b 1|h t s]` bool: which keys a query may attend to, as far as the mask says."""
        t, s = self.queries.shape[2], self.keys.shape[2]
        device = self.queries.device
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[..., :s]
            return mask if mask.dtype == torch.bool else mask > _hidden(mask)
        allowed = torch.ones(t, s, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed.tril(s - t)
        if self.window is not None:
            allowed = allowed.triu(s - t - self.window + 1)
        if self.mask is not None and self.mask.dim() == 2:  # flash attention is told of padding alone
            return allowed[None, None] & self.mask[:, None, None, :s].bool()
        return allowed[None, None]


def _hidden(mask: Tensor) -> float:
    """What an additive mask says of a key that may not be attended to: this or less."""
    return torch.finfo(mask.dtype).min / 2
