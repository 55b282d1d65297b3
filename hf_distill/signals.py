"""LossSum: what an objective found in a micro-batch, and the count it is over. It is not averaged yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.vocabulary import HeadAlignment


@dataclass(frozen=True)
class LossSum:
    """A total, or the micro-batch mean of a head that only gives that, and how many rows it is over.

    Attributes:
        value: scalar with the student's graph: the total, or the mean where `is_mean`.
        count: scalar, the rows of this micro-batch that count.
        is_mean: the value already is divided by `count`.
    """

    value: Tensor
    count: Tensor
    is_mean: bool = False

    def over(self, denominator: Tensor) -> Tensor:
        """This micro-batch's part of the mean over the whole optimizer step.

        A mean is multiplied by count / denominator, which is exactly 1.0 when this micro-batch is the whole step.
        No row at all gives 0, with a graph.

        >>> mean = LossSum(torch.tensor(3.0), torch.tensor(2), is_mean=True)
        >>> mean.over(torch.tensor(8)).item()
        0.75
        """
        denominator = denominator.clamp(min=1)
        if self.is_mean:  # a mean over no row is NaN
            value = torch.where(self.count > 0, self.value, torch.zeros_like(self.value))
            return value * (self.count / denominator)
        return self.value / denominator


HIDDEN, LAST_HIDDEN = "hidden", "last_hidden"
ATTENTION = "attention"
RELATED = ("queries", "keys", "values")
EMBEDDINGS = -1  # as a layer: what the first block is given


class ActivationKey(NamedTuple):
    """One thing inside a model.

    Attributes:
        what: "hidden" (what a block puts out, `[b t d]`), "last_hidden" (what the head reads, after any last norm),
            "attention" (an `AttentionRecord`), "queries", "keys" or "values" (all heads side by side, `[b t d]`).
        layer: the block, from 0; -1 with "hidden": what the first block is given.
        side: "encoder" or "decoder" of an encoder-decoder; None: its decoder, or the only stack.
        stack: the path of the list of blocks, where the user names it.
    """

    what: str
    layer: int = 0
    side: str | None = None
    stack: str | None = None


@dataclass(frozen=True)
class SparseRows:
    """What a teacher lists of each row, and how likely everything else is together; or, with weights, a sample of it.

    Attributes:
        ids: `[... k]` of the compared columns, each at most once a row; -1 where a row lists fewer than k.
        log_probabilities: `[... k]` at `temperature`; -inf where nothing is listed. With weights only their weighted
            sum of a row matters, so a store may give each column the row's mean; finite everywhere.
        log_tail: `[...]` log of the probability of all others; -inf where a row lists them all, and with weights.
        temperature: that the logits were divided by. Another one would need the tail's own shape, which is not here.
        weights: `[... k]`, 0 where nothing is listed. The target is then Σ_k w_k δ(id_k): its expectation over the
            draws is the teacher's distribution, so what is linear in the teacher's probabilities is unbiased.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    weights: Tensor | None = None


@dataclass(frozen=True)
class DeferredLogits:
    """Predictions that are not made yet: an output head, and what it is given.

    logits = softcap · tanh(x / softcap), x = logit_scale · (hidden · weightᵀ + bias).

    Attributes:
        hidden: `[b t d]`.
        weight: `[v d]`.
        bias: `[v]`, or None.
        logit_scale, softcap: what the model does to the logits after its head; softcap None: nothing.
        dtype: of the product, as the model would make it (that of autocast, or its own).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Signals:
    """What one model shows of one batch.

    Attributes:
        logits: predictions as the task reads them, leading axes first: `[b v]`, `[b t v]`, or `[b 2 t]` for spans;
            values rather than logits for regression and embeddings. None where no objective needs them.
        columns: which columns of the heads these are.
        inside: what was read of the model's inside.
        sparse: predictions in place of logits, leading axes as theirs, of a teacher that does not tell all columns.
        unmade: what the logits would be made of, in their place, where `Needs.deferred` said that this will do.
    """

    logits: Tensor | None
    alignment: HeadAlignment = field(default_factory=HeadAlignment)
    activations: Mapping[ActivationKey, Any] = field(default_factory=dict)
    sparse: SparseRows | None = None
    deferred: DeferredLogits | None = None

    def predictions(self) -> Tensor:
        """The logits, where there must be some."""
        if self.logits is None and self.sparse is not None:
            raise SettingError(
                "this teacher tells only its likeliest columns, and what asks needs all of them (an ensemble, or an "
                "objective of your own). Use a teacher that tells its logits."
            )
        if self.logits is None:
            raise SettingError("predictions were not asked for: alpha=None compares none.")
        return self.logits

    def values_to_check(self) -> Tensor:
        """What may be no number: of a teacher that lists some columns, what it lists of them."""
        return self.predictions() if self.sparse is None else self.sparse.log_probabilities


@dataclass(frozen=True)
class Needs:
    """What must be computed of one model for an objective.

    Attributes:
        logits: its predictions. reads: of its inside.
        temperature: that the predictions will be softened with; a teacher of several models averages at it.
        unmade: instead of logits, what they are made of will do (a teacher may give the logits all the same).
    """

    logits: bool = False
    activations: frozenset[ActivationKey] = frozenset()
    temperature: float = 1.0
    deferred: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Both: logits where one of them needs them made."""
        softened = self if self.logits else other
        deferred = all(one.deferred for one in (self, other) if one.logits) and (self.deferred or other.deferred)
        return Needs(self.logits or other.logits, self.activations | other.activations, softened.temperature, deferred)
