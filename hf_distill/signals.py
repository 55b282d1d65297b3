"""Signals: what one model shows of one batch; Needs: what an objective wants to be shown."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """What one model shows of one batch.

    Attributes:
        logits: predictions as the task reads them, leading axes first: `[b v]`, `[b t v]`, or
            `[b 2 t]` for spans; values rather than logits for regression and embeddings.
    """

    logits: Tensor


@dataclass(frozen=True)
class Needs:
    """What must be computed for an objective."""

    logits: bool = True

    def __or__(self, other: Needs) -> Needs:
        return Needs(logits=self.logits or other.logits)
