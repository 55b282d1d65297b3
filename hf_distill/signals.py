"""What passes between models and objectives: signals, what must be computed, and sums over rows with their counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.vocabulary import HeadAlignment

Outputs: TypeAlias = Mapping[str, Any]
"""What a model's forward returns, by name."""


@dataclass(frozen=True)
class LossSum:
    """A total over the rows of a micro-batch and their number; not averaged yet.

    Attributes:
        value: scalar with the student's graph.
        count: scalar, the number of rows that count.
    """

    value: Tensor
    count: Tensor


Side: TypeAlias = Literal["encoder", "decoder"]

HIDDEN, LAST_HIDDEN = "hidden", "last_hidden"
ATTENTION = "attention"
RELATED = ("queries", "keys", "values")
EMBEDDINGS = -1  # as a layer: the input of the first block


class ActivationKey(NamedTuple):
    """Names one activation of a model.

    Attributes:
        what: "hidden" (the output of a block, `[b t d]`), "last_hidden" (the input of the head, after any last norm),
            "attention" (an `AttentionRecord`), "queries", "keys" or "values" (all heads side by side, `[b t d]`).
        layer: the block, from 0; -1 with "hidden" is the input of the first block.
        side: "encoder" or "decoder" of an encoder-decoder; None is its decoder, or the only stack.
        stack: the path of the list of blocks, if the user names it.
    """

    what: str
    layer: int = 0
    side: Side | None = None
    stack: str | None = None


@dataclass(frozen=True)
class SparseRows:
    """The most likely columns of each row and the probability of all others; or, with weights, a sample of the columns.

    Attributes:
        ids: `[... k]` of the compared columns, each at most once a row; -1 if a row has fewer than k.
        log_probabilities: `[... k]` at `temperature`; -inf where there is no column. With weights only their weighted
            sum over a row matters, so a store may give each column the row's mean; finite everywhere.
        log_tail: `[...]` log of the probability of all other columns; -inf if there are none, and with weights.
        temperature: that the logits were divided by. Another one would need the shape of the tail, which is unknown.
        weights: `[... k]`, 0 where there is no column. The target is then Σ_k w_k δ(id_k): its expectation over the
            draws is the teacher's distribution, so whatever is linear in the teacher's probabilities is unbiased.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    weights: Tensor | None = None


@dataclass(frozen=True)
class DeferredLogits:
    """Logits that are not computed yet: an output head, and its input.

    logits = softcap · tanh(x / softcap), x = logit_scale · (hidden · weightᵀ + bias).

    Attributes:
        hidden: `[b t d]`, the input of the head.
        weight: `[v d]`.
        bias: `[v]`, or None.
        logit_scale: that the model multiplies the output of its head with.
        softcap: of the logits, or None for none.
        dtype: of the product, as the model would compute it (that of autocast, or its own).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Signals:
    """What one model computes for one batch.

    Attributes:
        logits: predictions as the task reads them, leading axes first: `[b v]`, `[b t v]`, or `[b 2 t]` for spans;
            values rather than logits for regression and embeddings. None if no objective needs them.
        alignment: which columns of the heads are compared.
        activations: the captured activations.
        sparse: in place of logits, with the same leading axes, from a teacher that does not give all columns.
        deferred: in place of logits, if `Needs.deferred` allows it.
    """

    logits: Tensor | None
    alignment: HeadAlignment = field(default_factory=HeadAlignment)
    activations: Mapping[ActivationKey, Any] = field(default_factory=dict)
    sparse: SparseRows | None = None
    deferred: DeferredLogits | None = None

    def predictions(self) -> Tensor:
        """Return the logits.

        Raises:
            SettingError: if there are none.
        """
        if self.logits is None and self.sparse is not None:
            raise SettingError(
                "this teacher gives only its most likely columns, and an ensemble or an objective of your own needs "
                "all of them. Use a teacher that gives its logits."
            )
        if self.logits is None:
            raise SettingError("no predictions were computed: alpha=None compares none.")
        return self.logits

    def values_to_check(self) -> Tensor:
        """Return the values to check for NaN and inf: the logits, or the log-probabilities if sparse."""
        return self.predictions() if self.sparse is None else self.sparse.log_probabilities


@dataclass(frozen=True)
class Needs:
    """What must be computed of one model.

    Attributes:
        logits: whether its predictions are needed.
        activations: what to capture.
        temperature: that the predictions will be softened with; a teacher of several models averages at it.
        deferred: whether a `DeferredLogits` may stand for the logits.
    """

    logits: bool = False
    activations: frozenset[ActivationKey] = frozenset()
    temperature: float = 1.0
    deferred: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Return what either needs; logits must be whole if one of them needs them whole."""
        softened = self if self.logits else other
        deferred = all(one.deferred for one in (self, other) if one.logits) and (self.deferred or other.deferred)
        return Needs(self.logits or other.logits, self.activations | other.activations, softened.temperature, deferred)
