"""Signals: what one model shows of one batch; Needs: what an objective wants to be shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_distill.vocabulary import Columns


@dataclass(frozen=True)
class Signals:
    """What one model shows of one batch.

    Attributes:
        logits: predictions as the task reads them, leading axes first: `[b v]`, `[b t v]`, or
            `[b 2 t]` for spans; values rather than logits for regression and embeddings.
        columns: which columns of the heads these are.
    """

    logits: Tensor
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class Needs:
    """What must be computed for an objective."""

    logits: bool = True

    def __or__(self, other: Needs) -> Needs:
        return Needs(logits=self.logits or other.logits)
